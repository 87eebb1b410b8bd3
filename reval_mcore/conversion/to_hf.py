"""The policy, or the reference, of a megatron-core checkpoint -> a directory in Hugging Face format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from reval_mcore.architecture import ModelSpec, read_spec
from reval_mcore.conversion.companions import copy_companions
from reval_mcore.conversion.sources import CheckpointSource
from reval_mcore.conversion.staging import Staging, staged
from reval_mcore.conversion.tensors import DtypeName, OnProgress, dtype_name, dtype_named, nothing_to_tell
from reval_mcore.durable import crc32, fsync, raise_if_full
from reval_mcore.mcore.hf_mapping import FINAL_NORM, CheckpointParameter, checkpoint_parameters, from_shards, hf_shapes
from reval_mcore.mcore.weight_checkpoint import WeightCheckpoint, check_checkpoint, check_files

Which = Literal["policy", "reference"]
_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class _Shard:
    """A safetensors file to write."""

    name: str
    parameters: tuple[CheckpointParameter, ...]
    num_bytes: int


def convert_to_hf(
    source: CheckpointSource,
    out: Path,
    *,
    which: Which = "policy",
    dtype: DtypeName = "source",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress = nothing_to_tell,
) -> None:
    """Convert; `on_progress` is told of bytes of the result.

    Holds one file of `max_shard_bytes` at a time, or one parameter where that is larger. Raises ValueError that names
    file and tensor where something does not fit, and OSError where a disk is at fault; nothing is published then.
    """
    spec = read_spec(source.hf)
    checkpoint = open_checkpoint(source, spec, which)
    target = dtype_named(dtype, checkpoint.dtype(FINAL_NORM))
    check_files(source.weights)
    shards = _plan(spec, target, max_shard_bytes)
    made_from = {
        "conversion": "mcore_to_hf 1",
        "which": which,
        "dtype": dtype_name(target),
        "config_crc32": crc32(source.hf / "config.json"),
        "metadata_crc32": crc32(source.weights / ".metadata"),
        "shards": [shard.name for shard in shards],
    }
    with staged(out, made_from) as staging:
        done = {part["file"] for part in staging.done}
        for shard in shards:
            if shard.name in done:
                on_progress(shard.num_bytes, shard.parameters[-1].hf[-1])
            else:
                _write_shard(checkpoint, shard, spec, target, staging, on_progress)
        copy_companions(source.hf, staging.path, dtype=dtype_name(target))
        if len(shards) > 1:
            (staging.path / _INDEX).write_text(_index(shards), encoding="utf-8")
        staging.publish()


def open_checkpoint(source: CheckpointSource, spec: ModelSpec, which: Which) -> WeightCheckpoint:
    """Raises ValueError where it does not fit the spec."""
    checkpoint = WeightCheckpoint(source.weights, prefix="" if which == "policy" else "reference.")
    check_checkpoint(checkpoint, spec)
    return checkpoint


def num_bytes(source: CheckpointSource, dtype: DtypeName) -> int:
    """Of the weights that `convert_to_hf` will write. Raises ValueError as it does."""
    spec = read_spec(source.hf)
    target = dtype_named(dtype, open_checkpoint(source, spec, "policy").dtype(FINAL_NORM))
    return sum(torch.Size(shape).numel() for shape in hf_shapes(spec).values()) * target.itemsize


def _plan(spec: ModelSpec, dtype: torch.dtype, max_shard_bytes: int) -> list[_Shard]:
    shapes = hf_shapes(spec)
    groups: list[list[CheckpointParameter]] = [[]]
    sizes = [0]
    for parameter in checkpoint_parameters(spec):
        num_bytes = sum(torch.Size(shapes[name]).numel() for name in parameter.hf) * dtype.itemsize
        if groups[-1] and sizes[-1] + num_bytes > max_shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(parameter)
        sizes[-1] += num_bytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return [_Shard(name, tuple(group), size) for name, group, size in zip(names, groups, sizes, strict=True)]


def read_parameter(
    checkpoint: WeightCheckpoint, parameter: CheckpointParameter, spec: ModelSpec
) -> dict[str, torch.Tensor]:
    """The HF tensors of a parameter. Raises ValueError where they cannot be read."""
    rows = spec.vocab_size if parameter.layout == "vocabulary" else None
    whole = checkpoint.read(parameter.key, parameter.layer, rows)
    return dict(zip(parameter.hf, from_shards(parameter.layout, [whole], spec), strict=True))


def _write_shard(
    checkpoint: WeightCheckpoint,
    shard: _Shard,
    spec: ModelSpec,
    dtype: torch.dtype,
    staging: Staging,
    on_progress: OnProgress,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for parameter in shard.parameters:
        for name, tensor in read_parameter(checkpoint, parameter, spec).items():
            tensors[name] = tensor.to(dtype).contiguous()
            on_progress(tensors[name].nbytes, name)
    path = staging.path / shard.name
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # keeps the errno to itself
        path.unlink(missing_ok=True)
        raise_if_full(staging.path)
        raise OSError(f"{path}: cannot be written ({error})") from error
    fsync(path)
    fsync(staging.path)
    staging.note({"file": shard.name})


def _index(shards: list[_Shard]) -> str:
    files = {name: shard.name for shard in shards for parameter in shard.parameters for name in parameter.hf}
    total = sum(shard.num_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n"
