"""The weights of a model under HF names, gathered over tensor- and pipeline-parallel ranks bucket by bucket."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from reval_mcore.architecture import ModelSpec
from reval_mcore.mcore.hf_mapping import from_shards, global_names, hf_names

Named = tuple[str, torch.Tensor]
Bucket = list[tuple[str, torch.nn.Parameter]]  # parameters of one dtype, under global names


@torch.no_grad()
def export_weights(
    model: torch.nn.Module, spec: ModelSpec, groups: ProcessGroupCollection, *, bucket_bytes: int, wanted: bool = True
) -> Iterator[Named]:
    """(HF name, whole tensor) of the whole model, on the ranks that want it; the others get nothing.

    Collective over tensor- and pipeline-parallel ranks: every rank iterates to the end, with the same `bucket_bytes`.
    No rank holds more at a time than a bucket beside its own shard, or one parameter where that is larger. A tensor may
    be a view of the model's own: take a copy to keep it. A tied output layer is left out: HF names it once.
    """
    column = _any(wanted, groups.pp, model)  # somebody along this rank's pipeline
    if not _any(column, groups.tp, model):  # or of this whole copy of the model
        return
    for stage in range(groups.pp.size()):
        buckets = _buckets(model, spec, groups.tp, bucket_bytes) if stage == groups.pp.rank() else None
        while True:
            bucket = next(buckets, None) if buckets is not None else None
            named = _gather(bucket, spec, groups.tp) if bucket is not None else None
            if column and groups.pp.size() > 1:
                named = _broadcast(named, stage, groups.pp, _device(model), is_source=buckets is not None)
            if named is None:
                break
            if wanted:
                yield from named


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _any(value: bool, group: dist.ProcessGroup, model: torch.nn.Module) -> bool:
    if group.size() == 1:
        return value
    flag = torch.tensor(int(value), device=_device(model))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _buckets(
    model: torch.nn.Module, spec: ModelSpec, tp_group: dist.ProcessGroup, bucket_bytes: int
) -> Iterator[Bucket]:
    """The parameters of this stage, consecutive ones together."""
    bucket, size = Bucket(), 0
    for name, parameter in global_names(model):
        if name == "output_layer.weight" and spec.tied_embeddings:
            continue
        num_bytes = parameter.numel() * parameter.element_size() * tp_group.size()
        if bucket and (size + num_bytes > bucket_bytes or bucket[0][1].dtype != parameter.dtype):
            yield bucket
            bucket, size = Bucket(), 0
        bucket.append((name, parameter))
        size += num_bytes
    if bucket:
        yield bucket


def _gather(bucket: Bucket, spec: ModelSpec, tp_group: dist.ProcessGroup) -> list[Named]:
    """The HF tensors of a bucket, on every tensor-parallel rank of the stage: one collective."""
    shards: Sequence[Sequence[torch.Tensor]] = [[parameter.detach()] for _, parameter in bucket]
    if tp_group.size() > 1:
        own = torch.cat([parameter.detach().flatten() for _, parameter in bucket])
        gathered = own.new_empty(tp_group.size() * len(own))
        dist.all_gather_into_tensor(gathered, own, group=tp_group)
        parts = gathered.view(tp_group.size(), -1).split([parameter.numel() for _, parameter in bucket], dim=1)
        shards = [[row.view(p.shape) for row in part] for part, (_, p) in zip(parts, bucket, strict=True)]
    named: list[Named] = []
    for (name, _), of_parameter in zip(bucket, shards, strict=True):
        layout, targets = hf_names(name, spec)
        named += zip(targets, from_shards(layout, of_parameter, spec), strict=True)
    return named


def _broadcast(
    named: list[Named] | None, stage: int, pp_group: dist.ProcessGroup, device: torch.device, *, is_source: bool
) -> list[Named] | None:
    """What a pipeline stage has gathered, on all of them; None after its last bucket."""
    source = dist.get_global_rank(pp_group, stage)
    header: list[Any] = [None if named is None else [(name, tensor.shape, tensor.dtype) for name, tensor in named]]
    dist.broadcast_object_list(header, src=source, group=pp_group)
    if header[0] is None:
        return None
    sizes = [shape.numel() * dtype.itemsize for _, shape, dtype in header[0]]
    if is_source:
        assert named is not None
        flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in named])
    else:
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.broadcast(flat, src=source, group=pp_group)
    if is_source:
        return named
    ends = list(itertools.accumulate(sizes))
    parts = [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [
        (name, part.view(dtype).view(shape))
        for part, (name, shape, dtype) in zip(parts, header[0], strict=True)
    ]  # fmt: skip
