"""Hugging Face <-> megatron-core: one table of families, one table of names, and two pure functions for the layouts.

The same tables serve loading, the weight export to engines and the conversion tools, so the three cannot drift apart.
Layouts (megatron-core 0.16.1): linear_qkv holds, for each query group, its query heads, then its key, then its value,
and tensor parallelism cuts whole groups; linear_fc1 on each rank is [gate_rank; up_rank]; linear_proj and linear_fc2
are cut along dimension 1; embedding and output layer along the vocabulary, zero-padded to a multiple of 128 x TP.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

VOCABULARY_MULTIPLE = 128  # rows of embedding and output layer, per tensor-parallel rank


@dataclass(frozen=True)
class Family:
    """What a model family does differently from the Llama-like base (RMSNorm, SwiGLU, rope, no biases)."""

    qkv_bias: bool = False
    qk_layernorm: bool = False


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True),
}


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a model, read from config.json itself: no default stands in for a missing field."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        multiple = VOCABULARY_MULTIPLE * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple


def read_spec(directory: Path) -> ModelSpec:
    """The spec of a directory in HF format. Raises ValueError naming field, value and remedy."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"model.hf_path = {directory}: no config.json in it; give a directory in Hugging Face format")
    raw = read_json(path)

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{path}: {key} is missing; it cannot be guessed, add it")
        return raw[key]

    def refuse_unless(key: str, allowed: object) -> None:
        if key in raw and raw[key] != allowed:
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported; only {allowed!r} is")

    if need("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type = {raw['model_type']!r} is not supported; known: {', '.join(FAMILIES)}")
    refuse_unless("hidden_act", "silu")
    refuse_unless("use_sliding_window", False)
    refuse_unless("attention_dropout", 0.0)
    heads, hidden = need("num_attention_heads"), need("hidden_size")
    return ModelSpec(
        model_type=raw["model_type"],
        num_layers=need("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=need("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=need("num_key_value_heads"),
        kv_channels=raw.get("head_dim") or hidden // heads,
        vocab_size=need("vocab_size"),
        max_position_embeddings=need("max_position_embeddings"),
        norm_epsilon=need("rms_norm_eps"),
        rope_theta=_rope_theta(raw, path),
        tied_embeddings=bool(need("tie_word_embeddings")),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        raise ValueError(f"{path}: is not JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is JSON but no object; the file is damaged, fetch it again")
    return value


def _rope_theta(raw: dict[str, Any], path: Path) -> float:
    """From `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4).

    transformers 4 reads a version 5 file as theta = 10000 without a message, so there is no default here.
    """
    parameters = raw.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: neither rope_theta nor rope_parameters.rope_theta is there; add one")
    scaling = parameters or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f'{path}: rope type {kind!r} is not supported; only "default" is')
    return float(theta)


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


class TensorFile:
    """A tensor in a safetensors file, read slice by slice: [a:b], [:, a:b] or [:] give tensors."""

    def __init__(self, handle: Any, name: str) -> None:
        self._slice = handle.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._slice[index]


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
    assert groups * tp_size == spec.num_query_groups, "fewer query groups than ranks: see check_layout"
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


def check_layout(spec: ModelSpec, *, tensor_model_parallel_size: int) -> None:
    """Raises ValueError where tensor parallelism would cut a query group."""
    if spec.num_query_groups % tensor_model_parallel_size:
        raise ValueError(
            f"tensor_model_parallel_size = {tensor_model_parallel_size} does not divide num_key_value_heads = "
            f"{spec.num_query_groups}; give a divisor"
        )


# ---------------------------------------------------------------- reading and writing


class CheckpointReader:
    """The safetensors files of an HF directory, opened on demand."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, Any] = {}
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self._files: dict[str, str] = read_json(index)["weight_map"]
        else:
            self._files = {}
            for path in sorted(directory.glob("*.safetensors")):
                self._files.update(dict.fromkeys(self._open(path.name).keys(), path.name))
        if not self._files:
            raise ValueError(f"{directory}: no *.safetensors in it; give a directory in Hugging Face format")

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def __getitem__(self, name: str) -> TensorFile:
        if name not in self._files:
            raise ValueError(f"{self._directory}: tensor {name} is missing; the checkpoint is not complete")
        return TensorFile(self._open(self._files[name]), name)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self._directory / file
            try:
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: cannot be read ({error}); the checkpoint is not whole") from None
        return self._handles[file]


@torch.no_grad()
def load_weights(model: torch.nn.Module, directory: Path, spec: ModelSpec, *, tp_size: int, tp_rank: int) -> None:
    """Fill this rank's parameters from an HF directory, reading only the slices that it holds."""
    reader = CheckpointReader(directory)
    for name, parameter in global_names(model):
        layout, sources = hf_names(name, spec)
        shard = to_shard(layout, [reader[source] for source in sources], spec, tp_size=tp_size, tp_rank=tp_rank)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{directory}: {', '.join(sources)} give shape {tuple(shard.shape)} for {name}, the model needs "
                f"{tuple(parameter.shape)}; config.json and the weights do not belong together"
            )
        parameter.copy_(shard)


# what a directory in HF format has beside its weights
_COMPANIONS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def write_directory(directory: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], *, companions: Path) -> None:
    """A directory in HF format: these weights, with configuration and tokenizer copied from `companions`.

    Raises ValueError where something is in the way.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: is not empty; give a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for pattern in _COMPANIONS:
        for path in companions.glob(pattern):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copy(path, directory / path.name)


@torch.no_grad()
def export_weights(
    model: torch.nn.Module, spec: ModelSpec, tp_group: torch.distributed.ProcessGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, whole tensor) of this stage's parameters, one at a time; collective over the tensor-parallel group.

    A tied output layer is left out: HF names it once, as the embedding.
    """
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
