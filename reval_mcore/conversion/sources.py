"""Where the weights of a checkpoint lie, and what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reval_mcore.config import load
from reval_mcore.mcore.weight_checkpoint import find_weights


@dataclass(frozen=True)
class CheckpointSource:
    weights: Path  # a megatron-core checkpoint
    hf: Path  # config.json and tokenizer of the model


def find_checkpoint(directory: Path, hf: Path | None = None) -> CheckpointSource:
    """From what a user names, see `find_weights`; `hf` where config.json and tokenizer are not to be looked for.

    Raises ValueError.
    """
    weights = find_weights(directory)
    place = weights.parent
    if hf is None and (place / "config.json").is_file():
        hf = place
    elif hf is None and (place / "config.toml").is_file():
        hf = load(place / "config.toml").model.hf_path
    if hf is None:
        raise ValueError(
            f"{directory}: no config.json beside the weights; say with --hf DIR where it and the tokenizer are"
        )
    return CheckpointSource(weights, hf)
