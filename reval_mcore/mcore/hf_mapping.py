"""Hugging Face <-> megatron-core: one table of names, and two pure functions for the layouts.

The same tables serve loading, the weight export to engines and the conversion tools, so the three cannot drift apart.
Layouts (megatron-core 0.16.1): linear_qkv holds, for each query group, its query heads, then its key, then its value,
and tensor parallelism cuts whole groups; linear_fc1 on each rank is [gate_rank; up_rank]; linear_proj and linear_fc2
are cut along dimension 1; embedding and output layer along the vocabulary, zero-padded to a multiple of 128 x TP.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import SafetensorError
from safetensors.torch import save_file

from reval_mcore.architecture import ModelSpec
from reval_mcore.mcore.weight_files import TensorFile, WeightFiles

_MAX_PROBLEMS_SHOWN = 8


# ---------------------------------------------------------------- names

# how a parameter lies: whole on every rank, cut along dim 1, cut along the vocabulary, or one of the two fused layouts
Layout = Literal["replicated", "row", "vocabulary", "qkv", "gate_up"]

_LAYER: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "input_layernorm.weight": ("replicated", ("input_layernorm.weight",)),  # local spec
    "self_attention.linear_qkv.layer_norm_weight": ("replicated", ("input_layernorm.weight",)),  # TE spec
    "pre_mlp_layernorm.weight": ("replicated", ("post_attention_layernorm.weight",)),  # local spec
    "mlp.linear_fc1.layer_norm_weight": ("replicated", ("post_attention_layernorm.weight",)),  # TE spec
    "self_attention.q_layernorm.weight": ("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("replicated", ("self_attn.k_norm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.linear_proj.weight": ("row", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("row", ("mlp.down_proj.weight",)),
}


def hf_names(name: str, spec: ModelSpec) -> tuple[Layout, tuple[str, ...]]:
    """Layout and HF names of a parameter under its global megatron-core name (layers counted over all stages)."""
    if name == "embedding.word_embeddings.weight":
        return "vocabulary", ("model.embed_tokens.weight",)
    if name == "output_layer.weight":
        return "vocabulary", ("model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight",)
    if name == "decoder.final_layernorm.weight":
        return "replicated", ("model.norm.weight",)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    assert match is not None, f"no row for parameter {name}"
    layout, names = _LAYER[match[2]]
    return layout, tuple(f"model.layers.{match[1]}.{part}" for part in names)


def global_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global megatron-core name, parameter) of this stage. `layer_number` is 1-based and holds the stage's offset."""
    for name, parameter in model.named_parameters():
        match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match is None:
            yield name, parameter
        else:
            layer = model.get_submodule(f"decoder.layers.{match[1]}")
            number = layer.layer_number
            assert isinstance(number, int)
            yield f"decoder.layers.{number - 1}.{match[2]}", parameter


# ---------------------------------------------------------------- layouts


Source = torch.Tensor | TensorFile


def to_shard(layout: Layout, hf: Sequence[Source], spec: ModelSpec, *, tp_size: int, tp_rank: int) -> torch.Tensor:
    """HF tensors of one parameter -> the shard of one tensor-parallel rank."""
    first = hf[0]
    if layout == "replicated":
        return first[:]
    if layout == "row":
        width = first.shape[1] // tp_size
        return first[:, tp_rank * width : (tp_rank + 1) * width].contiguous()
    if layout == "vocabulary":
        height = spec.padded_vocab_size(tp_size) // tp_size
        low, high = (min(rank * height, spec.vocab_size) for rank in (tp_rank, tp_rank + 1))
        real = first[low:high]
        return torch.cat([real, real.new_zeros(height - real.shape[0], *real.shape[1:])])
    if layout == "gate_up":
        height = first.shape[0] // tp_size
        return torch.cat([part[tp_rank * height : (tp_rank + 1) * height] for part in hf])
    groups = spec.num_query_groups // tp_size
    assert groups * tp_size == spec.num_query_groups, "fewer query groups than ranks: see reval_mcore.layout"
    rows = _rows_per_group(spec)
    parts = [
        part[tp_rank * groups * height : (tp_rank + 1) * groups * height].reshape(groups, height, *part.shape[1:])
        for part, height in zip(hf, rows, strict=True)
    ]
    return torch.cat(parts, dim=1).flatten(0, 1)


def from_shards(layout: Layout, shards: Sequence[torch.Tensor], spec: ModelSpec) -> list[torch.Tensor]:
    """The shards of one parameter, in rank order -> its HF tensors, in the order of `hf_names`."""
    if layout == "replicated":
        return [shards[0]]
    if layout == "row":
        return [torch.cat(list(shards), dim=1)]
    whole = torch.cat(list(shards))
    if layout == "vocabulary":
        return [whole[: spec.vocab_size]]
    if layout == "gate_up":
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]
    rows = _rows_per_group(spec)
    grouped = whole.reshape(spec.num_query_groups, sum(rows), *whole.shape[1:])
    return [part.flatten(0, 1).contiguous() for part in grouped.split(list(rows), dim=1)]


def _rows_per_group(spec: ModelSpec) -> tuple[int, int, int]:
    """Rows of query, key and value in one query group."""
    heads = spec.num_attention_heads // spec.num_query_groups
    return heads * spec.kv_channels, spec.kv_channels, spec.kv_channels


