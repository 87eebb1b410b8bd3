"""Damaged shards and torn journals: nothing damaged is ever trained on, and training goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.journal import Journal, Quarantine
from reval_mcore.replay.shards import ShardWriter


def write_groups(directory: Path, make_group, count: int, *, size: int = 2) -> list[str]:
    writer = ShardWriter(directory, writer="w", incarnation=0, tokenizer_hash="t", template_hash="t")
    return [writer.write(make_group(f"g{index}", size=size)) for index in range(count)]


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": lambda data: flip(data, len(data) // 5),
    "last byte missing": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "middle third zeros": lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * len(data) // 3 :],
    "all zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_shard_is_quarantined_and_the_others_go_on(
    tmp_path: Path, make_group, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    names = write_groups(tmp_path, make_group, 3)
    path = tmp_path / "shards" / names[1]
    path.write_bytes(damage(path.read_bytes()))
    buffer = ReplayBuffer(tmp_path, capacity=10, seed=0)
    with caplog.at_level(logging.WARNING):
        assert buffer.admit().tolist() == [0, 1, 2, 3]
    assert names[1] in caplog.text
    assert os.listdir(tmp_path / "quarantine") == [names[1]]
    events = Journal(tmp_path / "journal.jsonl").events
    assert [event.shard for event in events if isinstance(event, Quarantine)] == [names[1]]
    expected = np.concatenate([t.response_tokens for name in ("g0", "g2") for t in make_group(name, size=2)])
    for each in (buffer, ReplayBuffer(tmp_path, capacity=10, seed=0)):
        batch = each.batch(each.live_rows)
        in_response = np.concatenate(
            [np.arange(n) >= p for n, p in zip(batch.lengths, batch.prompt_lengths, strict=True)]
        )
        np.testing.assert_array_equal(batch.tokens[in_response], expected)
        assert each.admit().tolist() == []
        assert each.statistics(0)["num_quarantined"] == 1.0


def footer_flip(path: Path) -> None:
    """Damage that Parquet itself does not see: the name of the program that wrote the file."""
    data = path.read_bytes()
    path.write_bytes(flip(data, data.rindex(b"parquet-cpp-arrow")))


def test_footer_flip_passes_parquet_and_is_caught_by_the_journal(tmp_path: Path, make_group) -> None:
    names = write_groups(tmp_path, make_group, 3)
    buffer = ReplayBuffer(tmp_path, capacity=5, seed=0)
    buffer.admit()
    state = buffer.state_dict()
    footer_flip(tmp_path / "shards" / names[1])
    reopened = ReplayBuffer(tmp_path, capacity=5, seed=0)
    assert reopened.live_rows.tolist() == [1, 2, 3, 4, 5]
    assert sorted(reopened.sample(10, 0).rows.tolist()) == [1, 4, 5]  # read for the first time
    assert reopened.live_rows.tolist() == [1, 4, 5]
    last = Journal(tmp_path / "journal.jsonl").events[-1]
    assert isinstance(last, Quarantine)
    assert last.shard == names[1]
    assert "CRC32" in last.reason
    assert len(reopened.sample(10, 0)) == len(reopened) == 3

    reopened.load_state_dict(state)  # judged again: still damaged, and still not trained on
    assert reopened.batch(np.arange(1, 6)).rows.tolist() == [1, 4, 5]
    assert reopened.live_rows.tolist() == [1, 4, 5]
    assert reopened.num_quarantined == 1

    writer = ShardWriter(tmp_path, writer="w", incarnation=1, tokenizer_hash="t", template_hash="t")
    writer.write([*make_group("g1", size=2), *make_group("g9", size=2)])  # the lost ones, done again, are new rows
    assert reopened.admit().tolist() == [6, 7, 8, 9]
    assert reopened.live_rows.tolist() == [5, 6, 7, 8, 9]
    assert reopened.statistics(0)["size"] == 5.0


def test_quarantine_after_a_checkpoint_is_repeated_at_the_same_position(tmp_path: Path, make_group) -> None:
    names = write_groups(tmp_path, make_group, 4)
    path = tmp_path / "shards" / names[2]
    path.write_bytes(b"")
    buffer = ReplayBuffer(tmp_path, capacity=5, seed=0)
    buffer.admit(names[:2])
    state = buffer.state_dict()
    buffer.admit()
    journal, draw = (tmp_path / "journal.jsonl").read_bytes(), buffer.sample(3, 1).rows.tolist()
    resumed = ReplayBuffer(tmp_path, capacity=5, seed=0)
    resumed.load_state_dict(state)
    assert resumed.num_quarantined == 0
    assert resumed.pending_shards() == names[2:]
    resumed.admit()
    assert (tmp_path / "journal.jsonl").read_bytes() == journal
    assert resumed.sample(3, 1).rows.tolist() == draw


def test_crash_between_journal_and_move(tmp_path: Path, make_group) -> None:
    names = write_groups(tmp_path, make_group, 2)
    Journal(tmp_path / "journal.jsonl").append([Quarantine(names[0], "test")])
    buffer = ReplayBuffer(tmp_path, capacity=5, seed=0)
    assert os.listdir(tmp_path / "quarantine") == [names[0]]
    assert buffer.admit().tolist() == [0, 1]


def test_torn_journal_admits_again(tmp_path: Path, make_group) -> None:
    write_groups(tmp_path, make_group, 3)
    buffer = ReplayBuffer(tmp_path, capacity=5, seed=0)
    buffer.admit()
    journal = tmp_path / "journal.jsonl"
    complete = journal.read_bytes()
    ends = [place + 1 for place, byte in enumerate(complete) if byte == ord("\n")]
    for size in {*ends, *(end - 2 for end in ends)}:
        journal.write_bytes(complete[:size])
        again = ReplayBuffer(tmp_path, capacity=5, seed=0)
        again.admit()
        assert journal.read_bytes() == complete
        assert again.live_rows.tolist() == buffer.live_rows.tolist() == [1, 2, 3, 4, 5]


def column_flips(path: Path) -> dict[str, bytes]:
    """The file with one bit flipped in the pages of one column, for each of them."""
    data = path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    middles = {c.path_in_schema: c.data_page_offset + c.total_compressed_size - 2 for c in columns}
    return {name: flip(data, place) for name, place in middles.items()}


def test_one_flipped_bit_in_every_column_and_in_the_footer(tmp_path: Path, make_group) -> None:
    """At admission, and when the shard is read again after it."""
    (name,) = write_groups(tmp_path, make_group, 1, size=8)
    path = tmp_path / "shards" / name
    good, flips = path.read_bytes(), column_flips(path)
    assert len(flips) == 23  # version_spans is three
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    flips |= {f"footer {place}": flip(good, place) for place in range(footer, len(good), 97)}
    unseen = 0
    for what, damaged in flips.items():
        path.write_bytes(good)
        (tmp_path / "journal.jsonl").unlink(missing_ok=True)
        admitted = ReplayBuffer(tmp_path, capacity=10, seed=0, max_memory_bytes=1)
        rows = admitted.admit()
        fresh = ReplayBuffer(tmp_path / "fresh", capacity=10, seed=0)
        (tmp_path / "fresh" / "shards" / name).write_bytes(damaged)
        path.write_bytes(damaged)
        assert len(admitted.sample(8, 0)) == 8, what  # still in memory
        admitted = ReplayBuffer(tmp_path, capacity=10, seed=0)
        assert len(admitted.batch(rows)) == 0, what
        assert admitted.num_quarantined == 1
        fresh.admit()
        if fresh.num_quarantined == 0:  # before its CRC32 is known, a footer may hold a flip that changes no value
            assert what.startswith("footer"), what
            unseen += 1
        fresh.rewind(0)
        (tmp_path / "quarantine" / name).unlink()
        (tmp_path / "fresh" / "shards" / name).unlink()
        shutil.rmtree(tmp_path / "fresh")
    assert unseen < len(flips) / 4


def test_damage_after_admission_is_found_when_the_shard_is_read_again(tmp_path: Path, make_group) -> None:
    """What is damaged, and what another node unlinked: rows are lost and counted, and draws are made from the rest."""
    names = write_groups(tmp_path, make_group, 5)
    buffer = ReplayBuffer(tmp_path, capacity=10, seed=0, max_memory_bytes=1)
    fresh = buffer.admit()
    path = tmp_path / "shards" / names[0]
    path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 5))
    (tmp_path / "shards" / names[2]).unlink()
    batch = buffer.sample(8, 0)
    assert len(batch) == len(buffer) == 6
    assert buffer.live_rows.tolist() == [2, 3, 6, 7, 8, 9]
    assert buffer.batch(fresh).rows.tolist() == [2, 3, 6, 7, 8, 9]
    assert buffer.stale_rows(fresh, 0).tolist() == [2, 3, 6, 7, 8, 9]
    assert buffer.statistics(0)["num_quarantined"] == 2.0
    assert os.listdir(tmp_path / "quarantine") == [names[0]]
    lost = [event for event in Journal(tmp_path / "journal.jsonl").events if isinstance(event, Quarantine)]
    assert {event.shard for event in lost} == {names[0], names[2]}
    assert any("No such file" in event.reason for event in lost)
    again = ReplayBuffer(tmp_path, capacity=10, seed=0)
    assert again.live_rows.tolist() == [2, 3, 6, 7, 8, 9]
    assert again.sample(4, 1).rows.tolist() == buffer.sample(4, 1).rows.tolist()
    writer = ShardWriter(tmp_path, writer="w", incarnation=1, tokenizer_hash="t", template_hash="t")
    writer.write(make_group("g0", size=2))  # done again
    assert again.admit().tolist() == [10, 11]


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path: Path, make_group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quarantine is for files: an I/O error, which the real disk cannot be made to show here, ends the run."""
    write_groups(tmp_path, make_group, 2)
    buffer = ReplayBuffer(tmp_path, capacity=10, seed=0, max_memory_bytes=1)
    rows = buffer.admit()

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        buffer.batch(rows)
    assert buffer.num_quarantined == 0
    assert len(buffer) == 4


def test_a_listing_that_lags(tmp_path: Path, make_group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings of network filesystems may be a minute old: a shard is admitted once, by name or when it shows."""
    names = write_groups(tmp_path, make_group, 3)
    buffer = ReplayBuffer(tmp_path, capacity=10, seed=0)
    listed, seen = os.listdir, [names[:1]]
    monkeypatch.setattr(os, "listdir", lambda path: seen[0] if path == tmp_path / "shards" else listed(path))
    assert buffer.admit().tolist() == [0, 1]
    assert buffer.admit([names[2]]).tolist() == [2, 3]  # announced by its writer
    assert buffer.admit().tolist() == []
    seen[0] = names
    assert buffer.admit().tolist() == [4, 5]
    assert buffer.admit(names).tolist() == []
    assert buffer.unlink_evicted(0) == []


def test_missing_live_shard_stops(tmp_path: Path, make_group) -> None:
    names = write_groups(tmp_path, make_group, 2)
    ReplayBuffer(tmp_path, capacity=5, seed=0).admit()
    (tmp_path / "shards" / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"{names[1]}: the journal says that it is live, .* restore the file"):
        ReplayBuffer(tmp_path, capacity=5, seed=0)
