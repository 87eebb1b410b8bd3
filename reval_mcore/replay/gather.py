"""Rows of many shards, put together to one batch."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from reval_mcore.records import Batch, ReferenceScores
from reval_mcore.replay.loading import ROW_DTYPE, LoadedShard
from reval_mcore.replay.shards import cumulative

_COLUMNS = [field.name for field in fields(Batch) if field.name in (ROW_DTYPE.names or ())]


class Gathered:
    """A batch of `size` rows in the making. Pieces are copies: a shard may leave the memory before the batch is whole.

    Slices end to end are twice as fast as one big index array.
    """

    def __init__(self, size: int) -> None:
        self.found = np.zeros(size, dtype=np.bool_)  # rows that were taken
        self._columns = np.empty(size, dtype=ROW_DTYPE)
        self._pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [_NOTHING] * size

    def take(self, shard: LoadedShard, places: np.ndarray, members: np.ndarray) -> None:
        """Rows `members` (int64) of the batch are those at `places` (int64) of the shard."""
        self.found[members] = True
        self._columns[members] = shard.rows[places]
        starts, ends = shard.cu_seqlens[places].tolist(), shard.cu_seqlens[places + 1].tolist()
        for member, start, end in zip(members.tolist(), starts, ends, strict=True):
            own = slice(start, end)
            self._pieces[member] = (
                shard.tokens[own].copy(),
                shard.loss_mask[own].copy(),
                shard.rollout_logprobs[own].copy(),
            )

    def batch(self, rows: np.ndarray, relative_probability: np.ndarray, reference: ReferenceScores) -> Batch:
        """`reference` has the rows that were found, `rows` and `relative_probability` all of them."""
        columns = self._columns[self.found]
        tokens, loss_mask, rollout_logprobs = (
            np.concatenate(pieces) for pieces in zip(_NOTHING, *self._pieces, strict=False)
        )
        return Batch(
            rows=rows[self.found],
            tokens=tokens,
            cu_seqlens=cumulative(columns["length"]),
            prompt_lengths=np.ascontiguousarray(columns["prompt_length"]),
            loss_mask=loss_mask,
            rollout_logprobs=rollout_logprobs,
            reference=reference,
            relative_probability=relative_probability[self.found],
            **{name: np.ascontiguousarray(columns[name]) for name in _COLUMNS},
        )


_NOTHING = (np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.float32))
