"""Two sets of weights, in either format, tensor by tensor under HF names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from reval_mcore.architecture import ModelSpec, read_spec
from reval_mcore.conversion.sources import CheckpointSource
from reval_mcore.conversion.tensors import OnProgress, nothing_to_tell
from reval_mcore.conversion.to_hf import Which, open_checkpoint, read_chunk
from reval_mcore.mcore.hf_directory import check_weights
from reval_mcore.mcore.hf_mapping import FINAL_NORM, checkpoint_parameters, hf_shapes
from reval_mcore.mcore.weight_checkpoint import plan_chunks
from reval_mcore.mcore.weight_files import SAFETENSORS_DTYPES


class Weights(Protocol):
    """Weights of a model, read when they are asked for."""

    spec: ModelSpec
    dtype: torch.dtype  # of the final norm, and nearly always of all

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor), one at a time, in the order of the model."""
        ...


class HFWeights:
    def __init__(self, directory: Path) -> None:
        """Raises ValueError where the directory has no weights that fit its config.json."""
        self.spec = read_spec(directory)
        self._files = check_weights(directory, self.spec)
        self.dtype = SAFETENSORS_DTYPES[self._files["model.norm.weight"].dtype]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for parameter in checkpoint_parameters(self.spec):
            for name in parameter.hf:
                yield name, self._files[name][:]


class CheckpointWeights:
    def __init__(self, source: CheckpointSource, *, which: Which = "policy") -> None:
        """Raises ValueError where the checkpoint has no weights that fit its config.json."""
        self.spec = read_spec(source.hf)
        self._checkpoint = open_checkpoint(source, self.spec, which)
        self.dtype = self._checkpoint.dtype(FINAL_NORM)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for _, chunks in itertools.groupby(plan_chunks(self.spec), key=lambda chunk: chunk.hf):
            parts = [read_chunk(self._checkpoint, chunk, self.spec) for chunk in chunks]
            for name, first in parts[0].items():
                yield name, first if len(parts) == 1 else torch.cat([part[name] for part in parts])


def num_elements(spec: ModelSpec) -> int:
    """Of all HF tensors of a model, a tied table once."""
    return sum(torch.Size(shape).numel() for shape in hf_shapes(spec).values())


@dataclass(frozen=True)
class Difference:
    """Of one tensor."""

    name: str
    says: str
    largest: float  # absolute difference of a value; 0 where types or shapes differ


def differences(
    left: Weights, right: Weights, *, cast: bool = False, on_progress: OnProgress = nothing_to_tell
) -> Iterator[Difference]:
    """Every tensor that is not the same to the last bit; with `cast`, after what is left was cast to the other's type.

    Raises ValueError where the models have other tensors, so that nothing can be compared.
    """
    for (name, one), (other_name, other) in zip(left.tensors(), right.tensors(), strict=False):
        if name != other_name:
            raise ValueError(f"one has {name} where the other has {other_name}: these are different models")
        one = one.to(other.dtype) if cast else one
        if one.shape != other.shape:
            yield Difference(name, f"shape {list(one.shape)} and {list(other.shape)}", 0.0)
        elif one.dtype != other.dtype or not _same_bits(one, other):
            gap = _largest_gap(one, other)
            types = "" if one.dtype == other.dtype else f"{one.dtype} and {other.dtype}, "
            yield Difference(name, f"{types}values differ by up to {gap:.3g}", gap)
        on_progress(other.nbytes, name)


def _largest_gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Piece by piece: in float64 a table would be four times as large."""
    pieces = zip(one.flatten().split(1 << 22), other.flatten().split(1 << 22), strict=True)
    return max(float((left.double() - right.double()).abs().max()) for left, right in pieces)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
