"""The buffer against a plain list: any order of writing, admitting, updating, reopening and going back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from reval_mcore.records import Scores, Trajectory
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.samplers import PrioritizedSampler, UniformSampler
from reval_mcore.replay.shards import ShardWriter

PRIORITIZED = PrioritizedSampler(beta=0.5, exponent=0.6, epsilon=0.01, tau_versions=3.0)


@dataclass(frozen=True)
class Entry:
    row: int
    trajectory: Trajectory
    times_sampled: int = 0
    score: float = np.nan
    priority: float = 1.0


class BufferMachine(RuleBasedStateMachine):
    def __init__(self, make_group: Callable[..., list[Trajectory]]) -> None:
        super().__init__()
        self.make_group = make_group
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name)
        self.writer = ShardWriter(self.directory, writer="w", incarnation=0, tokenizer_hash="t", template_hash="t")
        self.model: list[Entry] = []  # live, oldest first
        self.next_row = 0
        self.pending: list[list[Trajectory]] = []  # by shard
        self.done: list[list[Trajectory]] = []
        self.num_written = 0
        self.update = 0

    @initialize(capacity=st.integers(1, 12), is_prioritized=st.booleans(), max_memory_bytes=st.integers(1, 3000))
    def create(self, capacity: int, is_prioritized: bool, max_memory_bytes: int) -> None:
        self.capacity, self.max_memory_bytes = capacity, max_memory_bytes
        self.sampler = PRIORITIZED if is_prioritized else UniformSampler()
        self.buffer = self.reopened()
        self.checkpoint = (self.buffer.state_dict(), list(self.model), 0, 0)

    def reopened(self) -> ReplayBuffer:
        return ReplayBuffer(
            self.directory,
            capacity=self.capacity,
            seed=1,
            sampler=self.sampler,
            max_memory_bytes=self.max_memory_bytes,
        )

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), back=st.integers(0, 8))
    def write(self, sizes: list[int], back: int) -> None:
        trajectories: list[Trajectory] = []
        if 0 < back <= self.num_written:  # done before: to be skipped where it is live, a new row where it is not
            trajectories += self.make_group(f"g{self.num_written - back}", size=1)
        for size in sizes:
            trajectories += self.make_group(f"g{self.num_written}", size=size)
            self.num_written += 1
        self.writer.write(trajectories)
        self.pending.append(trajectories)

    @rule()
    def admit(self) -> None:
        first = self.next_row
        for trajectories in self.pending:
            maximum = max((entry.priority for entry in self.model), default=1.0)
            for trajectory in trajectories:
                if trajectory.trajectory_id not in {entry.trajectory.trajectory_id for entry in self.model}:
                    self.model.append(Entry(self.next_row, trajectory, priority=maximum))
                    self.next_row += 1
            del self.model[: -self.capacity]
        self.done += self.pending
        self.pending = []
        assert self.buffer.admit().tolist() == [entry.row for entry in self.model if entry.row >= first]

    @rule(n=st.integers(0, 6))
    def train(self, n: int) -> None:
        self.update += 1
        batch = self.buffer.sample(n, self.update)
        drawn = set(batch.rows.tolist())
        assert len(drawn) == len(batch) == min(n, len(self.model))
        self.buffer.record_update(batch.rows, batch.rows - 3.0)
        score = batch.rows + 1 / self.update
        self.buffer.set_reference_scores(batch.rows, Scores(score, score, score, np.zeros(0, np.float32)), self.update)
        for place, entry in enumerate(self.model):
            if entry.row in drawn:
                score = entry.row + 1 / self.update
                priority = (abs(0.5 * (entry.row - 3.0)) + 0.01) ** 0.6 if self.sampler == PRIORITIZED else 1.0
                times = entry.times_sampled + 1
                self.model[place] = replace(entry, times_sampled=times, score=score, priority=priority)

    @rule()
    def save(self) -> None:
        self.checkpoint = (self.buffer.state_dict(), list(self.model), self.next_row, len(self.done))

    @rule(new_process=st.booleans())
    def resume(self, new_process: bool) -> None:
        if new_process:
            self.buffer = self.reopened()
        state, model, next_row, num_done = self.checkpoint
        self.buffer.load_state_dict(state)
        self.model, self.next_row = list(model), next_row
        self.pending = self.done[num_done:] + self.pending
        del self.done[num_done:]

    @rule()
    def reopen(self) -> None:
        """Without a state: rows stay, what was noted about them is gone."""
        self.buffer = self.reopened()
        self.model = [Entry(entry.row, entry.trajectory) for entry in self.model]

    @rule()
    def unlink(self) -> None:
        self.buffer.unlink_evicted(int(self.checkpoint[0]["first_live_row"]))

    @invariant()
    def agrees(self) -> None:
        rows = [entry.row for entry in self.model]
        assert self.buffer.live_rows.tolist() == rows
        assert len(self.buffer) == len(rows) <= self.capacity
        batch = self.buffer.batch(self.buffer.live_rows)
        tokens = [np.concatenate([e.trajectory.prompt_tokens, e.trajectory.response_tokens]) for e in self.model]
        np.testing.assert_array_equal(batch.lengths, [len(each) for each in tokens])
        np.testing.assert_array_equal(batch.tokens, np.concatenate([np.empty(0, np.int32), *tokens]))
        np.testing.assert_array_equal(batch.reference.trajectory_score, [entry.score for entry in self.model])
        state = self.buffer.state_dict()
        np.testing.assert_array_equal(state["times_sampled"], [entry.times_sampled for entry in self.model])
        np.testing.assert_allclose(state["priority"], [entry.priority for entry in self.model], rtol=1e-14)
        assert (state["first_live_row"], state["next_row"]) == (rows[0] if rows else 0, self.next_row)


def test_buffer_is_a_list(make_group) -> None:
    class Machine(BufferMachine):
        def __init__(self) -> None:
            super().__init__(make_group)

    run_state_machine_as_test(Machine, settings=settings(max_examples=20, stateful_step_count=25))
