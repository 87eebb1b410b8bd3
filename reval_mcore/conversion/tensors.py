"""Types and bytes of tensors on their way between formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

DtypeName = Literal["source", "float32", "bfloat16", "float16"]
OnProgress = Callable[[int, str], None]
"""Told (bytes that are done since the last call, name of a tensor among them)."""


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: DtypeName, source: torch.dtype) -> torch.dtype:
    return source if name == "source" else getattr(torch, name)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host, in row order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, without what else lies in the memory that a view is of; nothing is copied."""
    return torch.frombuffer(raw_bytes(tensor), dtype=tensor.dtype).view(tensor.shape)


def nothing_to_tell(num_bytes: int, name: str) -> None:
    """An `OnProgress` for callers who do not watch."""
