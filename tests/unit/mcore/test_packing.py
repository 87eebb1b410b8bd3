"""Packing against naive loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reval_mcore.mcore.packing import Cut, MicroBatch, build_micro_batch, pack, plan_micro_batches, plan_ranks
from reval_mcore.records import Batch
from tests.builders import make_batch

CPU = torch.device("cpu")


@st.composite
def lengths_and_limit(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    return np.array(lengths), draw(st.integers(max(lengths), 200))


@settings(max_examples=200)
@given(lengths_and_limit())
def test_plan_is_a_partition_into_sets_that_fit(case: tuple[np.ndarray, int]) -> None:
    lengths, limit = case
    plan = plan_micro_batches(lengths, limit)
    assert sorted(index for members in plan for index in members.tolist()) == list(range(len(lengths)))
    assert all(len(members) > 0 and lengths[members].sum() <= limit for members in plan)
    assert all((np.diff(members) > 0).all() for members in plan)


@settings(max_examples=100)
@given(lengths_and_limit())
def test_plan_is_a_function_of_the_lengths_and_wastes_less_than_half(case: tuple[np.ndarray, int]) -> None:
    lengths, limit = case
    plan = plan_micro_batches(lengths, limit)
    again = plan_micro_batches(lengths.copy(), limit)
    assert [members.tolist() for members in plan] == [members.tolist() for members in again]
    # first fit leaves at most one set half empty
    assert sum(2 * lengths[members].sum() <= limit for members in plan) <= 1


def test_a_trajectory_longer_than_the_limit_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError, match="shorter than a trajectory"):
        plan_micro_batches(np.array([3, 11]), 10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("holes", [True, False])
def test_every_field_of_a_micro_batch_equals_a_naive_loop(holes: bool, seed: int) -> None:
    batch = make_batch(11, seed=seed, holes=holes)
    members = np.random.default_rng(seed).permutation(11)[:6]
    packed = build_micro_batch(batch, members, CPU)

    slots, tokens, targets, positions, segments, in_loss, is_first = [], [], [], [], [], [], []
    first_position, last_position, starts = [], [], [0]
    for segment, member in enumerate(members.tolist()):
        start, end = int(batch.cu_seqlens[member]), int(batch.cu_seqlens[member + 1])
        found_first = False
        for slot in range(start, end):
            follows = slot + 1 < end
            counts = follows and bool(batch.loss_mask[slot + 1])
            if counts and not found_first:
                first_position.append(len(slots))
            is_first.append(counts and not found_first)
            found_first = found_first or counts
            slots.append(slot)
            tokens.append(int(batch.tokens[slot]))
            targets.append(int(batch.tokens[slot + 1]) if follows else 0)
            positions.append(slot - start)
            segments.append(segment)
            in_loss.append(counts)
        last_position.append(len(slots) - 1)
        starts.append(len(slots))

    assert packed.members.tolist() == members.tolist()
    assert packed.token_slots.tolist() == slots
    assert packed.tokens.tolist() == tokens
    assert packed.targets.tolist() == targets
    assert packed.position_ids.tolist() == positions
    assert packed.segment_ids.tolist() == segments
    assert packed.in_loss.tolist() == in_loss
    assert packed.is_first.tolist() == is_first
    assert packed.first_position.tolist() == first_position
    assert packed.last_position.tolist() == last_position
    assert packed.cu_seqlens.tolist() == starts
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == max(int(batch.lengths[member]) for member in members)


def test_several_turns_count_the_policys_tokens_only_and_start_at_the_first_of_them() -> None:
    """One prompt token; the reply is environment, policy, policy, environment, policy."""
    one = make_batch(1)
    mask = np.array([False, False, True, True, False, True])
    batch = _with_tokens(one, np.array([9, 8, 7, 6, 5, 4], np.int32), mask)
    packed = build_micro_batch(batch, np.array([0]), CPU)
    assert packed.in_loss.tolist() == [False, True, True, False, True, False]
    assert packed.is_first.tolist() == [False, True, False, False, False, False]
    assert packed.targets.tolist() == [8, 7, 6, 5, 4, 0]
    assert packed.first_position.tolist() == [1]
    assert packed.last_position.tolist() == [5]


def test_a_trajectory_with_nothing_in_the_loss_is_a_programmer_error() -> None:
    batch = _with_tokens(make_batch(1), np.array([1, 2, 3], np.int32), np.zeros(3, bool))
    with pytest.raises(AssertionError, match="without a response token"):
        build_micro_batch(batch, np.array([0]), CPU)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 15), st.integers(40, 120))
def test_packed_tokens_are_the_batch_and_nothing_else(seed: int, size: int, limit: int) -> None:
    batch = make_batch(size, seed=seed)
    micro_batches = pack(batch, max_tokens=limit, device=CPU)
    slots = np.concatenate([packed.token_slots for packed in micro_batches])
    tokens = np.concatenate([packed.tokens.numpy() for packed in micro_batches])
    assert sorted(slots.tolist()) == list(range(len(batch.tokens)))
    np.testing.assert_array_equal(tokens, batch.tokens[slots])
    assert sum(int(packed.in_loss.sum()) for packed in micro_batches) == int(batch.loss_mask.sum())


# ---------------------------------------------------------------- over ranks


@settings(max_examples=200)
@given(lengths_and_limit(), st.integers(2, 5))
def test_data_parallel_ranks_get_as_many_micro_batches_and_about_as_many_tokens(
    case: tuple[np.ndarray, int], num_ranks: int
) -> None:
    lengths, limit = case
    plan = plan_ranks(lengths, limit, num_ranks)
    assert len(plan) == num_ranks
    assert len({len(of_rank) for of_rank in plan}) == 1
    members = [index for of_rank in plan for members in of_rank for index in members.tolist()]
    assert sorted(members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= limit for of_rank in plan for members in of_rank)
    # longest first into the emptiest: micro-batches of a rank differ from another's by one trajectory each at most
    loads = [sum(int(lengths[members].sum()) for members in of_rank) for of_rank in plan]
    assert max(loads) - min(loads) <= lengths.max() * len(plan[0])


def test_one_trajectory_on_two_ranks_leaves_one_of_them_padding() -> None:
    batch = make_batch(1)
    first, second = (
        pack(batch, max_tokens=100, device=CPU, data_parallel_size=2, data_parallel_rank=rank) for rank in (0, 1)
    )
    assert [len(each.members) for each in (*first, *second)] == [1, 0]
    assert not second[0].in_loss.any()
    assert len(second[0].tokens) == second[0].max_seqlen == 1
    assert (second[0].segment_ids == 0).all()  # number B, of no trajectory


CUTS = [Cut(cp, 0, sp) for cp in (1, 2, 4) for sp in (1, 2, 4)]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"cp{cut.context_parallel_size}_sp{cut.sequence_parallel_size}")
@pytest.mark.parametrize("seed", range(3))
def test_context_parallel_ranks_hold_every_position_once_and_predict_what_the_whole_does(cut: Cut, seed: int) -> None:
    batch = make_batch(7, seed=seed)
    members = np.arange(7)
    whole = build_micro_batch(batch, members, CPU)
    ranks = [
        build_micro_batch(batch, members, CPU, replace(cut, context_parallel_rank=rank))
        for rank in range(cut.context_parallel_size)
    ]
    total = int(ranks[0].cu_seqlens[-1])
    assert total % (cut.context_parallel_size * cut.sequence_parallel_size) == 0
    assert all((np.diff(packed.cu_seqlens) % cut.sequence_multiple == 0).all() for packed in ranks)
    assert {len(packed.tokens) for packed in ranks} == {total // cut.context_parallel_size}
    assert all((packed.segment_ids.diff() >= 0).all() for packed in ranks)

    def by_slot(packed: MicroBatch) -> dict[int, tuple[int, ...]]:
        """What is said of each real token."""
        columns = (packed.tokens, packed.targets, packed.position_ids, packed.segment_ids, packed.in_loss)
        rows = zip(packed.token_slots.tolist(), *(column.tolist() for column in columns), strict=True)
        return {slot: tuple(rest) for slot, *rest in rows if slot >= 0}

    held = [by_slot(packed) for packed in ranks]
    assert sum(map(len, held)) == len(batch.tokens)
    assert {slot: row for of_rank in held for slot, row in of_rank.items()} == by_slot(whole)
    for name in ("first_position", "last_position"):
        places = torch.stack([getattr(packed, name) for packed in ranks])
        assert ((places >= 0).sum(0) == 1).all()  # each is on one rank
        for column, place in zip(places.T.tolist(), getattr(whole, name).tolist(), strict=True):
            rank = next(rank for rank, at in enumerate(column) if at >= 0)
            assert ranks[rank].token_slots[column[rank]] == whole.token_slots[place]


def test_a_rank_holds_two_chunks_of_each_sequence_one_near_each_end() -> None:
    ends = np.array([0, 8, 24])
    assert Cut(2, 0).positions(ends).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert Cut(2, 1).positions(ends).tolist() == [2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19]


def _with_tokens(batch: Batch, tokens: np.ndarray, mask: np.ndarray) -> Batch:
    return replace(
        batch,
        tokens=tokens,
        loss_mask=mask,
        cu_seqlens=np.array([0, len(tokens)]),
        prompt_lengths=np.array([1]),
        rollout_logprobs=np.zeros(len(tokens), np.float32),
    )
