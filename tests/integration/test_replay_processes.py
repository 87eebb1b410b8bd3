"""Many processes on one replay directory, killed at random moments: everything acknowledged is admitted once."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reval_mcore.replay.journal import Admit, Evict, Quarantine, read_events
from reval_mcore.replay.shards import read_trajectories
from tests.integration.replay_processes import Nursery, open_buffer, shard_ids

pytestmark = pytest.mark.slow
_FOREVER_S = 300.0


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


def lines(log: Path) -> list:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def check_admissions(replay: Path, acknowledged: list[str], capacity: int) -> int:
    """Admit the rest; then the journal has each shard once and whole, each writer's in order. Returns their number."""
    open_buffer(replay, capacity).admit()
    events, is_torn = read_events(replay / "journal.jsonl")
    admits = [event for event in events if isinstance(event, Admit)]
    names = [event.shard for event in admits]
    assert not is_torn
    assert [event for event in events if isinstance(event, Quarantine)] == []
    assert len(set(names)) == len(names)
    assert set(acknowledged) <= set(names)
    assert all(event.num_rows == len(shard_ids(event.shard)) and event.skipped == () for event in admits)
    by_writer: dict[str, list[str]] = {}
    for name in names:
        by_writer.setdefault(name.rsplit("-", 2)[0], []).append(name)
    assert all(own == sorted(own) for own in by_writer.values())
    evicted = max((event.first_live_row for event in events if isinstance(event, Evict)), default=0)
    assert evicted == max(0, admits[-1].end_row - capacity)
    buffer = open_buffer(replay, capacity)
    assert len(buffer) == min(capacity, admits[-1].end_row)
    assert len(buffer.batch(buffer.live_rows)) == len(buffer)
    for event in admits:
        path = replay / "shards" / event.shard
        if path.exists():
            assert [t.trajectory_id for t in read_trajectories(path)] == shard_ids(event.shard)
        else:
            assert event.end_row <= evicted
    return len(names)


@pytest.mark.timeout(400)
def test_fifty_kills_of_writers_and_trainer(tmp_path: Path, nursery: Nursery) -> None:
    """What was acknowledged before a kill is there after it, however often trainer and writers die."""
    replay, log, positions = tmp_path / "replay", tmp_path / "written", tmp_path / "admitted"
    checkpoint, errors, capacity = tmp_path / "checkpoint.npz", tmp_path / "errors", 150
    generator = random.Random(0)
    incarnations = {"a": 0, "b": 0}

    def start(role: str) -> int:
        if role == "trainer":
            if generator.random() < 0.3:
                checkpoint.unlink(missing_ok=True)  # reopened without a state: the journal goes on where it was
            return nursery.start("train", errors, str(replay), str(positions), capacity, str(checkpoint), _FOREVER_S)
        incarnations[role] += 1
        return nursery.start("write", errors, str(replay), str(log), role, incarnations[role], _FOREVER_S, 0.002)

    running = {role: start(role) for role in ("trainer", "a", "b")}
    for _ in range(50):
        time.sleep(generator.uniform(0.0, 0.15))
        role = generator.choice(["trainer", "a", "b"])
        nursery.kill(running[role])
        assert not errors.exists(), errors.read_text()
        running[role] = start(role)
    deadline = time.monotonic() + 60.0
    while len(lines(log)) < 60 and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in running.values():
        nursery.kill(pid)
    assert not errors.exists(), errors.read_text()
    acknowledged = lines(log)
    assert len(set(acknowledged)) == len(acknowledged) >= 60
    assert len(lines(positions)) > 5
    found = check_admissions(replay, acknowledged, capacity)
    assert len(acknowledged) <= found <= len(acknowledged) + 52  # a kill may come between the rename and its telling


@pytest.mark.timeout(600)
def test_eight_writers_two_readers_one_trainer(
    tmp_path: Path, nursery: Nursery, request: pytest.FixtureRequest
) -> None:
    """For --replay-seconds: each trajectory is admitted once, in journal order; readers see only whole ones."""
    seconds: float = request.config.option.replay_seconds
    replay, log, errors = tmp_path / "replay", tmp_path / "written", tmp_path / "errors"
    capacity = 500
    trainer = nursery.start(
        "train", errors, str(replay), str(tmp_path / "admitted"), capacity, str(tmp_path / "state.npz"), _FOREVER_S
    )
    while not (replay / "journal.jsonl").exists():
        time.sleep(0.05)
    writers = [
        nursery.start("write", errors, str(replay), str(log), f"node{number}", 0, seconds, 0.02) for number in range(8)
    ]
    readers = [
        nursery.start("read", errors, str(replay), str(tmp_path / f"reader{number}"), seconds) for number in range(2)
    ]
    for pid in (*writers, *readers):
        nursery.wait(pid)
    nursery.kill(trainer)
    assert not errors.exists(), errors.read_text()
    acknowledged = lines(log)
    assert {name.split("-")[0] for name in acknowledged} == {f"node{number}" for number in range(8)}
    assert check_admissions(replay, acknowledged, capacity) == len(acknowledged)
    seen = [lines(tmp_path / f"reader{number}")[-1] for number in range(2)]
    print(f"{len(acknowledged)} shards of {len(shard_ids(acknowledged[0]))} trajectories; readers saw {seen}")
    assert min(seen) > 0
