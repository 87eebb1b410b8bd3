"""megatron-core distributed checkpoints: written by all ranks, loadable under another layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding


def with_tensors(sharded_state: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, prefix: str) -> dict[str, Any]:
    """A model's sharded state with other tensors of the same shapes in it, under keys that begin with `prefix`."""
    chosen = {name: sharded_state[name] for name in tensors if name in sharded_state}
    for name, entry in chosen.items():
        entry.data = tensors[name]
    add_prefix_for_sharding(chosen, prefix)
    return chosen


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write into `directory`, which must be empty; collective. Synchronous."""
    dist_checkpointing.save(state, str(directory))


def load(directory: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Read `directory` into tensors laid out like `template`; collective."""
    state = dist_checkpointing.load(template, str(directory))
    assert isinstance(state, dict)
    return state
