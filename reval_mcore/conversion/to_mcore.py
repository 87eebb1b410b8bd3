"""A directory in Hugging Face format -> a megatron-core checkpoint that any layout loads.

OUT/weights/        the checkpoint: torch_dist, as megatron-core would write it in one process
OUT/config.json, tokenizer, template, generation_config.json
OUT/manifest.json   a CRC32 of every source tensor, and of every file of the checkpoint
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from reval_mcore.architecture import ModelSpec, read_spec
from reval_mcore.conversion.companions import copy_companions
from reval_mcore.conversion.pipeline import ahead, behind
from reval_mcore.conversion.staging import Staging, staged
from reval_mcore.conversion.tensors import (
    DtypeName,
    OnProgress,
    dtype_name,
    dtype_named,
    fault_in,
    nothing_to_tell,
    own_storage,
    raw_bytes,
)
from reval_mcore.durable import crc32, raise_if_full, write_json
from reval_mcore.mcore.hf_directory import check_weights
from reval_mcore.mcore.hf_mapping import hf_shapes
from reval_mcore.mcore.weight_checkpoint import MANIFEST, WEIGHTS, Chunk, WeightCheckpointWriter, plan_chunks
from reval_mcore.mcore.weight_files import SAFETENSORS_DTYPES, TensorFile, WeightFiles

_FILE_BYTES = 1 << 29  # of the checkpoint, at least; a file is what a conversion that was cut off need not do again
_NUM_AHEAD = 2  # chunks that are read before they are written


def convert_to_mcore(
    hf: Path, out: Path, *, dtype: DtypeName = "source", on_progress: OnProgress = nothing_to_tell
) -> None:
    """Convert; `on_progress` is told of bytes of the checkpoint.

    Holds one parameter of a layer, or some rows of a table, at a time. Raises ValueError that names file and tensor
    where something does not fit, and OSError where a disk is at fault; nothing is published then.
    """
    spec = read_spec(hf)
    reader = check_weights(hf, spec)
    target = _target_dtype(hf, reader, spec, dtype)
    source = {
        "conversion": "hf_to_mcore 2",
        "dtype": dtype_name(target),
        "config_crc32": crc32(hf / "config.json"),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in reader.files()},
    }
    with staged(out, source) as staging:
        crc32s = _write_weights(reader, spec, target, staging, on_progress)
        copy_companions(hf, staging.path, dtype=dtype_name(target))
        write_json(staging.path / MANIFEST, _manifest(reader, spec, target, crc32s, staging))
        staging.publish()


def num_bytes(hf: Path, dtype: DtypeName) -> int:
    """Of the checkpoint that `convert_to_mcore` will write. Raises ValueError as it does."""
    spec = read_spec(hf)
    target = _target_dtype(hf, check_weights(hf, spec), spec, dtype)
    return sum(chunk.num_elements() for chunk in plan_chunks(spec)) * target.itemsize


def _target_dtype(hf: Path, reader: WeightFiles, spec: ModelSpec, wanted: DtypeName) -> torch.dtype:
    """Raises ValueError where the tensors have several types and none is asked for: a checkpoint has one."""
    by_type: dict[str, list[str]] = {}
    for name in hf_shapes(spec):
        by_type.setdefault(reader[name].dtype, []).append(name)
    rarest = min(by_type, key=lambda kind: len(by_type[kind]))
    if len(by_type) > 1 and wanted == "source":
        name, others = by_type[rarest][0], " or ".join(sorted(by_type.keys() - {rarest}))
        raise ValueError(
            f"{hf / reader.file_of(name)}: {name} is of type {rarest}, others are of {others}; give the type to "
            "convert to, for example --dtype bfloat16"
        )
    return dtype_named(wanted, SAFETENSORS_DTYPES[rarest])


def _manifest(
    reader: WeightFiles, spec: ModelSpec, dtype: torch.dtype, crc32s: Mapping[str, int], staging: Staging
) -> dict[str, Any]:
    def source(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        place = {"file": reader.file_of(name), "dtype": reader[name].dtype, "shape": shape}
        return {**place, "crc32": f"{crc32s[name]:08x}"}

    known = {part["file"]: part["file_crc32"] for part in staging.done}
    files = sorted((staging.path / WEIGHTS).iterdir())
    return {
        "format": "reval_mcore.weights",
        "format_version": 1,
        "dtype": dtype_name(dtype),
        "source": {name: source(name, shape) for name, shape in hf_shapes(spec).items()},
        "crc32": {f"{WEIGHTS}/{file.name}": known.get(file.name) or crc32(file) for file in files},
    }


class _Summed(TensorFile):
    """A source tensor that adds the rows asked of it to its CRC32: each once, in order."""

    def __init__(self, tensor: TensorFile, name: str, crc32s: dict[str, int]) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self._tensor, self._name, self._crc32s = tensor, name, crc32s

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows = self._tensor[index]
        fault_in(rows)
        self._crc32s[self._name] = zlib.crc32(raw_bytes(rows), self._crc32s.get(self._name, 0))
        return rows


def _files(spec: ModelSpec, dtype: torch.dtype) -> Iterator[list[Chunk]]:
    """The chunks of each file of the checkpoint."""
    file: list[Chunk] = []
    for chunk in plan_chunks(spec):
        file.append(chunk)
        if sum(each.num_elements() for each in file) * dtype.itemsize >= _FILE_BYTES:
            yield file
            file = []
    if file:
        yield file


@dataclass(frozen=True)
class _Made:
    """A chunk, ready to be written."""

    tensor: torch.Tensor
    crc32s: Mapping[str, int]  # of its source tensors, up to the last row of the chunk


def _made(
    reader: WeightFiles, chunks: Iterable[Chunk], spec: ModelSpec, dtype: torch.dtype, crc32s: Mapping[str, int]
) -> Iterator[_Made]:
    """In order; `crc32s` are those of the rows before."""
    sums = dict(crc32s)
    for chunk in chunks:
        sources = [_Summed(reader[name], name, sums) for name in chunk.hf]
        tensor = own_storage(chunk.tensor(sources, spec).to(dtype))
        yield _Made(tensor, {name: sums[name] for name in chunk.hf})


def _write_weights(
    reader: WeightFiles, spec: ModelSpec, dtype: torch.dtype, staging: Staging, on_progress: OnProgress
) -> dict[str, int]:
    """Write what is not there yet; returns the CRC32 of every source tensor."""
    weights = staging.path / WEIGHTS
    weights.mkdir(exist_ok=True)
    writer = WeightCheckpointWriter(weights, spec, dtype)
    crc32s: dict[str, int] = dict(staging.done[-1]["crc32s"]) if staging.done else {}
    files = list(_files(spec, dtype))
    num_done = len(staging.done)
    for chunks in files[:num_done]:
        on_progress(sum(chunk.num_elements() for chunk in chunks) * dtype.itemsize, chunks[-1].hf[0])
    rest = [chunk for chunks in files[num_done:] for chunk in chunks]
    try:
        with ahead(_made(reader, rest, spec, dtype, crc32s), _NUM_AHEAD) as ready, behind() as do_behind:

            def tensor(chunk: Chunk) -> torch.Tensor:
                made = next(ready)
                crc32s.update(made.crc32s)
                on_progress(made.tensor.nbytes, chunk.hf[0])
                return made.tensor

            for number, chunks in enumerate(files[num_done:], start=num_done):
                results, file_crc32 = writer.write_file(number, chunks, tensor)
                name = results[0].storage_data.relative_path
                note = {
                    "file": name,
                    "file_crc32": file_crc32,
                    "results": list(map(_as_json, results)),
                    "crc32s": dict(crc32s),
                }
                do_behind(functools.partial(staging.add, weights / name, note))
        writer.finish(len(files), [list(map(_from_json, part["results"])) for part in staging.done])
    except RuntimeError:  # torch's writer, which keeps the errno to itself
        raise_if_full(weights)
        raise
    return crc32s


def _as_json(result: WriteResult) -> list[Any]:
    place: _StorageInfo = result.storage_data
    assert result.index.offset is not None
    return [result.index.fqn, list(result.index.offset), place.relative_path, place.offset, place.length]


def _from_json(values: Sequence[Any]) -> WriteResult:
    key, offset, file, start, length = values
    return WriteResult(MetadataIndex(key, torch.Size(offset)), length, _StorageInfo(file, start, length))
