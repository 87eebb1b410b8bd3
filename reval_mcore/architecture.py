"""What a model is, by its config.json: its family, its sizes and switches. Imports no torch.

Everything else asks the spec: the model that is built, the weights that are cut, the plan of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from reval_mcore.config import in_words, read_json

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
    return read_config_json(_config_json(directory))


def read_config_json(path: Path) -> ModelSpec:
    """The spec in a config.json, wherever it lies and whatever it is called. Raises ValueError like `read_spec`."""
    raw = read_json(path)

    def refuse(key: str, remedy: str) -> NoReturn:
        raise ValueError(f"{path}: {key} = {raw[key]!r}: {remedy}")

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{path}: {key} is missing; it cannot be guessed, add it")
        return raw[key]

    def need_size(key: str) -> int:
        value = need(key)
        if type(value) is not int or value <= 0:
            refuse(key, "give a whole number > 0")
        return value

    if need("model_type") not in tuple(FAMILIES):
        refuse("model_type", f"is not supported; give a model of type {' or '.join(FAMILIES)}")
    for key, only in (("hidden_act", "silu"), ("use_sliding_window", False), ("attention_dropout", 0.0)):
        if raw.get(key, only) != only:
            refuse(key, f"is not supported; give a model with {only!r}")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: quantized weights cannot be trained; give the model without")
    heads, groups, hidden = (need_size(x) for x in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads % groups:
        refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}; mend the one that is wrong")
    if raw.get("head_dim") is None and hidden % heads:
        refuse("num_attention_heads", f"does not divide hidden_size = {hidden}; mend one, or add head_dim")
    epsilon, tied = need("rms_norm_eps"), need("tie_word_embeddings")
    if not isinstance(epsilon, float) or epsilon <= 0:
        refuse("rms_norm_eps", "give a number > 0, such as 1e-06")
    if not isinstance(tied, bool):
        refuse("tie_word_embeddings", "give true or false")
    return ModelSpec(
        model_type=raw["model_type"],
        num_layers=need_size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=need_size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hidden // heads if raw.get("head_dim") is None else need_size("head_dim"),
        vocab_size=need_size("vocab_size"),
        max_position_embeddings=need_size("max_position_embeddings"),
        norm_epsilon=epsilon,
        rope_theta=_rope_theta(raw, path),
        tied_embeddings=tied,
    )


def _config_json(directory: Path) -> Path:
    """Its path. Raises ValueError where there is none."""
    try:
        names = {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        raise ValueError(
            f"model.hf_path = {directory}: there is no such directory; check the path, or get the model with "
            "hf download NAME --local-dir DIR"
        ) from None
    except NotADirectoryError:
        raise ValueError(f"model.hf_path = {directory}: is no directory; give the one that config.json is in") from None
    except OSError as error:
        raise ValueError(f"model.hf_path = {in_words(error)}") from None
    if "config.json" not in names:
        raise ValueError(f"model.hf_path = {directory}: no config.json in it; give a directory in Hugging Face format")
    return directory / "config.json"


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """From `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4).

    transformers 4 reads a version 5 file as theta = 10000 without a message, so there is no default here.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} = {raw[key]!r}: is no object; the file is damaged, fetch it again")
    parameters = raw.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: neither rope_theta nor rope_parameters.rope_theta is there; add one")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{path}: rope_theta = {theta!r}: give a number > 0")
    scaling = parameters or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type = {kind!r}: is not supported; give a model with 'default'")
    return float(theta)
