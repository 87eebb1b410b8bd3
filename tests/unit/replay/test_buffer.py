from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from reval_mcore.records import Batch, Scores, Trajectory
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.samplers import PrioritizedSampler
from reval_mcore.replay.shards import ShardWriter, read_trajectories


def make_writer(directory: Path, *, writer: str = "trainer", incarnation: int = 0) -> ShardWriter:
    return ShardWriter(directory, writer=writer, incarnation=incarnation, tokenizer_hash="t", template_hash="t")


def open_buffer(directory: Path, capacity: int = 100, seed: int = 0) -> ReplayBuffer:
    return ReplayBuffer(directory, capacity=capacity, seed=seed)


def make_scores(values: np.ndarray) -> Scores:
    return Scores(values, values + 1, values + 2, np.zeros(0, np.float32))


def assert_batch(batch: Batch, rows: list[int], expected: list[Trajectory]) -> None:
    assert batch.rows.tolist() == rows
    assert len(batch) == len(expected)
    for b, t in enumerate(expected):
        own = slice(batch.cu_seqlens[b], batch.cu_seqlens[b + 1])
        prompt = len(t.prompt_tokens)
        assert batch.prompt_lengths[b] == prompt
        np.testing.assert_array_equal(batch.tokens[own], np.concatenate([t.prompt_tokens, t.response_tokens]))
        np.testing.assert_array_equal(batch.loss_mask[own], np.concatenate([np.zeros(prompt, bool), t.loss_mask]))
        np.testing.assert_array_equal(
            batch.rollout_logprobs[own], np.concatenate([np.zeros(prompt, np.float32), t.rollout_logprobs])
        )
    assert batch.policy_version.tolist() == [t.policy_version for t in expected]
    assert batch.reward.tolist() == [t.reward for t in expected]
    assert batch.group_reward_mean.tolist() == [t.group_reward_mean for t in expected]
    assert batch.has_verdict.all()
    assert batch.finish_reason.tolist() == [t.finish_reason for t in expected]


def test_batch_has_the_rows_asked_for_in_that_order(tmp_path: Path, make_group) -> None:
    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path)
    trajectories: list[Trajectory] = []
    for index in range(3):
        trajectories += make_group(f"g{index}", size=3, version=index)
        writer.write(trajectories[-3:])
    assert buffer.admit().tolist() == list(range(9))
    rows = [7, 0, 8, 3, 0]
    batch = buffer.batch(np.array(rows))
    assert_batch(batch, rows, [trajectories[row] for row in rows])
    dtypes = {name: getattr(batch, name).dtype for name in ("rows", "tokens", "cu_seqlens", "reward", "policy_version")}
    assert dtypes == {"rows": "i8", "tokens": "i4", "cu_seqlens": "i8", "reward": "f4", "policy_version": "i8"}
    assert np.isnan(batch.reference.trajectory_score).all()
    assert (batch.reference.reference_version == -1).all()
    assert len(buffer.batch(np.empty(0, np.int64))) == 0


def test_sample_is_a_function_of_seed_update_and_journal(tmp_path: Path, make_group) -> None:
    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path)
    writer.write(make_group("a", size=20))
    buffer.admit()
    first = buffer.sample(8, update_index=5).rows
    np.testing.assert_array_equal(buffer.sample(8, update_index=5).rows, first)
    np.testing.assert_array_equal(open_buffer(tmp_path).sample(8, update_index=5).rows, first)
    assert buffer.sample(8, update_index=6).rows.tolist() != first.tolist()
    assert open_buffer(tmp_path, seed=1).sample(8, update_index=5).rows.tolist() != first.tolist()
    assert sorted(buffer.sample(50, update_index=0).rows.tolist()) == list(range(20))
    writer.write(make_group("b"))
    buffer.admit()
    assert buffer.sample(8, update_index=5).rows.tolist() != first.tolist()


