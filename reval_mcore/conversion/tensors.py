"""Types and bytes of tensors on their way between formats."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Literal

import torch

DtypeName = Literal["source", "float32", "bfloat16", "float16"]
OnProgress = Callable[[int, str], None]
"""Told (bytes that are done since the last call, name of a tensor among them)."""

_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22  # since Linux 5.14; Python's mmap has no name for it


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


def fault_in(tensor: torch.Tensor) -> None:
    """Bring the pages of a tensor that is a view of a mapped file into memory, all in one go.

    Where they come one by one as the bytes are used, their faults cost more than writing the bytes to another file; and
    a disk reads fastest what it is told of at once. Advice only: a kernel that does not know it goes on as ever.
    """
    if tensor.numel() == 0:
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + span * tensor.itemsize - start
    for advice in (mmap.MADV_WILLNEED, _MADV_POPULATE_READ):
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))


def nothing_to_tell(num_bytes: int, name: str) -> None:
    """An `OnProgress` for callers who do not watch."""
