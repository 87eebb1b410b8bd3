"""The replay buffer of the first rank, as all ranks of a run see it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from reval_mcore.ranks import Ranks
from reval_mcore.records import Batch, RowRewards, Scores
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.shards import SHARDS


class SharedReplay:
    """The first rank has the index, the journal and the trajectories; what it says and samples goes to all.

    Every method is collective. See `ReplayBuffer` for what each does.
    """

    def __init__(self, buffer: ReplayBuffer | None, directory: Path, ranks: Ranks) -> None:
        assert (buffer is not None) == ranks.is_first
        self._buffer = buffer
        self._ranks = ranks
        self.shards = directory / SHARDS

    @property
    def _first(self) -> ReplayBuffer:
        assert self._buffer is not None, "asked for on another rank than the first"
        return self._buffer

    def __len__(self) -> int:
        return self._ranks.share(lambda: len(self._first))

    def live_rows(self) -> np.ndarray:
        return self._ranks.share(lambda: self._first.live_rows)

    def pending_shards(self) -> list[str]:
        return self._ranks.share(lambda: self._first.pending_shards())

    def discard_pending(self, *, keep: Collection[str]) -> None:
        self._ranks.share(lambda: self._first.discard_pending(keep=keep))

    def admit(self, shards: Collection[str]) -> np.ndarray:
        return self._ranks.share(lambda: self._first.admit(shards))

    def unlink_evicted(self) -> None:
        """For a run without checkpoints: nobody will need what was evicted."""
        self._ranks.share(lambda: self._first.unlink_evicted(self._first.first_live_row))

    def batch(self, rows: np.ndarray) -> Batch:
        return self._ranks.share(lambda: self._first.batch(rows))

    def sample(self, n: int, update_index: int) -> Batch:
        return self._ranks.share(lambda: self._first.sample(n, update_index))

    def stale_rows(self, rows: np.ndarray, reference_version: int) -> np.ndarray:
        return self._ranks.share(lambda: self._first.stale_rows(rows, reference_version))

    def set_reference_scores(self, rows: np.ndarray, scores: Scores, reference_version: int) -> None:
        self._ranks.share(lambda: self._first.set_reference_scores(rows, scores, reference_version))

    def record_update(self, rows: np.ndarray, residuals: np.ndarray) -> None:
        self._ranks.share(lambda: self._first.record_update(rows, residuals))

    def reset_residuals(self, residuals: Callable[[RowRewards], np.ndarray]) -> None:
        self._ranks.share(lambda: self._first.reset_residuals(residuals))

    def statistics(self, policy_version: int) -> dict[str, float]:
        return self._ranks.share(lambda: self._first.statistics(policy_version))
