"""Ragged trajectories -> packed micro-batches (THD): whole trajectories end to end, cut over ranks by the layout.

Data-parallel ranks get micro-batches of their own, context-parallel ranks a part of the positions of each. What a
position predicts is settled before positions are cut. Padding follows a trajectory, and may end the pack as a segment
of its own; it is never in the loss.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reval_mcore.records import Batch


@dataclass(frozen=True)
class Cut:
    """How tokens are cut over ranks, and so what lengths must be multiples of."""

    context_parallel_size: int = 1
    context_parallel_rank: int = 0
    sequence_parallel_size: int = 1  # tensor-parallel ranks under sequence parallelism, else 1

    @property
    def sequence_multiple(self) -> int:
        """Of each sequence: a context-parallel rank takes two chunks of it, one near each end, to balance attention."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size

    @property
    def pack_multiple(self) -> int:
        """Of a whole micro-batch."""
        return math.lcm(self.sequence_multiple, self.context_parallel_size * self.sequence_parallel_size)

    def positions(self, cu_seqlens: np.ndarray) -> np.ndarray:
        """int64: positions of a pack that this rank holds, in the order in which it holds them."""
        size, rank = self.context_parallel_size, self.context_parallel_rank
        if size == 1:
            return np.arange(cu_seqlens[-1])
        parts = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            chunk = (end - start) // (2 * size)
            parts.append(np.arange(start + rank * chunk, start + (rank + 1) * chunk))
            parts.append(np.arange(end - (rank + 1) * chunk, end - rank * chunk))
        return np.concatenate(parts)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass on one rank. B trajectories, T positions here; position t predicts the token after it."""

    members: np.ndarray  # int64 [B]: places of its trajectories in the batch
    token_slots: np.ndarray  # int64 [T]: places of its tokens in the batch, -1 for padding
    tokens: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T]: the next token; 0 at the last position of a trajectory
    position_ids: torch.Tensor  # int64 [T]
    segment_ids: torch.Tensor  # int64 [T]: trajectory of each token, ascending from 0; B for padding at the end
    cu_seqlens: torch.Tensor  # int32: of the whole pack, over all context-parallel ranks, padding included
    max_seqlen: int
    in_loss: torch.Tensor  # bool [T]: the next token is a response token under the loss mask
    is_first: torch.Tensor  # bool [T]: ... and the first such of its trajectory
    first_position: torch.Tensor  # int64 [B]: position that predicts it, the state s_1; -1 where another rank holds it
    last_position: torch.Tensor  # int64 [B]: last token, the state after the response; -1 likewise


def plan_micro_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut trajectories of these lengths into sets of at most `max_tokens`: first-fit decreasing.

    Returns int64 index arrays, each ascending; together every index once. A function of the lengths alone.
    """
    assert len(lengths) > 0
    assert lengths.max() <= max_tokens, "the config refuses micro-batches shorter than a trajectory"
    bins: list[list[int]] = []
    room: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = next((i for i, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(index)
        room[place] -= length
    return [np.sort(np.array(members, dtype=np.int64)) for members in bins]


def plan_ranks(lengths: np.ndarray, max_tokens: int, num_ranks: int) -> list[list[np.ndarray]]:
    """Micro-batches for each of `num_ranks` data-parallel ranks: as many for each, with about as many tokens.

    Some may be empty. A function of its arguments alone, so that every rank plans the same.
    """
    fewest = plan_micro_batches(lengths, max_tokens)
    if num_ranks == 1:
        return [fewest]
    num_bins = math.ceil(len(fewest) / num_ranks) * num_ranks
    while (bins := _level(lengths, max_tokens, num_bins)) is None:
        num_bins += num_ranks
    bins.sort(key=lambda members: -int(lengths[members].sum()))
    ranks: list[list[np.ndarray]] = [[] for _ in range(num_ranks)]
    for start in range(0, num_bins, num_ranks):
        order = range(num_ranks) if start // num_ranks % 2 == 0 else reversed(range(num_ranks))
        for rank, members in zip(order, bins[start : start + num_ranks], strict=True):
            ranks[rank].append(members)
    return ranks


def _level(lengths: np.ndarray, max_tokens: int, num_bins: int) -> list[np.ndarray] | None:
    """Longest first, each into the emptiest bin; None where one would overflow."""
    heap = [(0, number) for number in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        load += int(lengths[index])
        if load > max_tokens:
            return None
        bins[number].append(index)
        heapq.heappush(heap, (load, number))
    return [np.sort(np.array(members, dtype=np.int64)) for members in bins]


def _round_up(value: np.ndarray | int, multiple: int) -> np.ndarray | int:
    return -(-value // multiple) * multiple


def build_micro_batch(batch: Batch, members: np.ndarray, device: torch.device, cut: Cut | None = None) -> MicroBatch:
    """Pack the trajectories `members` of the batch, in this order. Without members it is one pack of padding."""
    cut = cut or Cut()
    lengths = batch.lengths[members]
    padded = _round_up(lengths, cut.sequence_multiple)
    assert isinstance(padded, np.ndarray)
    total = int(padded.sum())
    tail = int(_round_up(max(total, 1), cut.pack_multiple)) - total
    if tail:
        padded = np.append(padded, tail)
    cu_seqlens = np.concatenate([[0], np.cumsum(padded, dtype=np.int64)])
    segment_ids = np.repeat(np.arange(len(padded)), padded)
    position_ids = np.arange(cu_seqlens[-1]) - cu_seqlens[:-1][segment_ids]
    real_lengths = np.append(lengths, 0)[: len(padded)]
    is_real = position_ids < real_lengths[segment_ids]
    starts = np.append(batch.cu_seqlens[members], 0)[: len(padded)]
    slots = np.where(is_real, starts[segment_ids] + position_ids, -1)
    tokens = np.where(is_real, batch.tokens[slots], 0).astype(np.int64)
    mask = is_real & batch.loss_mask[slots]
    last = cu_seqlens[: len(members)] + lengths - 1
    targets, in_loss = np.roll(tokens, -1), np.roll(mask, -1)  # shifted before any cutting of positions
    targets[last], in_loss[last] = 0, False
    counted = np.flatnonzero(in_loss)
    _, where = np.unique(segment_ids[counted], return_index=True)
    first = counted[where]
    assert len(first) == len(members), "a trajectory without a response token under the loss mask"
    is_first = np.zeros_like(in_loss)
    is_first[first] = True

    here = cut.positions(cu_seqlens)
    place = np.full(len(tokens), -1)
    place[here] = np.arange(len(here))

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        members=members,
        token_slots=slots[here],
        tokens=to_device(tokens[here]),
        targets=to_device(targets[here]),
        position_ids=to_device(position_ids[here]),
        segment_ids=to_device(segment_ids[here]),
        cu_seqlens=to_device(cu_seqlens.astype(np.int32)),
        max_seqlen=int(padded.max()),
        in_loss=to_device(in_loss[here]),
        is_first=to_device(is_first[here]),
        first_position=to_device(place[first]),
        last_position=to_device(place[last]),
    )


def pack(
    batch: Batch,
    *,
    max_tokens: int,
    device: torch.device,
    cut: Cut | None = None,
    data_parallel_size: int = 1,
    data_parallel_rank: int = 0,
) -> Sequence[MicroBatch]:
    """The micro-batches of one data-parallel rank."""
    cut = cut or Cut()
    lengths = _round_up(batch.lengths, cut.sequence_multiple)
    assert isinstance(lengths, np.ndarray)
    limit = int(_round_up(max_tokens, cut.sequence_multiple))
    plan = plan_ranks(lengths, limit, data_parallel_size)[data_parallel_rank]
    return [build_micro_batch(batch, members, device, cut) for members in plan]