def test_admission_is_idempotent(tmp_path: Path, make_group) -> None:
    """A block done twice, and one more group: only the new trajectories get rows."""
    make_writer(tmp_path, writer="a").write([*make_group("g0", size=2), *make_group("g1", size=2)])
    buffer = open_buffer(tmp_path)
    assert buffer.admit().tolist() == [0, 1, 2, 3]
    assert buffer.admit().tolist() == []
    writer = make_writer(tmp_path, writer="b")
    new = make_group("g2", size=2)
    writer.write([*make_group("g1", size=2), *new, *make_group("g0", size=2)])
    writer.write(make_group("g0", size=2))
    assert buffer.admit().tolist() == [4, 5]
    position = buffer.journal_position
    for each in (buffer, open_buffer(tmp_path)):
        assert_batch(each.batch(np.array([4, 5])), [4, 5], new)
        assert each.live_rows.tolist() == list(range(6))
        assert each.admit().tolist() == []
        assert each.journal_position == position


@pytest.mark.parametrize("reopen", [False, True])
def test_an_evicted_trajectory_may_come_back_as_a_new_row(tmp_path: Path, make_group, reopen: bool) -> None:
    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path, capacity=3)
    writer.write([*make_group("g0", size=2), *make_group("g1", size=2)])
    assert buffer.admit().tolist() == [1, 2, 3]
    buffer = open_buffer(tmp_path, capacity=3) if reopen else buffer
    writer.write(make_group("g0", size=2))  # of these g0/0 was evicted, g0/1 is live
    assert buffer.admit().tolist() == [4]
    assert_batch(buffer.batch(np.array([4])), [4], make_group("g0", size=2)[:1])


def test_admission_by_name_and_in_the_order_of_names(tmp_path: Path, make_group) -> None:
    late = make_writer(tmp_path, writer="b", incarnation=0)
    names = [late.write(make_group("b0"))]
    for incarnation in (9, 10):
        names.insert(
            -1, make_writer(tmp_path, writer="a", incarnation=incarnation).write(make_group(f"a{incarnation}"))
        )
    (tmp_path / "shards" / ".nfs000001").touch()
    buffer = open_buffer(tmp_path)
    assert buffer.pending_shards() == names
    assert buffer.admit([names[1]]).tolist() == [0]
    assert buffer.pending_shards() == [names[0], names[2]]
    assert buffer.admit([names[1], names[2]]).tolist() == [1]
    assert buffer.admit().tolist() == [2]
    assert_batch(buffer.batch(np.array([2])), [2], make_group("a9"))
    with pytest.raises(FileNotFoundError):
        buffer.admit(["a-0001-000000.parquet"])


def test_the_journal_does_not_depend_on_how_admissions_are_grouped(tmp_path: Path, make_group) -> None:
    one_by_one, at_once = open_buffer(tmp_path / "x", 7), open_buffer(tmp_path / "y", 7)
    writers = [make_writer(tmp_path / name) for name in "xy"]
    for index in range(6):
        for writer in writers:
            writer.write(make_group(f"g{index}", size=2))
        one_by_one.admit()
    assert at_once.admit().tolist() == list(range(5, 12))  # the new rows that the call did not evict itself
    assert (tmp_path / "x" / "journal.jsonl").read_bytes() == (tmp_path / "y" / "journal.jsonl").read_bytes()


def test_reference_scores_carry_their_version(tmp_path: Path, make_group) -> None:
    make_writer(tmp_path).write(make_group("a", size=5))
    buffer = open_buffer(tmp_path)
    rows = buffer.admit()
    assert buffer.stale_rows(rows, 0).tolist() == rows.tolist()
    buffer.set_reference_scores(np.array([3, 1]), make_scores(np.array([30.0, 10.0])), 0)
    assert buffer.stale_rows(rows, 0).tolist() == [0, 2, 4]
    assert buffer.stale_rows(np.array([4, 3]), 1).tolist() == [4, 3]
    reference = buffer.batch(np.array([1, 3])).reference
    assert reference.trajectory_score.tolist() == [10.0, 30.0]
    assert reference.initial_value.tolist() == [11.0, 31.0]
    assert reference.final_value.tolist() == [12.0, 32.0]
    assert reference.reference_version.tolist() == [0, 0]


