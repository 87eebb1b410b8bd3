"""The shards that have live rows: which rows, and their arrays, from memory or read again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from reval_mcore.replay.journal import Admit
from reval_mcore.replay.loading import GONE, IndexedShard, LoadedShard, ShardCache, read_index, read_shard
from reval_mcore.replay.shards import CorruptShardError


class Segments:
    """Admissions with a live row, oldest first: row first_row + i is place i of the shard, less what was skipped.

    `directory` holds the shards; at most `max_memory_bytes` of them stay in memory.
    """

    def __init__(self, directory: Path, max_memory_bytes: int) -> None:
        self._directory = directory
        self._cache = ShardCache(max_memory_bytes)
        self.clear()

    def clear(self) -> None:
        """Forget all; what is in memory stays there, in case the same shards are added again."""
        self._segments: list[Admit] = []

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self._cache.num_bytes

    def add(self, segment: Admit) -> None:
        self._segments.append(segment)

    def keep_in_memory(self, shard: LoadedShard) -> None:
        self._cache.put(shard)

    def drop_below(self, first_live_row: int) -> None:
        """Rows below it are live no more."""
        for segment in self._segments:
            if segment.end_row <= first_live_row:
                self._cache.drop(segment.shard)
        self._segments = [segment for segment in self._segments if segment.end_row > first_live_row]

    def remove(self, segment: Admit) -> None:
        self._segments.remove(segment)

    def owners(self, rows: np.ndarray, members: np.ndarray) -> list[tuple[Admit, list[int], list[int]]]:
        """Each shard that has some of the live rows[members], with their places in it, and those members."""
        first_rows = np.array([segment.first_row for segment in self._segments], dtype=np.int64)
        owners = np.searchsorted(first_rows, rows[members], side="right") - 1
        places = rows[members] - first_rows[owners]
        found: dict[int, tuple[Admit, list[int], list[int]]] = {}
        for owner, place, member in zip(owners.tolist(), places.tolist(), members.tolist(), strict=True):
            if owner not in found:
                found[owner] = (self._segments[owner], [], [])
            found[owner][1].append(place)
            found[owner][2].append(member)
        return [found[owner] for owner in sorted(found)]

    def is_in_memory(self, segment: Admit) -> bool:
        return segment.shard in self._cache

    def load(self, segment: Admit) -> LoadedShard:
        """From memory or, verified again, from the disk.

        Raises CorruptShardError where the file is not what was admitted, or gone; OSError where it cannot be read.
        """
        shard = self._cache.get(segment.shard)
        if shard is not None:
            return shard
        try:
            shard = read_shard(self._directory / segment.shard)
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise CorruptShardError(str(error)) from error
        if shard.file_crc32 != segment.file_crc32:
            raise CorruptShardError(f"CRC32 {shard.file_crc32:08x}, admitted with {segment.file_crc32:08x}")
        shard = shard.without(segment.skipped)
        self._cache.put(shard)
        return shard

    def index_of(self, admit: Admit) -> IndexedShard:
        """What the index keeps of a shard that the journal says is live.

        Raises FileNotFoundError where it is not there at all, and CorruptShardError where it is damaged.
        """
        shard = self._cache.get(admit.shard)
        if shard is not None and shard.file_crc32 == admit.file_crc32:
            return IndexedShard.of(shard)
        path = self._directory / admit.shard
        try:
            indexed = read_index(path).without(admit.skipped)
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        if len(indexed.rows) != admit.num_rows:
            raise CorruptShardError(f"{len(indexed.rows)} rows, admitted with {admit.num_rows}")
        return indexed
