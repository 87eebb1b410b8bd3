"""Ragged trajectories -> packed micro-batches (THD): whole trajectories end to end, no padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reval_mcore.records import Batch


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. B trajectories, T packed tokens; position t predicts token t + 1 of its trajectory."""

    members: np.ndarray  # int64 [B]: places of its trajectories in the batch
    token_slots: np.ndarray  # int64 [T]: places of its tokens in the batch
    tokens: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T]: the next token; 0 at the last position of a trajectory
    position_ids: torch.Tensor  # int64 [T]
    segment_ids: torch.Tensor  # int64 [T]: trajectory of each token, 0 to B - 1
    cu_seqlens: torch.Tensor  # int32 [B + 1]
    max_seqlen: int
    in_loss: torch.Tensor  # bool [T]: the next token is a response token under the loss mask
    is_first: torch.Tensor  # bool [T]: ... and the first such of its trajectory
    first_position: torch.Tensor  # int64 [B]: position that predicts it, the state s_1
    last_position: torch.Tensor  # int64 [B]: last token, the state after the response


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


def build_micro_batch(batch: Batch, members: np.ndarray, device: torch.device) -> MicroBatch:
    """Pack the trajectories `members` of the batch, in this order."""
    lengths = batch.lengths[members]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    segment_ids = np.repeat(np.arange(len(members)), lengths)
    position_ids = np.arange(cu_seqlens[-1]) - cu_seqlens[:-1][segment_ids]
    slots = batch.cu_seqlens[members][segment_ids] + position_ids
    last = cu_seqlens[1:] - 1
    tokens, mask = batch.tokens[slots].astype(np.int64), batch.loss_mask[slots]
    targets, in_loss = np.roll(tokens, -1), np.roll(mask, -1)  # shifted before any sharding of positions
    targets[last], in_loss[last] = 0, False
    counted = np.flatnonzero(in_loss)
    _, where = np.unique(segment_ids[counted], return_index=True)
    first = counted[where]
    assert len(first) == len(members), "a trajectory without a response token under the loss mask"
    is_first = np.zeros_like(in_loss)
    is_first[first] = True

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        members=members,
        token_slots=slots,
        tokens=to_device(tokens),
        targets=to_device(targets),
        position_ids=to_device(position_ids),
        segment_ids=to_device(segment_ids),
        cu_seqlens=to_device(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        in_loss=to_device(in_loss),
        is_first=to_device(is_first),
        first_position=to_device(first),
        last_position=to_device(last),
    )


def pack(batch: Batch, *, max_tokens: int, device: torch.device) -> Sequence[MicroBatch]:
    return [build_micro_batch(batch, members, device) for members in plan_micro_batches(batch.lengths, max_tokens)]