def test_statistics(tmp_path: Path, make_group) -> None:
    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path, capacity=4)
    assert set(buffer.statistics(0).values()) == {0.0}
    writer.write(make_group("a", size=3, version=1))
    buffer.record_update(buffer.admit()[:1], np.zeros(1))
    writer.write(make_group("b", size=3, version=4))
    buffer.admit()
    buffer.record_update(np.array([2, 5]), np.array([0.5, -0.5]))
    buffer.record_update(np.array([5]), np.array([0.25]))
    statistics = buffer.statistics(policy_version=6)
    assert statistics == {
        "size": 4.0,
        "replay_ratio": 4 / 6,
        "age_mean": (5 + 3 * 2) / 4,
        "age_p50": 2.0,
        "age_p95": pytest.approx(2 + 0.85 * 3),
        "age_max": 5.0,
        "times_sampled_mean": 3 / 4,
        "times_sampled_share/0": 1 / 2,
        "times_sampled_share/1": 1 / 4,
        "times_sampled_share/2": 1 / 4,
        **{f"times_sampled_share/{name}": 0.0 for name in ("3-4", "5-8", "9-16", "17+")},
        "evicted_unsampled_share": 1 / 2,
        "num_quarantined": 0.0,
    }


def test_memory_is_bounded_and_changes_nothing(tmp_path: Path, make_group) -> None:
    writer = make_writer(tmp_path)
    for index in range(12):
        writer.write(make_group(f"g{index}", size=4))
    free = open_buffer(tmp_path)
    free.admit()
    size = free.memory_bytes // 12
    bounded = ReplayBuffer(tmp_path, capacity=100, seed=0, max_memory_bytes=3 * size)
    for update in range(20):
        one, other = free.sample(7, update), bounded.sample(7, update)
        for name in ("rows", "tokens", "loss_mask", "rollout_logprobs", "reward", "cu_seqlens"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert 0 < bounded.memory_bytes <= 3.5 * size


def test_a_block_done_twice_adds_nothing_even_after_its_rows_left(tmp_path: Path, make_group) -> None:
    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path, capacity=2)
    writer.write(make_group("g0", size=2))
    writer.write(make_group("g1", size=2))
    buffer.admit()
    writer.write([*make_group("g0", size=2), *make_group("g2", size=1)])  # from a collector that was thought dead
    assert buffer.admit(is_done=lambda name: name.startswith(("g0", "g1"))).tolist() == [4]
    reopened = open_buffer(tmp_path, capacity=2)
    assert reopened.live_rows.tolist() == [3, 4]
    assert_batch(reopened.batch(np.array([4])), [4], make_group("g2"))


def test_evicted_shards_stay_for_readers(tmp_path: Path, make_group) -> None:
    now = [0.0]
    writer = make_writer(tmp_path)
    names = [writer.write(make_group(f"g{index}", size=2)) for index in range(3)]
    buffer = ReplayBuffer(tmp_path, capacity=2, seed=0, unlink_delay_s=60.0, clock=lambda: now[0])
    buffer.admit()
    assert buffer.unlink_evicted(10**6) == []
    now[0] = 59.0
    assert buffer.unlink_evicted(2) == []
    now[0] = 30.0  # a clock that goes back
    assert buffer.unlink_evicted(10**6) == []
    now[0] = 91.0
    assert buffer.unlink_evicted(10**6) == names[:2]


PRIORITIZED = PrioritizedSampler(beta=0.5, exponent=0.6, epsilon=0.01, tau_versions=4.0)


