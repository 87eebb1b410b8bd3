"""The policy, or the reference, of a megatron-core checkpoint -> a directory in Hugging Face format."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reval_mcore.architecture import ModelSpec, read_spec
from reval_mcore.conversion.companions import copy_companions
from reval_mcore.conversion.pipeline import ahead, behind
from reval_mcore.conversion.sources import CheckpointSource
from reval_mcore.conversion.staging import staged
from reval_mcore.conversion.tensors import (
    DtypeName,
    OnProgress,
    dtype_name,
    dtype_named,
    fault_in,
    nothing_to_tell,
    raw_bytes,
)
from reval_mcore.durable import crc32, not_written, write_all
from reval_mcore.mcore.hf_mapping import FINAL_NORM, from_shards, hf_shapes
from reval_mcore.mcore.weight_checkpoint import Chunk, WeightCheckpoint, check_checkpoint, plan_chunks
from reval_mcore.mcore.weight_files import SAFETENSORS_DTYPES

Which = Literal["policy", "reference"]
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 1 << 30
_NUM_AHEAD = 4  # chunks that are read before they are written: views of the checkpoint, nearly all


@dataclass(frozen=True)
class _Shard:
    """A safetensors file to write."""

    name: str
    chunks: tuple[Chunk, ...]
    num_bytes: int

    def tensors(self) -> list[str]:
        """In their order in the file."""
        return list(dict.fromkeys(name for chunk in self.chunks for name in chunk.hf))


def convert_to_hf(
    source: CheckpointSource,
    out: Path,
    *,
    which: Which = "policy",
    dtype: DtypeName = "source",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress = nothing_to_tell,
) -> None:
    """Convert; `on_progress` is told of bytes of the result.

    Holds one parameter of a layer, or some rows of a table, at a time. Raises ValueError that names
    file and tensor where something does not fit, and OSError where a disk is at fault; nothing is published then.
    """
    spec = read_spec(source.hf)
    checkpoint = open_checkpoint(source, spec, which)
    target = dtype_named(dtype, checkpoint.dtype(FINAL_NORM))
    shards = _plan(spec, target, max_shard_bytes)
    made_from = {
        "conversion": "mcore_to_hf 3",
        "which": which,
        "dtype": dtype_name(target),
        "config_crc32": crc32(source.hf / "config.json"),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoint.files()},
        "shards": [shard.name for shard in shards],
    }
    with staged(out, made_from) as staging:
        done = {part["file"] for part in staging.done}
        rest = [shard for shard in shards if shard.name not in done]
        for shard in shards:
            if shard.name in done:
                on_progress(shard.num_bytes, shard.tensors()[-1])
        chunks = (chunk for shard in rest for chunk in shard.chunks)
        with ahead(_read(checkpoint, chunks, spec), _NUM_AHEAD) as ready, behind() as do_behind:
            for shard in rest:
                path = staging.path / shard.name
                _write_shard(path, shard, itertools.islice(ready, len(shard.chunks)), spec, target, on_progress)
                do_behind(functools.partial(staging.add, path, {"file": shard.name}))
        copy_companions(source.hf, staging.path, dtype=dtype_name(target))
        if len(shards) > 1:
            (staging.path / _INDEX).write_text(_index(shards), encoding="utf-8")
        staging.publish()


def open_checkpoint(source: CheckpointSource, spec: ModelSpec, which: Which) -> WeightCheckpoint:
    """Raises ValueError where it does not fit the spec."""
    checkpoint = WeightCheckpoint(source.weights, prefix="" if which == "policy" else "reference.")
    check_checkpoint(checkpoint, spec)
    return checkpoint


def num_bytes(source: CheckpointSource, dtype: DtypeName) -> int:
    """Of the weights that `convert_to_hf` will write. Raises ValueError as it does."""
    spec = read_spec(source.hf)
    target = dtype_named(dtype, open_checkpoint(source, spec, "policy").dtype(FINAL_NORM))
    return sum(torch.Size(shape).numel() for shape in hf_shapes(spec).values()) * target.itemsize


def _plan(spec: ModelSpec, dtype: torch.dtype, max_shard_bytes: int) -> list[_Shard]:
    shapes = hf_shapes(spec)
    groups: list[list[Chunk]] = [[]]
    sizes = [0]
    for parameter, chunks in itertools.groupby(plan_chunks(spec), key=lambda chunk: chunk.parameter):
        num_bytes = sum(torch.Size(shapes[name]).numel() for name in parameter.hf) * dtype.itemsize
        if groups[-1] and sizes[-1] + num_bytes > max_shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1] += chunks
        sizes[-1] += num_bytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return [_Shard(name, tuple(group), size) for name, group, size in zip(names, groups, sizes, strict=True)]


def read_chunk(checkpoint: WeightCheckpoint, chunk: Chunk, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Of its HF tensors, the rows that are in a chunk. Raises ValueError where they cannot be read."""
    num_rows = chunk.num_rows
    if chunk.parameter.layout == "vocabulary":  # without the padding
        num_rows = max(0, min(num_rows, spec.vocab_size - chunk.first_row))
    rows = checkpoint.read(chunk.parameter.key, chunk.parameter.layer, chunk.first_row, num_rows)
    parts = from_shards("qkv", [rows], spec) if chunk.parameter.layout == "qkv" else [rows]
    return dict(zip(chunk.hf, parts, strict=True))


def _read(checkpoint: WeightCheckpoint, chunks: Iterable[Chunk], spec: ModelSpec) -> Iterator[dict[str, torch.Tensor]]:
    for chunk in chunks:
        tensors = read_chunk(checkpoint, chunk, spec)
        for tensor in tensors.values():
            fault_in(tensor)
        yield tensors


def _write_shard(
    path: Path,
    shard: _Shard,
    chunks: Iterable[dict[str, torch.Tensor]],
    spec: ModelSpec,
    dtype: torch.dtype,
    on_progress: OnProgress,
) -> None:
    """In safetensors' format: length of a header (8 bytes), header, tensors without a gap. Its own writer wants all of
    them in memory."""
    with path.open("wb", buffering=0) as file:
        try:
            write_all(file, _header(shard, spec, dtype))
            for tensors in chunks:
                for name, rows in tensors.items():
                    data = raw_bytes(rows.to(dtype))
                    write_all(file, data)
                    on_progress(len(data), name)
        except OSError as error:
            raise not_written(path, error) from error


def _header(shard: _Shard, spec: ModelSpec, dtype: torch.dtype) -> bytes:
    shapes = hf_shapes(spec)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in shard.tensors():
        start, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _index(shards: list[_Shard]) -> str:
    files = {name: shard.name for shard in shards for name in shard.tensors()}
    total = sum(shard.num_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n"
