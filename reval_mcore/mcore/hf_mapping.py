"""Hugging Face <-> megatron-core: one table of names, and pure functions for the layouts.

The same table serves loading, the weight export to engines and the conversion tools, so that they cannot drift apart.
Layouts (megatron-core 0.16.1): linear_qkv holds, for each query group, its query heads, then its key, then its value,
and tensor parallelism cuts whole groups; linear_fc1 on each rank is [gate_rank; up_rank]; linear_proj and linear_fc2
are cut along dimension 1; embedding and output layer along the vocabulary, zero-padded to a multiple of 128 x TP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from reval_mcore.architecture import ModelSpec
from reval_mcore.mcore.weight_files import TensorFile

# ---------------------------------------------------------------- names

# how a parameter lies: whole on every rank, cut along dim 1, cut along the vocabulary, or one of the two fused layouts
Layout = Literal["replicated", "row", "vocabulary", "qkv", "gate_up"]

# of one layer, in its order; a checkpoint has these names under either layer spec
_LAYER: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "self_attention.linear_qkv.layer_norm_weight": ("replicated", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.q_layernorm.weight": ("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("replicated", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("row", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("replicated", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("row", ("mlp.down_proj.weight",)),
}
# Transformer Engine fuses a norm into the linear layer after it, and the names above are its; the local spec has these
_LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_EMBEDDING, _OUTPUT, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)


def hf_names(name: str, spec: ModelSpec) -> tuple[Layout, tuple[str, ...]]:
    """Layout and HF names of a parameter under its global megatron-core name (layers counted over all stages)."""
    if name == _EMBEDDING:
        return "vocabulary", ("model.embed_tokens.weight",)
    if name == _OUTPUT:
        return "vocabulary", ("model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight",)
    if name == FINAL_NORM:
        return "replicated", ("model.norm.weight",)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    assert match is not None, f"no row for parameter {name}"
    layout, names = _LAYER[_LOCAL_NAMES.get(match[2], match[2])]
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


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors that a directory in HF format must have, in the order of the model."""
    hidden, ffn, head = spec.hidden_size, spec.ffn_hidden_size, spec.kv_channels
    query, key = spec.num_attention_heads * head, spec.num_query_groups * head
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.bias": (key,),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    table = (spec.vocab_size, hidden)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table}
    for number in range(spec.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in of_layer.items()}
    return {name: shapes[name] for parameter in checkpoint_parameters(spec) for name in parameter.hf}


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True)
class CheckpointParameter:
    """A parameter as it lies in a megatron-core checkpoint, where a tensor holds the same parameter of all layers."""

    key: str
    layer: int | None  # its place along the first axis of the tensor; None: it is the tensor
    layout: Layout
    hf: tuple[str, ...]


def checkpoint_parameters(spec: ModelSpec) -> Iterator[CheckpointParameter]:
    """All parameters of a model, in the order of their HF names; a tied table once."""

    def whole(name: str) -> CheckpointParameter:
        return CheckpointParameter(name, None, *hf_names(name, spec))

    has_row = {
        "self_attention.linear_qkv.bias": spec.family.qkv_bias,
        "self_attention.q_layernorm.weight": spec.family.qk_layernorm,
        "self_attention.k_layernorm.weight": spec.family.qk_layernorm,
    }
    yield whole(_EMBEDDING)
    for number in range(spec.num_layers):
        for name in _LAYER:
            if has_row.get(name, True):
                layout, hf = hf_names(f"decoder.layers.{number}.{name}", spec)
                yield CheckpointParameter(f"decoder.layers.{name}", number, layout, hf)
    yield whole(FINAL_NORM)
    if not spec.tied_embeddings:
        yield whole(_OUTPUT)


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
        return table_rows(first, tp_rank * height, (tp_rank + 1) * height)
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


def table_rows(table: Source, start: int, end: int) -> torch.Tensor:
    """Rows of an embedding or output layer, zero beyond its own."""
    size = table.shape[0]
    real = table[min(start, size) : min(end, size)]
    missing = end - start - real.shape[0]
    return torch.cat([real, real.new_zeros(missing, *real.shape[1:])]) if missing else real


def from_shards(layout: Layout, shards: Sequence[torch.Tensor], spec: ModelSpec) -> list[torch.Tensor]:
    """The shards of one parameter, in rank order -> its HF tensors, in the order of `hf_names`."""
    if layout == "replicated":
        return [shards[0]]
    if layout == "row":
        return [torch.cat(list(shards), dim=1)]
    if layout == "gate_up":
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]
    whole = shards[0] if len(shards) == 1 else torch.cat(list(shards))
    if layout == "vocabulary":
        return [whole[: spec.vocab_size]]
    rows = _rows_per_group(spec)
    grouped = whole.reshape(spec.num_query_groups, sum(rows), *whole.shape[1:])
    return [part.flatten(0, 1).contiguous() for part in grouped.split(list(rows), dim=1)]


def _rows_per_group(spec: ModelSpec) -> tuple[int, int, int]:
    """Rows of query, key and value in one query group."""
    heads = spec.num_attention_heads // spec.num_query_groups
    return heads * spec.kv_channels, spec.kv_channels, spec.kv_channels
