"""A replay directory as it lies on the disk, for tools beside a run: reads, and changes nothing.

Shards may go while one looks: the trainer unlinks what is evicted. A file that is not there any more is read as
evicted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reval_mcore.replay.journal import Admit, Evict, Index, Quarantine, read_events
from reval_mcore.replay.loading import GONE, kept_places, read_shard
from reval_mcore.replay.shards import QUARANTINE, SCHEMA, SHARDS, CorruptShardError, ShardName

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a replay directory."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass(frozen=True)
class View:
    """What a journal and a directory said at one moment."""

    directory: Path
    index: Index
    positions: dict[str, int]  # of shards: journal position after their admission
    has_torn_line: bool  # of a journal: a run that is going on may be writing one
    reasons: dict[str, str]  # of quarantined shards
    sizes: dict[str, int]  # bytes of the shards on disk, in the order of admission; pending ones last

    @classmethod
    def of(cls, directory: Path) -> View:
        """Raises ValueError where there is no journal, or it is damaged before its last line."""
        path = directory / JOURNAL
        if not path.is_file():
            raise ValueError(f"{directory}: no {JOURNAL} in it; give a run directory, or the replay directory of one")
        on_disk = {path.name: path for path in (directory / SHARDS).glob("*") if ShardName.parse(path.name)}
        events, has_torn_line = read_events(path)  # after the listing: what was listed and evicted since is known to be
        index = Index.of(events)
        order = {name: place for place, name in enumerate(index.admitted)}
        names = sorted(on_disk, key=lambda name: (order.get(name, len(order)), ShardName.parse(name)))
        sizes = {}
        for name in names:
            try:
                sizes[name] = on_disk[name].stat().st_size
            except OSError as error:
                if error.errno not in GONE:
                    raise
        return cls(
            directory,
            index,
            {event.shard: number for number, event in enumerate(events, start=1) if isinstance(event, Admit)},
            has_torn_line,
            {event.shard: event.reason for event in events if isinstance(event, Quarantine)},
            sizes,
        )

    @property
    def live(self) -> list[Admit]:
        return self.index.live_shards()

    @property
    def pending(self) -> list[str]:
        return [name for name in self.sizes if name not in self.index]

    def path(self, shard: str) -> Path:
        return self.directory / SHARDS / shard

    def rows(self, admit: Admit, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The admitted rows of a shard with their number as "row"; None where the file is gone.

        By the checksums of the pages. Raises CorruptShardError.
        """
        table = read_columns(self.path(admit.shard), columns)
        if table is None:
            return None
        kept = table.filter(pa.array(kept_places(len(table), admit.skipped)))
        if len(kept) != admit.num_rows:
            raise CorruptShardError(f"{admit.shard}: {len(kept)} rows, admitted with {admit.num_rows}")
        numbers = pa.array(range(admit.first_row, admit.end_row), pa.int64())
        return kept.append_column(pa.field("row", pa.int64(), nullable=False), numbers)

    def live_tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The live rows, shard after shard, oldest first. Raises CorruptShardError."""
        for admit in self.live:
            table = self.rows(admit, columns)
            if table is not None:
                yield table.slice(max(self.index.first_live_row - admit.first_row, 0))

    def verify(self) -> Iterator[Finding]:
        """Every checksum of every shard on disk, and the journal against the directory."""
        for admit in self.live:
            if admit.shard not in self.sizes and not self._was_evicted(admit):
                yield Finding(self.path(admit.shard), "missing, and the journal says that it is live")
        for name in self.sizes:
            admit = self.index.admitted.get(name)
            try:
                shard = read_shard(self.path(name))
            except CorruptShardError as error:
                yield Finding(self.path(name), f"damaged: {error}")
                continue
            except OSError as error:
                if error.errno not in GONE:
                    raise
                continue
            if admit is not None and shard.file_crc32 != admit.file_crc32:
                yield Finding(self.path(name), f"CRC32 {shard.file_crc32:08x}, admitted with {admit.file_crc32:08x}")
            elif admit is not None and len(shard) != admit.num_rows + len(admit.skipped):
                yield Finding(self.path(name), f"{len(shard)} rows, the journal has {admit.num_rows}")
        known = set(self.reasons)
        for name in sorted(set(os.listdir(self.directory / QUARANTINE)) - known):
            yield Finding(self.directory / QUARANTINE / name, "in quarantine, and the journal does not say so")

    def _was_evicted(self, admit: Admit) -> bool:
        """By now: a run may be going on."""
        events, _ = read_events(self.directory / JOURNAL)
        return any(isinstance(event, Evict) and event.first_live_row >= admit.end_row for event in events)


def read_columns(path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """Columns of a shard (all of them: None), pages verified; None where it is gone. Raises CorruptShardError."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise CorruptShardError(f"{path}: columns are not those of the schema")
            return file.read(columns=None if columns is None else list(columns)).replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno in GONE:
            return None
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptShardError(f"{path}: {error}") from error
