"""What a model is, by its config.json: its family, its sizes and switches. Imports no torch.

Everything else asks the spec: the model that is built, the weights that are cut, the plan of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from reval_mcore.config import in_words, read_json

VOCABULARY_MULTIPLE = 128  # rows of embedding and output layer, per tensor-parallel rank


@dataclass(frozen=True)
class Family:
    """What a model family does differently from the Llama-like base (RMSNorm, SwiGLU, rope, no biases)."""

    qkv_bias: bool = False
    qk_layernorm: bool = False
    has_sliding_window: bool = False  # sliding_window bounds what every layer sees
    only: Mapping[str, object] = field(default_factory=dict)  # fields of config.json with one supported value
    ignored: tuple[str, ...] = ()  # and those that say nothing beside these


_QWEN_WINDOW = ("sliding_window", "max_window_layers")  # in force by use_sliding_window only

FAMILIES: dict[str, Family] = {
    # Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen
    "qwen2": Family(qkv_bias=True, only={"use_sliding_window": False, "use_mrope": False}, ignored=_QWEN_WINDOW),
    "qwen3": Family(
        qk_layernorm=True, only={"use_sliding_window": False, "attention_bias": False}, ignored=_QWEN_WINDOW
    ),
    # Llama 2, 3, 3.1 and later, DeepSeek-R1-Distill-Llama
    "llama": Family(only={"attention_bias": False, "mlp_bias": False}, ignored=("pretraining_tp",)),
    "mistral": Family(has_sliding_window=True),
}

# what a config.json may say besides, and what it then has to say
_ONLY: Mapping[str, object] = {"hidden_act": "silu", "attention_dropout": 0.0}
_READ = (
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ),
    *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "quantization_config"),
)
_IGNORED = (  # of the tokenizer, of generation, of how to store or initialise; nothing that a forward pass asks for
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "initializer_range", "dtype"),
    *("torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id", "is_decoder", "return_dict"),
    *("output_attentions", "output_hidden_states", "max_length", "do_sample", "temperature", "top_p", "top_k"),
    *("unsloth_fixed", "unsloth_version"),
)
_ROPE_KEYS = ("rope_theta", "rope_type", "type")
# megatron-core 0.16.1 takes the factor alone (rotary_pos_embedding.py, _apply_scaling)
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. Scaling is Llama 3's, and none where the factor is 1."""

    theta: float
    scaling_factor: float = 1.0


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
    max_position_embeddings: int  # or less: as far as attention without a sliding window is the same
    norm_epsilon: float
    rope: Rope
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
    """The spec in a config.json, wherever it lies and whatever it is called. Raises ValueError like `read_spec`.

    Null is as good as absent. A field that is not known is refused: it may change what the model computes.
    """
    fields = _Fields(path)
    family = _check_fields(fields)
    heads, groups, hidden = map(fields.size, ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads % groups:
        fields.refuse(
            "num_key_value_heads", f"does not divide num_attention_heads = {heads}; mend the one that is wrong"
        )
    has_head_dim = "head_dim" in fields.raw
    if not has_head_dim and hidden % heads:
        fields.refuse("num_attention_heads", f"does not divide hidden_size = {hidden}; mend one, or add head_dim")
    epsilon, tied = fields.need("rms_norm_eps"), fields.need("tie_word_embeddings")
    if not isinstance(epsilon, float) or epsilon <= 0:
        fields.refuse("rms_norm_eps", "give a number > 0, such as 1e-06")
    if not isinstance(tied, bool):
        fields.refuse("tie_word_embeddings", "give true or false")
    positions = fields.size("max_position_embeddings")
    if family.has_sliding_window and "sliding_window" in fields.raw:
        positions = min(positions, fields.size("sliding_window"))
    return ModelSpec(
        model_type=fields.raw["model_type"],
        num_layers=fields.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=fields.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=fields.size("head_dim") if has_head_dim else hidden // heads,
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=positions,
        norm_epsilon=epsilon,
        rope=_rope(fields),
        tied_embeddings=tied,
    )


class _Fields:
    """A config.json, less its nulls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = {key: value for key, value in read_json(path).items() if value is not None}

    def refuse(self, key: str, remedy: str) -> NoReturn:
        raise ValueError(f"{self.path}: {key} = {self.raw[key]!r}: {remedy}")

    def need(self, key: str) -> Any:
        if key not in self.raw:
            raise ValueError(f"{self.path}: {key} is missing; it cannot be guessed, add it")
        return self.raw[key]

    def size(self, key: str) -> int:
        value = self.need(key)
        if type(value) is not int or value <= 0:
            self.refuse(key, "give a whole number > 0")
        return value


def _check_fields(fields: _Fields) -> Family:
    """The family, where it is known and every field is understood."""
    if fields.need("model_type") not in tuple(FAMILIES):
        fields.refuse("model_type", f"is not supported; give a model of type {' or '.join(FAMILIES)}")
    raw, family = fields.raw, FAMILIES[fields.raw["model_type"]]
    only = {**_ONLY, **family.only}
    for key, value in only.items():
        if raw.get(key, value) != value:
            fields.refuse(key, f"is not supported; give a model with {value!r}")
    if raw.get("quantization_config"):
        raise ValueError(
            f"{fields.path}: quantization_config: quantized weights cannot be trained; give the model without"
        )
    if "architectures" in raw and not any(str(name).endswith("ForCausalLM") for name in raw["architectures"]):
        fields.refuse("architectures", "is no language model; give one that is ...ForCausalLM")
    if any(kind != "full_attention" for kind in raw.get("layer_types", [])):
        fields.refuse("layer_types", "is not supported; give a model of full_attention layers only")
    known = {*_READ, *_IGNORED, *only, *family.ignored}
    known |= {"sliding_window"} if family.has_sliding_window else set()
    for key in raw:
        if key not in known:
            fields.refuse(
                key,
                "is not understood, and may change what the model computes; if you know that it does not, remove it",
            )
    return family


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


def _rope(fields: _Fields) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4), or both.

    transformers 4 reads a version 5 file as theta = 10000 without a message, so there is no default here.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.raw.get(key, {}), dict):
            fields.refuse(key, "is no object; the file is damaged, fetch it again")
    theta, old, new = (fields.raw.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters"))
    if not new:
        return _rope_form(fields, {**(old or {}), "rope_theta": theta})
    rope = _rope_form(fields, {"rope_theta": theta, **new})
    if theta not in (None, rope.theta) or (old and _rope_form(fields, {"rope_theta": rope.theta, **old}) != rope):
        raise ValueError(
            f"{fields.path}: rope_parameters = {new!r} contradicts rope_theta = {theta!r} with rope_scaling = {old!r}; "
            "remove what is wrong"
        )
    return rope


def _rope_form(fields: _Fields, values: Mapping[str, Any]) -> Rope:
    """One of the two forms, with its theta in it."""
    theta, kind = values.get("rope_theta"), values.get("rope_type", values.get("type", "default"))
    if theta is None:
        raise ValueError(
            f"{fields.path}: neither rope_theta nor rope_parameters.rope_theta is there; add one (models from before "
            "the field, such as Llama 2, have 10000.0)"
        )
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{fields.path}: rope_theta = {theta!r}: give a number > 0")
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"{fields.path}: rope_type = {kind!r}: is not supported; give a model with 'default' or 'llama3'"
        )
    scaling = {key: value for key, value in values.items() if key not in _ROPE_KEYS and value is not None}
    if scaling.get("partial_rotary_factor") == 1.0:
        del scaling["partial_rotary_factor"]
    factor = scaling.pop("factor", None) if kind == "llama3" else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise ValueError(f"{fields.path}: factor = {factor!r} of rope_type = {kind!r}: give a number >= 1")
    fixed = _LLAMA3_FIXED if kind == "llama3" else {}
    for key in {*fixed, *scaling}:
        if scaling.get(key) != fixed.get(key):
            wanted = f"give a model with {fixed[key]!r}" if key in fixed else "remove it if it says nothing"
            raise ValueError(
                f"{fields.path}: {key} = {scaling.get(key)!r} of rope_type = {kind!r}: is not supported; {wanted}"
            )
    return Rope(float(theta), float(factor))


def in_both_forms(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read right, from one that `read_config_json` accepts.

    Each version writes its own form only, and version 4 takes the other's for theta = 10000 without a message.
    """
    new = dict(raw.get("rope_parameters") or {})
    old = {key: value for key, value in (raw.get("rope_scaling") or {}).items() if value is not None}
    theta = new.get("rope_theta", raw.get("rope_theta"))
    scaling = {key: value for key, value in (new or old).items() if key != "rope_theta"}
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    is_scaled = scaling["rope_type"] != "default"
    return {
        **raw,
        "rope_theta": theta,
        "rope_scaling": scaling if is_scaled else None,
        "rope_parameters": {"rope_theta": theta, **scaling},
    }
