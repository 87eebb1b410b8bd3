"""The weights in a megatron-core checkpoint, part by part: written by one process, or read, without a model in memory.

It is torch's distributed checkpoint format ("torch_dist") with megatron-core's two small files beside it. Tests hold it
against what megatron-core itself writes of the same model, and have megatron-core load it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import read_json
from reval_mcore.durable import crc32
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
        """From its HF tensors."""
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


class _Resolver(DefaultSavePlanner):
    """Makes what an item stands for when its turn comes."""

    def __init__(self, tensors: Mapping[MetadataIndex, Callable[[], torch.Tensor]]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        return self._tensors[write_item.index]()


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Neither the path nor a random name: the same weights give the same files."""
        return None


class WeightCheckpointWriter:
    """Writes a checkpoint of weights, file by file, each fsynced."""

    def __init__(self, directory: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._directory = directory
        self._spec = spec
        self._properties = TensorProperties(dtype=dtype)
        self._writer = _Writer(directory, single_file_per_rank=True, sync_files=True, thread_count=1)

    def write_file(
        self, number: int, chunks: Sequence[Chunk], tensor: Callable[[Chunk], torch.Tensor]
    ) -> list[WriteResult]:
        """File `number` with these chunks; `tensor` is asked for one at a time, in order. Raises OSError."""
        items, tensors = [], {}
        for chunk in chunks:
            size, place = chunk.location(self._spec)
            index = MetadataIndex(chunk.parameter.key, place.offsets)
            items.append(
                WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(place, self._properties, size))
            )
            tensors[index] = lambda chunk=chunk: tensor(chunk)
        return self._write(number, items, tensors)

    def _write(
        self, number: int, items: list[WriteItem], tensors: Mapping[MetadataIndex, Callable[[], torch.Tensor]]
    ) -> list[WriteResult]:
        plan = SavePlan(items, storage_data=_StoragePrefix(f"__{number}_"))
        return self._writer.write_data(plan, _Resolver(tensors)).wait()

    def finish(self, number: int, results: Sequence[Sequence[WriteResult]]) -> None:
        """Complete the checkpoint with file `number`, the last, and what makes one of the files. Raises OSError."""
        names = [
            f"{name}/shard_{i}_{self._spec.num_layers}" for name in _EXTRA_STATES for i in range(self._spec.num_layers)
        ]
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in names]
        last = self._write(number, items, {})
        entries: dict[str, Any] = {}
        for chunk in plan_chunks(self._spec):
            size, place = chunk.location(self._spec)
            entry = entries.setdefault(chunk.parameter.key, TensorStorageMetadata(self._properties, size, []))
            entry.chunks.append(place)
        entries |= {name: BytesStorageMetadata() for name in names}
        torch.save({}, self._directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist"), str(self._directory))
        self._writer.finish(Metadata(entries), [*map(list, results), last])


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


def check_files(weights: Path) -> None:
    """Raises ValueError that names the files that are not what was written: their CRC32s are in the manifest beside
    the checkpoint. torch reads a flipped bit without a word. A checkpoint without a manifest is taken as it is."""
    path = weights.parent / MANIFEST
    if not path.is_file():
        return
    known = read_json(path).get("crc32", {})
    for name, value in known.items():
        if not name.startswith(f"{WEIGHTS}/"):
            continue
        file = weights.parent / name
        if not file.is_file() or crc32(file) != value:
            raise ValueError(f"{file}: damaged, its CRC32 is not that of {path}; convert or fetch it again")


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


class _Target(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._tensor
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was written in place."""


class WeightCheckpoint:
    """The tensors of a checkpoint, of any layout that wrote it. Keys are megatron-core's."""

    def __init__(self, directory: Path, *, prefix: str = "") -> None:
        """`prefix` chooses among weights that lie beside each other, such as "reference.". Raises ValueError."""
        self.directory = directory
        self._prefix = prefix
        self._reader = FileSystemReader(directory)
        path = directory / ".metadata"
        try:
            metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); the checkpoint is damaged") from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.entries: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self.entries

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.entries[self._prefix + key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.entries[self._prefix + key].properties.dtype

    def read(self, key: str, layer: int | None, rows: int | None = None) -> torch.Tensor:
        """All of a tensor, or its part that is of one layer; the first `rows` rows where that is given.

        Raises ValueError that names file and tensor where it cannot be read.
        """
        name = self._prefix + key
        entry = self.entries[name]
        sizes, offsets = list(entry.size), [0] * len(entry.size)
        if layer is not None:
            sizes[0], offsets[0] = 1, layer
        if rows is not None:
            sizes[0 if layer is None else 1] = rows
        tensor = torch.empty(sizes, dtype=entry.properties.dtype)
        place = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, entry, [place])
        files = sorted({self._reader.storage_data[item.storage_index].relative_path for item in items})
        try:
            self._reader.read_data(LoadPlan(items), _Target(tensor)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.directory}: {name} cannot be read from {', '.join(files)} ({str(error).splitlines()[0]}); "
                "the checkpoint is damaged"
            ) from None
        return tensor if layer is None else tensor[0]


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
