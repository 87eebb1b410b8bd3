from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reval_mcore.replay.journal import Admit, Event, Evict, Index, Journal, Quarantine
from tests.small_disk import SmallDisk, fill

EVENTS: list[Event] = [
    Admit("a-0000-000000.parquet", 123, 4, 0),
    Admit("a-0000-000001.parquet", 2**32 - 1, 2, 4, (0, 3)),
    Evict(1),
    Quarantine("b-0000-000000.parquet", 'page "0"\nis \u00e9vil'),
    Admit("a-0000-000002.parquet", 0, 0, 6, (0,)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_reopening_gives_the_events_back(path: Path) -> None:
    journal = Journal(path)
    assert journal.position == 0
    journal.append(EVENTS[:2])
    journal.append(EVENTS[2:])
    assert list(Journal(path).events) == list(journal.events) == EVENTS
    assert Journal(path).position == len(EVENTS)
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(EVENTS)
    for line in lines:
        fields = json.loads(line)
        assert fields.pop("line_crc32") == zlib.crc32(json.dumps(fields).encode())


def test_index_of_events() -> None:
    index = Index.of(EVENTS)
    assert (index.first_live_row, index.next_row) == (1, 6)
    assert [admit.shard for admit in index.live_shards()] == ["a-0000-000000.parquet", "a-0000-000001.parquet"]
    assert all(name in index for name in ("a-0000-000002.parquet", "b-0000-000000.parquet"))
    assert "c-0000-000000.parquet" not in index
    with pytest.raises(AssertionError, match="does not follow row 6"):
        index.apply(Admit("x", 0, 1, 7))


def test_every_torn_tail_is_cut(path: Path) -> None:
    Journal(path).append(EVENTS)
    data = path.read_bytes()
    ends = [end + 1 for end, byte in enumerate(data) if byte == ord("\n")]
    for size in sorted({*range(0, len(data), 11), *ends[:-1], *(end - 1 for end in ends)}):
        path.write_bytes(data[:size])
        complete = sum(end <= size for end in ends)
        journal = Journal(path)
        assert list(journal.events) == EVENTS[: max(complete - 1, 0)], size
        journal.append([Evict(6)])
        assert Journal(path).events[-1] == Evict(6)


def test_zero_filled_tail_is_cut(path: Path) -> None:
    Journal(path).append(EVENTS)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(500))
    assert list(Journal(path).events) == EVENTS
    assert path.stat().st_size == size


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_cut_but_never_believed(path: Path, data: st.DataObject) -> None:
    if not path.exists():
        Journal(path).append(EVENTS)
        path.with_suffix(".good").write_bytes(path.read_bytes())
    good = bytearray(path.with_suffix(".good").read_bytes())
    last_line = good.rindex(b"\n", 0, len(good) - 1) + 1
    place = data.draw(st.integers(0, len(good) - 1))
    good[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(good)
    if place < last_line - 1:
        with pytest.raises(ValueError, match=r"journal\.jsonl, line \d: damaged .* restore the file"):
            Journal(path)
        assert path.read_bytes() == good  # evidence is left as it was found
    elif ord("\n") not in good[last_line:-1]:
        assert list(Journal(path).events) in (EVENTS[:-1], EVENTS[:-2])  # -2: the newline before it was hit


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (0, {"format": "reval_mcore.replay_journal", "format_version": 2}, "line 1: format version 2, this program"),
        (0, {"event": "evict", "first_live_row": 0}, r"line 1: format version \(none\)"),
        (1, {"event": "merge", "shard": "a"}, "line 2: unknown event 'merge'"),
    ],
)
def test_another_version_is_refused(path: Path, line: int, fields: dict, message: str) -> None:
    Journal(path).append(EVENTS)
    lines = path.read_bytes().splitlines(keepends=True)
    fields["line_crc32"] = zlib.crc32(json.dumps(fields).encode())
    lines[line] = json.dumps(fields).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=message):
        Journal(path)


@pytest.mark.parametrize("position", range(len(EVENTS) + 1))
def test_truncate(path: Path, position: int) -> None:
    journal = Journal(path)
    journal.append(EVENTS)
    journal.truncate(position)
    assert list(journal.events) == list(Journal(path).events) == EVENTS[:position]
    journal.append(EVENTS[position:])
    assert list(Journal(path).events) == EVENTS


@pytest.mark.parametrize("position", [-1, len(EVENTS) + 1])
def test_truncate_beyond_the_end(path: Path, position: int) -> None:
    journal = Journal(path)
    journal.append(EVENTS)
    with pytest.raises(
        ValueError, match=f"has 5 events, cannot go back to position {position}; the checkpoint belongs"
    ):
        journal.truncate(position)
    assert list(Journal(path).events) == EVENTS


def test_failed_append_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    journal = Journal(path)
    journal.append(EVENTS[:2])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="I/O error"):
            journal.append(EVENTS[2:])
    assert path.read_bytes() == before
    journal.append(EVENTS[2:])
    assert list(Journal(path).events) == EVENTS


def append_many(journal: Journal) -> None:
    for row in range(200):
        journal.append([Admit(f"a-0000-{row:06d}.parquet", row, 1, row), Evict(row)])


def append_until_full(disk: Path) -> dict[str, Any]:
    path = disk / "journal.jsonl"
    journal = Journal(path)
    ballast = fill(disk, leave_kb=4)
    with pytest.raises(OSError) as caught:
        append_many(journal)
    kept = journal.position
    assert list(Journal(path).events) == list(journal.events)
    ballast.unlink()
    journal.append([Admit("z-0000-000000.parquet", 0, 1, kept // 2)])
    assert list(Journal(path).events) == list(journal.events)
    return {"told": str(caught.value), "kept": kept}


def test_a_full_disk_leaves_whole_appends(small_disk: SmallDisk) -> None:
    found = small_disk.call(append_until_full, size_kb=64, timeout_s=30)
    path = small_disk.mount_point / "journal.jsonl"
    assert found["told"] == f"[Errno 28] not written: No space left on device: '{path}'"
    assert found["kept"] >= 20
    assert found["kept"] % 2 == 0  # an admission and its eviction


def test_a_second_writer_is_noticed(path: Path) -> None:
    first, second = Journal(path), Journal(path)
    first.append([Evict(0)])
    with pytest.raises(ValueError, match="another process writes to it; stop one of the two runs"):
        second.append([Evict(0)])
