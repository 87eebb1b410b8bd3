"""Crash safety by construction: the buffer is opened after every prefix of its file operations, with what was not
fsynced dropped, torn, zeroed or out of order. Nothing acknowledged is lost, and nothing damaged is trained on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from reval_mcore import durable
from reval_mcore.records import Trajectory
from reval_mcore.replay import journal, shards
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.journal import Journal
from reval_mcore.replay.shards import ShardWriter, next_incarnation
from tests.forgetful_disk import Recording, record, states

CAPACITY = 7


def make_writer(replay: Path, writer: str, incarnation: int) -> ShardWriter:
    return ShardWriter(replay, writer=writer, incarnation=incarnation, tokenizer_hash="t", template_hash="t")


def open_buffer(replay: Path) -> ReplayBuffer:
    return ReplayBuffer(replay, capacity=CAPACITY, seed=0)


def live_through(run: Path, make_group) -> Recording:
    """Two writers and the trainer: shards, admissions, evictions, a shard in quarantine, unlinking, going back."""
    with record(run) as recording:
        replay = run / "replay"
        buffer = open_buffer(replay)
        writers = [make_writer(replay, name, 0) for name in "ab"]
        names: list[str] = []

        def write(index: int) -> None:
            names.append(writers[index % 2].write(make_group(f"g{index}", size=3)))
            recording.promise(("shard", names[-1], [t.trajectory_id for t in make_group(f"g{index}", size=3)]))

        def admit() -> None:
            buffer.admit()
            recording.promise(("journal", list(buffer._journal.events)))

        write(0)
        write(1)
        admit()
        checkpoint = buffer.state_dict()
        write(2)
        write(3)
        admit()
        for name in buffer.unlink_evicted(buffer.first_live_row):
            recording.promise(("unlinked", name))
        write(4)
        buffer.load_state_dict({**buffer.state_dict(), "journal_position": buffer.journal_position})
        admit()
        assert buffer.journal_position > checkpoint["journal_position"]
    return recording


def known(make_group) -> dict[str, Trajectory]:
    groups = [*(f"g{index}" for index in range(5)), "again"]
    return {t.trajectory_id: t for name in groups for t in make_group(name, size=3)}


def check_trained_on(buffer: ReplayBuffer, trajectories: dict[str, Trajectory]) -> list[str]:
    """Every live row is some trajectory as it was written; returns their ids in the order of rows."""
    by_tokens = {np.concatenate([t.prompt_tokens, t.response_tokens]).tobytes(): t for t in trajectories.values()}
    batch = buffer.batch(buffer.live_rows)
    found = []
    for row in range(len(batch)):
        own = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        trajectory = by_tokens[batch.tokens[own].tobytes()]
        prompt = len(trajectory.prompt_tokens)
        assert batch.rollout_logprobs[own][prompt:].tobytes() == trajectory.rollout_logprobs.tobytes()
        assert batch.loss_mask[own][prompt:].tolist() == trajectory.loss_mask.tolist()
        assert batch.reward[row] == trajectory.reward
        found.append(trajectory.trajectory_id)
    assert len(set(found)) == len(found)
    return found


def check(replay: Path, promised: list, trajectories: dict[str, Trajectory], make_group) -> None:
    events = max((what[1] for what in promised if what[0] == "journal"), key=len, default=[])
    if (replay / "journal.jsonl").exists():
        shutil.copy(replay / "journal.jsonl", replay.with_suffix(".journal"))
        assert list(Journal(replay.with_suffix(".journal")).events)[: len(events)] == events
    else:
        assert events == []
    buffer = open_buffer(replay)
    before = check_trained_on(buffer, trajectories)
    unlinked = {what[1] for what in promised if what[0] == "unlinked"}
    written = {what[1]: what[2] for what in promised if what[0] == "shard"}
    on_disk = set(os.listdir(replay / "shards"))
    for name in written:
        assert name in on_disk or name in buffer._index.admitted, f"{name} is lost"
        assert name in on_disk or name in unlinked or buffer._index.admitted[name].end_row <= buffer.first_live_row
    make_writer(replay, "a", next_incarnation(replay))  # sweeps what the first one left
    make_writer(replay, "z", 0).write(make_group("again", size=3))
    buffer.admit()
    assert buffer.num_quarantined == 0
    after = check_trained_on(buffer, trajectories)
    assert after[-3:] == ["again/0", "again/1", "again/2"]
    assert len(after) <= CAPACITY
    assert [name for name in after if name in before] == before[len(before) - sum(n in after for n in before) :]
    admitted = [name for shard in buffer._index.admitted for name in written.get(shard, [])]
    assert sorted(admitted) == sorted(name for names in written.values() for name in names)  # each once
    assert list((replay / "tmp").glob("a-0000/*")) == []


def failures(recording: Recording, folder: Path, make_group) -> Iterator[str]:
    trajectories = known(make_group)
    for length, name, tree in states(recording):
        state = folder / f"{length} {name}"
        tree.make(state)
        try:
            check(state / "replay", recording.promised(length), trajectories, make_group)
        except (AssertionError, ValueError, OSError, KeyError) as error:
            yield f"after {length} operations, {name}: {type(error).__name__}: {error}"
        shutil.rmtree(state)


def test_no_power_cut_loses_or_damages_anything(tmp_path: Path, make_group) -> None:
    recording = live_through(tmp_path / "run", make_group)
    kinds = {operation.kind for operation in recording.operations}
    assert kinds == {"write", "truncate", "name", "unname", "mkdir", "sync", "ack"}
    assert len(recording.operations) > 60
    assert list(failures(recording, tmp_path / "states", make_group)) == []


@pytest.mark.parametrize(
    ("module", "name"), [(shards, "os"), (shards, "fsync"), (journal, "append")], ids=["data", "names", "journal"]
)
def test_a_forgotten_fsync_would_be_found(
    tmp_path: Path, make_group, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    """The test above is not blind: without one kind of fsync it fails."""
    forgetful = {
        "os": SimpleNamespace(fsync=lambda descriptor: None, scandir=os.scandir),
        "fsync": lambda path: None,
        "append": lambda file, data, sync: durable.append(file, data),
    }
    with monkeypatch.context() as patch:
        patch.setattr(module, name, forgetful[name])
        recording = live_through(tmp_path / "run", make_group)
    assert next(failures(recording, tmp_path / "states", make_group), None) is not None