def open_prioritized(directory: Path, capacity: int = 100) -> ReplayBuffer:
    return ReplayBuffer(directory, capacity=capacity, seed=0, sampler=PRIORITIZED)


def test_priorities_and_relative_probabilities_are_the_dense_formulas(tmp_path: Path, make_group) -> None:
    writer, buffer = make_writer(tmp_path), open_prioritized(tmp_path)
    writer.write(make_group("a", size=4, version=2))
    buffer.admit()
    residuals = np.array([3.0, np.nan, -0.5])
    buffer.record_update(np.array([0, 1, 3]), residuals)
    writer.write(make_group("b", size=3, version=7))
    buffer.admit()
    largest = max((abs(0.5 * 3.0) + 0.01) ** 0.6, 1.0)
    base = np.array([(abs(0.5 * 3.0) + 0.01) ** 0.6, 1.0, 1.0, (0.25 + 0.01) ** 0.6, *[largest] * 3])
    weights = base * np.exp(-np.array([5, 5, 5, 5, 0, 0, 0]) / 4.0)
    expected = weights / weights.sum() * 7
    batch = buffer.sample(7, 0)
    assert sorted(batch.rows.tolist()) == list(range(7))
    np.testing.assert_allclose(batch.relative_probability, expected[batch.rows], rtol=1e-12)
    assert buffer.batch(batch.rows).relative_probability.tolist() == [1.0] * 7

    buffer.reset_residuals(lambda rewards: -rewards.reward / 0.5)
    reward = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])  # of make_group
    weights = (np.abs(reward) + 0.01) ** 0.6 * np.exp(-np.array([5, 5, 5, 5, 0, 0, 0]) / 4.0)
    batch = buffer.sample(7, 1)
    np.testing.assert_allclose(batch.relative_probability, (weights / weights.sum() * 7)[batch.rows], rtol=1e-12)
    np.testing.assert_array_equal(buffer.state_dict()["last_residual"], -reward / 0.5)


def test_prioritized_resume_repeats_the_run_bit_for_bit(tmp_path: Path, make_group) -> None:
    def go_on(buffer: ReplayBuffer) -> list[object]:
        seen: list[object] = []
        for update in range(4, 12):
            buffer.admit([names[update]])
            for half in (0, 1):
                batch = buffer.sample(4, 2 * update + half)
                buffer.record_update(batch.rows, np.sin(batch.rows + update) * 3)
                seen += [batch.rows.tolist(), batch.relative_probability.tolist(), batch.tokens.tolist()]
            if update == 8:
                buffer.reset_residuals(lambda rewards: -rewards.reward / 0.3)
        return seen

    writer, buffer = make_writer(tmp_path), open_prioritized(tmp_path, capacity=13)
    names = [writer.write(make_group(f"g{index}", size=3, version=index)) for index in range(12)]
    buffer.admit(names[:4])
    buffer.record_update(buffer.sample(5, 0).rows, np.array([1.0, -2.0, 0.0, 1e3, np.inf]))
    checkpoint = buffer.state_dict()
    expected, end = go_on(buffer), buffer.state_dict()
    resumed = ReplayBuffer(tmp_path, capacity=13, seed=0, sampler=PRIORITIZED, max_memory_bytes=1)
    resumed.load_state_dict(checkpoint)
    assert go_on(resumed) == expected
    for name, value in resumed.state_dict().items():
        assert np.array_equal(value, end[name], equal_nan=True), name


def test_evicted_rows_are_refused(tmp_path: Path, make_group) -> None:
    make_writer(tmp_path).write(make_group("a", size=5))
    buffer = open_buffer(tmp_path, capacity=3)
    buffer.admit()
    for rows in (np.array([1, 2]), np.array([4, 5])):
        with pytest.raises(AssertionError, match="rows that"):
            buffer.batch(rows)
    with pytest.raises(AssertionError, match="more than once"):
        buffer.record_update(np.array([3, 3]), np.zeros(2))


