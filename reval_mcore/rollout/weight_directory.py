"""Weights on disk for servers to load: RUN/weights/v000012/, in Hugging Face format, there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from reval_mcore.durable import crc32, fsync, write_json

MANIFEST = "manifest.json"
_MAX_FILE_BYTES = 4 << 30
# what a directory in HF format has beside its weights
_COMPANIONS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def publish_weights(
    directory: Path,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    companions: Path,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> int:
    """Write a directory of these weights, configuration and tokenizer copied from `companions`; returns their bytes.

    No more than `max_file_bytes` are held in host memory. The manifest has size and CRC32 of every file with weights.
    Raises OSError, and leaves nothing then.
    """
    writing = directory.with_name(f".writing_{directory.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        num_bytes = _write(writing, named_tensors, max_file_bytes)
        for path in (path for pattern in _COMPANIONS for path in sorted(companions.glob(pattern))):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copy(path, writing / path.name)
        for path in (*writing.iterdir(), writing):
            fsync(path)
        writing.rename(directory)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    fsync(directory.parent)
    return num_bytes


def _write(writing: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], max_file_bytes: int) -> int:
    pending: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, int]] = {}

    def flush() -> None:
        name = f"model-{len(files) + 1:05d}.safetensors"  # transformers wants "-of-N"; servers go by the index
        save_file(pending, writing / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        files[name] = {"bytes": (writing / name).stat().st_size, "crc32": crc32(writing / name)}
        pending.clear()

    total = waiting = 0
    for name, tensor in named_tensors:
        if pending and waiting + tensor.nbytes > max_file_bytes:
            flush()
            waiting = 0
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        waiting += tensor.nbytes
        total += tensor.nbytes
    flush()
    write_json(writing / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(writing / MANIFEST, {"files": files})
    return total


def remove_weights(directory: Path) -> None:
    """Out of sight at once, so that a half-removed one is never taken for one."""
    hidden = directory.with_name(f".removing_{directory.name}")
    directory.rename(hidden)
    shutil.rmtree(hidden)


def sweep_weights(parent: Path, *, keep: Collection[Path]) -> None:
    """Remove all versions but those, and what a process that was killed left half-written or half-removed."""
    for path in parent.glob("v*"):
        if path not in keep:
            remove_weights(path)
    for pattern in (".writing_v*", ".removing_v*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)
