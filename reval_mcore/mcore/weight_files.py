"""The safetensors files of a directory in Hugging Face format, read tensor by tensor and slice by slice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from reval_mcore.config import check_readable, read_json

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that can be trained, by their names in a safetensors file."""


class TensorFile:
    """A tensor in a safetensors file, read slice by slice: [a:b], [:, a:b] or [:] give tensors."""

    def __init__(self, handle: Any, name: str) -> None:
        self._slice = handle.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        self.dtype: str = self._slice.get_dtype()  # as safetensors names it: "F32", "BF16", ...

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._slice[index]


class WeightFiles:
    """The safetensors files of an HF directory: those that transformers would take. A mapping of its tensors."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, Any] = {}
        index = directory / "model.safetensors.index.json"
        if (directory / "model.safetensors").exists():
            files = ["model.safetensors"]
        elif index.exists():
            files = _files_of(index)
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{directory}: no *.safetensors in it; give a directory with weights in that format")
        self._files: dict[str, str] = {}
        for file in files:
            self._files.update(dict.fromkeys(self._open(file).keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> TensorFile:
        return TensorFile(self._open(self._files[name]), name)

    def file_of(self, name: str) -> str:
        """Name of the file that a tensor is in."""
        return self._files[name]

    def files(self) -> list[Path]:
        """In order of their names."""
        return [self._directory / file for file in sorted(set(self._files.values()))]

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self._directory / file
            check_readable(path)
            try:
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError):  # in words about headers; the size tells more
                size = path.stat().st_size
                raise ValueError(f"{path}: is no whole safetensors file ({size:,} bytes); fetch it again") from None
        return self._handles[file]


def _files_of(index: Path) -> list[str]:
    """Names of the files that an index speaks of. Raises ValueError where some are missing."""
    tensors = read_json(index).get("weight_map")
    if not isinstance(tensors, dict) or not all(isinstance(file, str) for file in tensors.values()):
        raise ValueError(f"{index}: no weight_map in it; the file is damaged, fetch it again")
    files = sorted(set(tensors.values()))
    absent = [file for file in files if not (index.parent / file).exists()]
    if absent:
        missing = f"{len(absent)} of {len(files)} files missing"
        raise ValueError(f"{index}: names {absent[0]}, which is not there ({missing}); fetch the model again")
    return files
