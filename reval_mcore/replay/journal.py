"""The replay journal: which shards were admitted, evicted and quarantined, in order, one JSON object a line.

Only the index authority writes it. Every line carries its own CRC32, and every append is fsynced before it counts, so
that after a crash at most the last line is torn; that one is cut off, since whatever it recorded will be done again.
Damage anywhere else is an error: guessing at history would train on other data than the checkpoint says.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reval_mcore.durable import append, fsync

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Admit:
    """A shard's rows became live as first_row, first_row + 1, ..., in file order, less those skipped."""

    shard: str
    file_crc32: int
    num_rows: int  # admitted; 0 where all were skipped
    first_row: int
    skipped: tuple[int, ...] = ()  # places in the file of trajectories that were live already

    @property
    def end_row(self) -> int:
        return self.first_row + self.num_rows


@dataclass(frozen=True, slots=True)
class Evict:
    """Rows below `first_live_row` left the buffer."""

    first_live_row: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A shard failed a check: its rows, if it had been admitted, are lost, and it is never read again."""

    shard: str
    reason: str


Event = Admit | Evict | Quarantine
_EVENTS: Mapping[str, type[Admit] | type[Evict] | type[Quarantine]] = {
    "admit": Admit,
    "evict": Evict,
    "quarantine": Quarantine,
}
_NAMES = {kind: name for name, kind in _EVENTS.items()}


@dataclass(slots=True)
class Index:
    """What a sequence of events adds up to."""

    admitted: dict[str, Admit] = field(default_factory=dict)  # by shard, in order of admission; evicted ones too
    quarantined: set[str] = field(default_factory=set)
    first_live_row: int = 0
    next_row: int = 0

    @classmethod
    def of(cls, events: Sequence[Event]) -> Index:
        index = cls()
        for event in events:
            index.apply(event)
        return index

    def apply(self, event: Event) -> None:
        match event:
            case Admit():
                assert event.first_row == self.next_row, f"{event} does not follow row {self.next_row}"
                self.admitted[event.shard] = event
                self.next_row = event.end_row
            case Evict():
                assert self.first_live_row <= event.first_live_row <= self.next_row, f"{event}: rows never go back"
                self.first_live_row = event.first_live_row
            case Quarantine():
                self.quarantined.add(event.shard)

    def __contains__(self, shard: str) -> bool:
        return shard in self.admitted or shard in self.quarantined

    def live_shards(self) -> list[Admit]:
        """Admissions with a live row, oldest first."""
        admits = (admit for admit in self.admitted.values() if admit.shard not in self.quarantined)
        return [admit for admit in admits if admit.end_row > max(admit.first_row, self.first_live_row)]


def _encode(fields: Mapping[str, Any]) -> bytes:
    crc32 = zlib.crc32(json.dumps(fields).encode())
    return json.dumps({**fields, "line_crc32": crc32}).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The fields of a line, or None where it is not exactly what `_encode` made."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    fields.pop("line_crc32", None)
    return fields if _encode(fields) == line else None


class Journal:
    """An append-only file of events. `position` counts them; line 1, the format version, is not one."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises ValueError where the file is damaged before its last line, or of another version."""
        self.path = path
        self._events: list[Event] = []
        self._ends: list[int] = []  # of the header and of each event: byte offsets
        if path.exists():
            data = path.read_bytes()
            self._events, self._ends = _parse(path, data)
            size = self._ends[-1] if self._ends else 0
            if size < len(data):
                self._cut(size)
        if not self._ends:
            self._write(_encode({"format": "reval_mcore.replay_journal", "format_version": FORMAT_VERSION}))
            fsync(path.parent)
            self._ends.append(path.stat().st_size)

    @property
    def position(self) -> int:
        return len(self._events)

    @property
    def events(self) -> Sequence[Event]:
        return self._events

    def append(self, events: Sequence[Event]) -> None:
        """Write events and fsync once. Raises OSError, and leaves the file as it was, where that fails."""
        lines = [_encode({"event": _NAMES[type(event)], **asdict(event)}) for event in events]
        self._write(b"".join(lines))
        for line in lines:
            self._ends.append(self._ends[-1] + len(line))
        self._events.extend(events)

    def first(self, position: int) -> Sequence[Event]:
        """The events up to `position`. Raises ValueError where there are fewer."""
        if not 0 <= position <= self.position:
            raise ValueError(
                f"{self.path}: has {self.position} events, cannot go back to position {position}; "
                f"the checkpoint belongs to another replay directory, or this one was replaced"
            )
        return self._events[:position]

    def truncate(self, position: int) -> None:
        """Forget all events after `position`. One truncation, at the end of a line: it happens or it does not."""
        self._events = list(self.first(position))
        self._cut(self._ends[position])
        del self._ends[position + 1 :]

    def _write(self, data: bytes) -> None:
        end = self._ends[-1] if self._ends else 0
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != end:
                raise ValueError(
                    f"{self.path}: {size} bytes, {end} expected: another process writes to it; "
                    f"stop one of the two runs that share this directory"
                )
            append(file, data, sync=True)  # a torn line must not end up in the middle of the file

    def _cut(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


# ---------------------------------------------------------------- reading


def read_events(path: Path) -> tuple[list[Event], bool]:
    """(events, whether a torn last line follows them), for tools beside a run: changes nothing. Raises as Journal."""
    data = path.read_bytes()
    events, ends = _parse(path, data)
    return events, len(data) > (ends[-1] if ends else 0)


def _parse(path: Path, data: bytes) -> tuple[list[Event], list[int]]:
    """Events, and the byte offsets where the header and each of them ends; less a torn last line."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]  # what follows the last newline: nothing, or a torn line
    lines = lines if lines[-1] else lines[:-1]
    events: list[Event] = []
    ends: list[int] = []
    for number, line in enumerate(lines, start=1):
        fields = _decode(line)
        if fields is None and number == len(lines):
            break
        if fields is None:
            raise ValueError(
                f"{path}, line {number}: damaged ({line[:80]!r}), and not the last line; restore the file "
                f"from a copy, or move the replay directory away and start with an empty buffer"
            )
        if number == 1:
            _check_version(path, fields)
        else:
            events.append(_event(path, fields, number))
        ends.append((ends[-1] if ends else 0) + len(line))
    return events, ends


def _check_version(path: Path, fields: Mapping[str, Any]) -> None:
    version = fields.get("format_version", "(none)")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}, line 1: format version {version}, this program reads {FORMAT_VERSION}; "
            f"go on with the version of reval_mcore that wrote it"
        )


def _event(path: Path, fields: dict[str, Any], number: int) -> Event:
    name = fields.pop("event", "(none)")
    if name not in _EVENTS:
        raise ValueError(
            f"{path}, line {number}: unknown event {name!r}; go on with the version of reval_mcore that wrote it"
        )
    if "skipped" in fields:
        fields["skipped"] = tuple(fields["skipped"])
    return _EVENTS[name](**fields)