def test_unlink_keeps_what_a_checkpoint_needs(tmp_path: Path, make_group) -> None:
    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path, capacity=3)
    names = [writer.write(make_group(f"g{index}", size=2)) for index in range(3)]
    buffer.admit(names[:2])
    checkpoint = buffer.state_dict()  # rows 1, 2, 3 are live
    names += [writer.write(make_group(f"g{index}", size=2)) for index in range(3, 6)]
    buffer.admit()
    assert buffer.first_live_row == 9
    assert buffer.unlink_evicted(int(checkpoint["first_live_row"])) == []
    buffer.load_state_dict(checkpoint)
    assert buffer.live_rows.tolist() == [1, 2, 3]
    assert_batch(buffer.batch(np.array([1])), [1], make_group("g0", size=2)[1:])
    buffer.admit()
    assert buffer.unlink_evicted(3) == names[:1]
    assert buffer.unlink_evicted(10**6) == names[1:4]
    assert sorted(os.listdir(tmp_path / "shards")) == names[4:]
    assert open_buffer(tmp_path, capacity=3).live_rows.tolist() == [9, 10, 11]


def test_resume_repeats_the_run_bit_for_bit(tmp_path: Path, make_group) -> None:
    """Updates after a checkpoint, then back to it in a new process: same rows, draws, states and journal."""

    def go_on(buffer: ReplayBuffer) -> list[object]:
        seen: list[object] = []
        for update in range(names.index(names[4]), 8):
            seen.append(buffer.admit([names[update]]).tolist())
            batch = buffer.sample(4, update)
            buffer.record_update(batch.rows, batch.rows * 0.5)
            buffer.set_reference_scores(batch.rows, make_scores(batch.rows / 3), update)
            seen += [batch.rows.tolist(), batch.tokens.tolist(), buffer.statistics(update)]
        return seen

    writer, buffer = make_writer(tmp_path), open_buffer(tmp_path, capacity=10)
    names = [writer.write(make_group(f"g{index}", size=3, version=index)) for index in range(8)]
    buffer.admit(names[:4])
    buffer.record_update(buffer.sample(5, 0).rows, np.ones(5))
    checkpoint = buffer.state_dict()
    expected, journal, end = go_on(buffer), (tmp_path / "journal.jsonl").read_bytes(), buffer.state_dict()

    resumed = open_buffer(tmp_path, capacity=10)
    resumed.load_state_dict(checkpoint)
    assert resumed.pending_shards() == names[4:]
    assert go_on(resumed) == expected
    assert (tmp_path / "journal.jsonl").read_bytes() == journal
    for name, value in resumed.state_dict().items():
        assert np.array_equal(value, end[name], equal_nan=True), name


def test_state_of_another_directory_is_refused_and_nothing_is_cut(tmp_path: Path, make_group) -> None:
    make_writer(tmp_path / "x").write(make_group("a", size=2))
    make_writer(tmp_path / "y").write(make_group("a", size=3))
    one, other = open_buffer(tmp_path / "x"), open_buffer(tmp_path / "y")
    one.admit()
    other.admit()
    with pytest.raises(ValueError, match=r"rows \(0, 3\) at position 1, but \(0, 2\) in the checkpoint"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="has 1 events, cannot go back to position 7"):
        other.load_state_dict({**other.state_dict(), "journal_position": 7})
    assert open_buffer(tmp_path / "y").live_rows.tolist() == [0, 1, 2]


def test_rewind_to_nothing(tmp_path: Path, make_group) -> None:
    name = make_writer(tmp_path).write(make_group("a", size=2))
    buffer = open_buffer(tmp_path)
    buffer.admit()
    buffer.rewind(0)
    assert (len(buffer), buffer.journal_position, buffer.pending_shards()) == (0, 0, [name])
    assert [t.trajectory_id for t in read_trajectories(tmp_path / "shards" / name)] == ["a/0", "a/1"]
