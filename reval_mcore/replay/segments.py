"""The shards that have live rows: whose rows, under which ids, and their arrays, from memory or read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reval_mcore.replay.journal import Admit
from reval_mcore.replay.loading import GONE, IndexedShard, LoadedShard, ShardCache, read_index, read_shard
from reval_mcore.replay.shards import CorruptShardError


@dataclass(frozen=True, slots=True)
class Segment:
    """A shard with at least one live row: row admit.first_row + i is place i of it, less what was skipped."""

    admit: Admit
    trajectory_ids: tuple[str, ...]

    def ids_between(self, first_row: int, end_row: int) -> tuple[str, ...]:
        """Of its rows in [first_row, end_row)."""
        first, end = (min(max(row - self.admit.first_row, 0), self.admit.num_rows) for row in (first_row, end_row))
        return self.trajectory_ids[first:end]


class Segments:
    """Oldest first. `directory` holds the shards; at most `max_memory_bytes` of them stay in memory."""

    def __init__(self, directory: Path, max_memory_bytes: int) -> None:
        self._directory = directory
        self._cache = ShardCache(max_memory_bytes)
        self.clear()

    def clear(self) -> None:
        """Forget all; what is in memory stays there, in case the same shards are added again."""
        self._segments: list[Segment] = []
        self._live_ids: set[str] = set()

    def __contains__(self, trajectory_id: str) -> bool:
        """Whether a live row has this id."""
        return trajectory_id in self._live_ids

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self._cache.num_bytes

    def add(self, admit: Admit, trajectory_ids: tuple[str, ...], first_live_row: int) -> None:
        segment = Segment(admit, trajectory_ids)
        self._segments.append(segment)
        self._live_ids.update(segment.ids_between(first_live_row, admit.end_row))

    def keep_in_memory(self, shard: LoadedShard) -> None:
        self._cache.put(shard)

    def drop_between(self, first_row: int, end_row: int) -> None:
        """The oldest rows, [first_row, end_row), are live no more."""
        for segment in self._segments:
            if segment.admit.first_row >= end_row:
                break
            self._live_ids.difference_update(segment.ids_between(first_row, end_row))
            if segment.admit.end_row <= end_row:
                self._cache.drop(segment.admit.shard)
        self._segments = [segment for segment in self._segments if segment.admit.end_row > end_row]

    def remove(self, segment: Segment, first_live_row: int) -> None:
        self._segments.remove(segment)
        self._live_ids.difference_update(segment.ids_between(first_live_row, segment.admit.end_row))

    def owners(self, rows: np.ndarray, members: np.ndarray) -> list[tuple[Segment, list[int], list[int]]]:
        """Each shard that has some of the live rows[members], with their places in it, and those members."""
        first_rows = np.array([segment.admit.first_row for segment in self._segments], dtype=np.int64)
        owners = np.searchsorted(first_rows, rows[members], side="right") - 1
        places = rows[members] - first_rows[owners]
        found: dict[int, tuple[Segment, list[int], list[int]]] = {}
        for owner, place, member in zip(owners.tolist(), places.tolist(), members.tolist(), strict=True):
            if owner not in found:
                found[owner] = (self._segments[owner], [], [])
            found[owner][1].append(place)
            found[owner][2].append(member)
        return [found[owner] for owner in sorted(found)]

    def is_in_memory(self, segment: Segment) -> bool:
        return segment.admit.shard in self._cache

    def load(self, segment: Segment) -> LoadedShard:
        """From memory or, verified again, from the disk.

        Raises CorruptShardError where the file is not what was admitted, or gone; OSError where it cannot be read.
        """
        admit = segment.admit
        shard = self._cache.get(admit.shard)
        if shard is not None:
            return shard
        try:
            shard = read_shard(self._directory / admit.shard)
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise CorruptShardError(str(error)) from error
        if shard.file_crc32 != admit.file_crc32:
            raise CorruptShardError(f"CRC32 {shard.file_crc32:08x}, admitted with {admit.file_crc32:08x}")
        shard = shard.without(admit.skipped)
        self._cache.put(shard)
        return shard

    def index_of(self, admit: Admit) -> IndexedShard:
        """What the index keeps of a shard that the journal says is live.

        Raises ValueError where it is not there at all, and CorruptShardError where it is damaged.
        """
        shard = self._cache.get(admit.shard)
        if shard is not None and shard.file_crc32 == admit.file_crc32:
            return IndexedShard.of(shard)
        path = self._directory / admit.shard
        try:
            indexed = read_index(path).without(admit.skipped)
        except FileNotFoundError:
            raise ValueError(
                f"{path}: the journal says that it is live, and it is not there; check that the whole replay "
                f"directory is mounted, and restore the file or start with an empty directory"
            ) from None
        if len(indexed.rows) != admit.num_rows:
            raise CorruptShardError(f"{len(indexed.rows)} rows, admitted with {admit.num_rows}")
        return indexed
