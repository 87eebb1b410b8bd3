"""The weights in a megatron-core checkpoint, part by part: written by one process, or read, without a model in memory.

It is torch's distributed checkpoint format ("torch_dist") with megatron-core's two small files beside it. Tests hold it
against what megatron-core itself writes of the same model, and have megatron-core load it.
"""

from __future__ import annotations

import mmap
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO, RawIOBase
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _create_file_view, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import check_readable, read_json
from reval_mcore.durable import crc32, write_all
from reval_mcore.mcore.checkpoint import load
from reval_mcore.mcore.hf_mapping import (
    CheckpointParameter,
    Source,
    checkpoint_parameters,
    hf_shapes,
    table_rows,
    to_shard,
)

MANIFEST = "manifest.json"
WEIGHTS = "weights"  # where a checkpoint of weights lies in a converted directory, and in a checkpoint of a run
_ROWS_OF_TABLE = 1 << 14  # of an embedding or output layer in one chunk: what a reader holds at a time
# megatron-core saves these of its linear layers; they hold nothing, but a strict load asks for them
_EXTRA_STATES = tuple(
    f"decoder.layers.{name}._extra_state"
    for name in ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
)


# ---------------------------------------------------------------- what is in it


def checkpoint_shape(parameter: CheckpointParameter, spec: ModelSpec) -> tuple[int, ...]:
    """Of one parameter, all of it; a table has the rows that one tensor-parallel rank would have."""
    shapes = hf_shapes(spec)
    rows = sum(shapes[name][0] for name in parameter.hf)
    if parameter.layout == "vocabulary":
        rows = spec.padded_vocab_size(1)
    return (rows, *shapes[parameter.hf[0]][1:])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a parameter, from whole HF tensors or from some rows of a table: what is written at a time."""

    parameter: CheckpointParameter
    hf: tuple[str, ...]
    first_row: int
    num_rows: int
    shape: tuple[int, ...]  # of the parameter

    def location(self, spec: ModelSpec) -> tuple[torch.Size, ChunkStorageMetadata]:
        """(size of the tensor in the checkpoint, this chunk's place in it)."""
        rows = (self.num_rows, *self.shape[1:])
        offset = (self.first_row, *(0 for _ in self.shape[1:]))
        if self.parameter.layer is None:
            return torch.Size(self.shape), ChunkStorageMetadata(torch.Size(offset), torch.Size(rows))
        place = ChunkStorageMetadata(torch.Size((self.parameter.layer, *offset)), torch.Size((1, *rows)))
        return torch.Size((spec.num_layers, *self.shape)), place

    def num_elements(self) -> int:
        return self.num_rows * torch.Size(self.shape[1:]).numel()

    def tensor(self, sources: Sequence[Source], spec: ModelSpec) -> torch.Tensor:
        """From its HF tensors; its storage holds nothing else."""
        match self.parameter.layout:
            case "vocabulary":
                rows = table_rows(sources[0], self.first_row, self.first_row + self.num_rows)
            case "qkv":
                rows = to_shard("qkv", sources, spec, tp_size=1, tp_rank=0)
            case _:
                rows = sources[0][:]
        return rows if self.parameter.layer is None else rows[None]


def plan_chunks(spec: ModelSpec) -> Iterator[Chunk]:
    """Every chunk of a model's checkpoint, in the order of the model."""
    shapes = hf_shapes(spec)
    for parameter in checkpoint_parameters(spec):
        shape = checkpoint_shape(parameter, spec)
        if parameter.layout == "vocabulary":
            cuts = [(parameter.hf, min(_ROWS_OF_TABLE, shape[0] - i)) for i in range(0, shape[0], _ROWS_OF_TABLE)]
        elif parameter.layout == "gate_up":  # apart, as megatron-core writes them
            cuts = [((name,), shapes[name][0]) for name in parameter.hf]
        else:
            cuts = [(parameter.hf, shape[0])]
        first_row = 0
        for hf, num_rows in cuts:
            yield Chunk(parameter, hf, first_row, num_rows, shape)
            first_row += num_rows


# ---------------------------------------------------------------- writing


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Neither the path nor a random name: the same weights give the same files."""
        return None


class _SummedFile(RawIOBase):
    """A new file, with the CRC32 of what is written: summed in a thread of its own, while the disk takes the bytes."""

    def __init__(self, file: FileIO, thread: Executor) -> None:
        super().__init__()
        self.crc32 = 0
        self.num_bytes = 0
        self._file = file
        self._thread = thread

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        following = self._thread.submit(zlib.crc32, data, self.crc32)
        try:
            write_all(self._file, data)
        finally:
            self.crc32 = following.result()
        self.num_bytes += len(data)
        return len(data)


class WeightCheckpointWriter:
    """Writes a checkpoint of weights, file by file; flushing them to the disk is for the caller."""

    def __init__(self, directory: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._directory = directory
        self._spec = spec
        self._properties = TensorProperties(dtype=dtype)

    def write_file(
        self, number: int, chunks: Sequence[Chunk], tensor: Callable[[Chunk], torch.Tensor]
    ) -> tuple[list[WriteResult], int]:
        """File `number` with these chunks; `tensor` is asked for one at a time, in order. Returns where they lie, and
        the CRC32 of the file. Raises OSError."""
        places = [chunk.location(self._spec)[1] for chunk in chunks]
        indices = [
            MetadataIndex(chunk.parameter.key, place.offsets) for chunk, place in zip(chunks, places, strict=True)
        ]
        return self._write(number, zip(indices, map(tensor, chunks), strict=True))

    def _write(self, number: int, items: Iterable[tuple[MetadataIndex, Any]]) -> tuple[list[WriteResult], int]:
        path = self._directory / f"__{number}_0.distcp"
        results = []
        with (
            path.open("wb", buffering=0) as raw,
            ThreadPoolExecutor(1) as thread,
            # torch never looks at its own sum, and the manifest has ours
            serialization.patch("save.compute_crc32", False),  # pyright: ignore[reportAttributeAccessIssue]
        ):
            file = _SummedFile(raw, thread)
            for index, value in items:
                start = file.num_bytes
                torch.save(value, cast(IO[bytes], file))
                place = _StorageInfo(path.name, start, file.num_bytes - start)
                results.append(WriteResult(index, place.length, place))
        return results, file.crc32

    def finish(self, number: int, results: Sequence[Sequence[WriteResult]]) -> None:
        """Complete the checkpoint with file `number`, the last, and what makes one of the files. Raises OSError."""
        names = [
            f"{name}/shard_{i}_{self._spec.num_layers}" for name in _EXTRA_STATES for i in range(self._spec.num_layers)
        ]
        last, _ = self._write(number, [(MetadataIndex(name), [None]) for name in names])
        entries: dict[str, Any] = {}
        for chunk in plan_chunks(self._spec):
            size, place = chunk.location(self._spec)
            entry = entries.setdefault(chunk.parameter.key, TensorStorageMetadata(self._properties, size, []))
            entry.chunks.append(place)
        entries |= {name: BytesStorageMetadata() for name in names}
        torch.save({}, self._directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist"), str(self._directory))
        _Writer(self._directory).finish(Metadata(entries), [*map(list, results), last])


# ---------------------------------------------------------------- reading


def find_weights(directory: Path) -> Path:
    """The checkpoint in what a user names: a converted directory, a run (its latest), one of its checkpoints, or it.

    Raises ValueError where there is none.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: there is no such directory; check the path")
    latest = directory / "checkpoints" / "latest"
    for place in (latest / WEIGHTS, directory / WEIGHTS, directory):
        if (place / ".metadata").is_file():
            return place
    raise ValueError(
        f"{directory}: no checkpoint in it; give a directory that tools.convert_hf_to_mcore made, a run, or one of its "
        "checkpoints"
    )


def _known_crc32s(weights: Path) -> dict[str, int]:
    """By path beside the manifest; empty where there is no manifest: such a checkpoint is taken as it is."""
    path = weights.parent / MANIFEST
    known = read_json(path).get("crc32", {}) if path.is_file() else {}
    return {name: value for name, value in known.items() if name.startswith(f"{WEIGHTS}/")}


def _check_file(file: Path, value: int) -> None:
    """Raises ValueError where a file has another CRC32: torch reads a flipped bit without a word."""
    if not file.is_file() or crc32(file) != value:
        manifest = file.parent.parent / MANIFEST
        raise ValueError(f"{file}: damaged, its CRC32 is not that of {manifest}; convert or fetch it again")


def check_files(weights: Path) -> None:
    """Raises ValueError that names a file that is not what was written, going by the manifest beside the checkpoint."""
    for name, value in _known_crc32s(weights).items():
        _check_file(weights.parent / name, value)


@torch.no_grad()
def load_checkpoint_weights(model: GPTModel, directory: Path, spec: ModelSpec) -> None:
    """Fill this rank's parameters from what a user names, see `find_weights`; collective.

    Raises ValueError where the checkpoint does not fit the spec.
    """
    weights = find_weights(directory)
    check_checkpoint(WeightCheckpoint(weights), spec)
    entries = model.sharded_state_dict()
    # without the extra states: they hold nothing, and a checkpoint has those of the layer spec that wrote it
    template = {name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}
    state = load(weights, template)  # and what else is in the checkpoint of a run
    unknown = model.load_state_dict({name: state[name] for name in template}, strict=False)
    assert all(name.endswith("_extra_state") for name in unknown.missing_keys), unknown.missing_keys
    assert not unknown.unexpected_keys, unknown.unexpected_keys


class WeightCheckpoint:
    """The tensors of a checkpoint, of any layout that wrote it. Keys are megatron-core's.

    A file is held against its CRC32 in the manifest when something in it is first read.
    """

    def __init__(self, directory: Path, *, prefix: str = "") -> None:
        """`prefix` chooses among weights that lie beside each other, such as "reference.". Raises ValueError."""
        self.directory = directory
        self._prefix = prefix
        self._maps: dict[str, mmap.mmap] = {}
        self._crc32s = _known_crc32s(directory)
        path = directory / ".metadata"
        try:
            metadata = FileSystemReader(directory).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); the checkpoint is damaged") from None
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.entries: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self.entries

    def files(self) -> list[Path]:
        """In order of their names. Raises ValueError where one is not there, or ends before what it should hold."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            path = self.directory / name
            if not path.is_file() or path.stat().st_size < end:
                raise ValueError(f"{path}: damaged, it is missing or ends too early; convert or fetch it again")
        return [self.directory / name for name in sorted(ends)]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.entries[self._prefix + key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.entries[self._prefix + key].properties.dtype

    def read(self, key: str, layer: int | None, first_row: int, num_rows: int) -> torch.Tensor:
        """Rows of a tensor, or of its part that is of one layer: a view of the file where they lie in one piece.

        Raises ValueError that names the file that is damaged, or file and tensor where they cannot be read.
        """
        name = self._prefix + key
        entry = self.entries[name]
        sizes, offsets = list(entry.size), [0] * len(entry.size)
        if layer is not None:
            sizes[0], offsets[0] = 1, layer
        axis = 0 if layer is None else 1
        sizes[axis], offsets[axis] = num_rows, first_row
        place = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, entry, [place])
        for item in items:
            self._open(self._places[item.storage_index].relative_path)
        try:
            parts = [self._part(item) for item in items]
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            files = sorted({self._places[item.storage_index].relative_path for item in items})
            raise ValueError(
                f"{self.directory}: {name} cannot be read from {', '.join(files)} ({str(error).splitlines()[0]}); "
                "the checkpoint is damaged"
            ) from None
        if len(parts) == 1 and list(parts[0].shape) == sizes:
            tensor = parts[0]
        else:
            tensor = torch.empty(sizes, dtype=entry.properties.dtype)
            for item, part in zip(items, parts, strict=True):
                _narrowed(tensor, item.dest_offsets, item.lengths).copy_(part)
        return tensor if layer is None else tensor[0]

    def _open(self, file: str) -> None:
        if file in self._maps:
            return
        path = self.directory / file
        if (value := self._crc32s.get(f"{WEIGHTS}/{file}")) is not None:
            _check_file(path, value)
        check_readable(path)
        with path.open("rb") as opened:
            self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def _part(self, item: ReadItem) -> torch.Tensor:
        """torch.load would copy it into fresh memory; so it only tells where the bytes lie."""
        place = self._places[item.storage_index]
        with (self.directory / place.relative_path).open("rb") as file:
            view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            saved = torch.load(view, map_location="meta", weights_only=True)
        storage, dtype = saved.untyped_storage(), saved.dtype
        start, count = place.offset + storage._checkpoint_offset, storage.nbytes() // dtype.itemsize
        flat = torch.frombuffer(self._maps[place.relative_path], dtype=dtype, offset=start, count=count)
        whole = flat.as_strided(saved.shape, saved.stride(), saved.storage_offset())
        return _narrowed(whole, item.storage_offsets, item.lengths)


def _narrowed(tensor: torch.Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def check_checkpoint(checkpoint: WeightCheckpoint, spec: ModelSpec) -> None:
    """Raises ValueError with the tensors that are missing, or have another shape than the spec asks for."""
    problems = []
    for parameter in checkpoint_parameters(spec):
        if parameter.layer not in (None, 0):
            continue
        if parameter.key not in checkpoint:
            problems.append(f"{parameter.key}: is missing")
            continue
        found, rest = checkpoint.shape(parameter.key), checkpoint_shape(parameter, spec)
        expected = rest if parameter.layer is None else (spec.num_layers, *rest)
        fits = found == expected
        if parameter.layout == "vocabulary":  # padded for whatever layout wrote it
            fits = len(found) == 2 and found[0] >= spec.vocab_size and found[1] == spec.hidden_size
        if not fits:
            problems.append(f"{parameter.key}: has shape {list(found)}, config.json asks for {list(expected)}")
    if problems:
        start = f"{checkpoint.directory}: the weights do not fit config.json; give the one of the same model"
        raise ValueError("\n  ".join([start, *problems]))