# ---------------------------------------------------------------- reading and writing


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors that a directory in HF format must have."""
    hidden, ffn, head = spec.hidden_size, spec.ffn_hidden_size, spec.kv_channels
    query, key = spec.num_attention_heads * head, spec.num_query_groups * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if spec.family.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (rows,) for x, rows in (("q", query), ("k", key), ("v", key))}
    if spec.family.qk_layernorm:
        layer |= {f"self_attn.{x}_norm.weight": (head,) for x in "qk"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for number in range(spec.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if spec.tied_embeddings else shapes | {"lm_head.weight": (spec.vocab_size, hidden)}


def check_weights(directory: Path, spec: ModelSpec) -> None:
    """Raises ValueError with all that does not fit the spec, from the headers of the files alone.

    A tensor too many is refused as well: where config.json has fewer layers than the weights, all the others fit.
    """
    reader, shapes = WeightFiles(directory), hf_shapes(spec)
    problems: list[str] = []
    for name, shape in shapes.items():
        if name not in reader:
            problems.append(f"{name}: is missing")
        elif reader[name].shape != shape:
            problems.append(f"{name}: has shape {list(reader[name].shape)}, config.json asks for {list(shape)}")
        elif reader[name].dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name}: is of type {reader[name].dtype}; F32, F16 and BF16 can be trained")
    # some writers save these though nobody reads them
    unread = {"lm_head.weight"} | {name for name in reader if name.endswith(".rotary_emb.inv_freq")}
    problems += [f"{name}: config.json has no place for it" for name in sorted({*reader} - {*shapes} - unread)]
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS_SHOWN} more"] if len(problems) > _MAX_PROBLEMS_SHOWN else []
        start = f"{directory}: the weights do not fit config.json; fetch both again, from the same model"
        raise ValueError("\n  ".join([start, *problems[:_MAX_PROBLEMS_SHOWN], *more]))


@torch.no_grad()
def load_weights(model: torch.nn.Module, directory: Path, spec: ModelSpec, *, tp_size: int, tp_rank: int) -> None:
    """Fill this rank's parameters from an HF directory, reading only the slices that it holds.

    Raises ValueError where weights and spec do not fit: see `check_weights`.
    """
    check_weights(directory, spec)
    reader = WeightFiles(directory)
    for name, parameter in global_names(model):
        layout, sources = hf_names(name, spec)
        shard = to_shard(layout, [reader[source] for source in sources], spec, tp_size=tp_size, tp_rank=tp_rank)
        assert shard.shape == parameter.shape, f"{name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
        parameter.copy_(shard)


# what a directory in HF format has beside its weights
_COMPANIONS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def check_is_new(directory: Path) -> None:
    """Raises ValueError where something is in it already, OSError where it is no directory."""
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: is not empty; give a new directory")


def write_directory(directory: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], *, companions: Path) -> None:
    """A directory in HF format: these weights, with configuration and tokenizer copied from `companions`.

    The weights come last: where they are, all is. Raises ValueError or OSError where the directory cannot be written.
    """
    check_is_new(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in _COMPANIONS:
        for path in sorted(companions.glob(pattern)):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copy(path, directory / path.name)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors}
    path = directory / "model.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be written ({error}); make room, or give another directory") from None


@torch.no_grad()
def export_weights(
    model: torch.nn.Module, spec: ModelSpec, groups: ProcessGroupCollection
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, whole tensor), one at a time, on every rank; collective over tensor- and pipeline-parallel ranks.

    A tied output layer is left out: HF names it once, as the embedding.
    """
    for stage in range(groups.pp.size()):
        own = _stage_weights(model, spec, groups.tp) if stage == groups.pp.rank() else None
        yield from own if own is not None and groups.pp.size() == 1 else _from_stage(stage, own, groups.pp)


def _stage_weights(
    model: torch.nn.Module, spec: ModelSpec, tp_group: torch.distributed.ProcessGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in global_names(model):
        if name == "output_layer.weight" and spec.tied_embeddings:
            continue
        layout, targets = hf_names(name, spec)
        shard = parameter.detach().contiguous()
        shards = [shard]
        if tp_group.size() > 1 and layout != "replicated":
            shards = [torch.empty_like(shard) for _ in range(tp_group.size())]
            torch.distributed.all_gather(shards, shard, group=tp_group)
        yield from zip(targets, from_shards(layout, shards, spec), strict=True)


def _from_stage(
    stage: int, own: Iterator[tuple[str, torch.Tensor]] | None, pp_group: torch.distributed.ProcessGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    """What one pipeline stage holds, on all of them; `own` is given on the stage itself."""
    source = torch.distributed.get_global_rank(pp_group, stage)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    while True:
        name, tensor = next(own, ("", torch.empty(0))) if own is not None else ("", torch.empty(0))
        header: list[Any] = [(name, tensor.shape, tensor.dtype)]
        torch.distributed.broadcast_object_list(header, src=source, group=pp_group)
        name, shape, dtype = header[0]
        if not name:
            return
        whole = tensor.contiguous() if own is not None else torch.empty(shape, dtype=dtype, device=device)
        torch.distributed.broadcast(whole, src=source, group=pp_group)
        yield name, whole
