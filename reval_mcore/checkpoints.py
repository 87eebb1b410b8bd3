"""What a run saves, and how it comes back: weights, optimizer, reference, replay index and counters, at one moment.

A checkpoint counts once `latest` points to it; until then the run is that of the one before. Deleting follows
publishing: first old checkpoints, then the replay shards that none of the kept ones needs.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reval_mcore.config import CheckpointConfig
from reval_mcore.durable import write_json
from reval_mcore.mcore.checkpoint import PendingSave
from reval_mcore.mcore.learner import Learner
from reval_mcore.ranks import Ranks
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.run_directory import (
    REPLAY_STATE,
    TRAINER_STATE,
    WEIGHTS,
    RunDirectory,
    read_arrays,
    read_trainer_state,
    write_arrays,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Unpublished:
    iteration: int
    directory: Path
    weights: PendingSave


class Checkpoints:
    """Saves and restores a learner and a replay buffer in a run directory. At most one save is on its way.

    Collective: all ranks write their weights, the first one the rest, and it publishes.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: RunDirectory,
        *,
        learner: Learner,
        replay: ReplayBuffer | None,
        ranks: Ranks,
    ) -> None:
        """`replay` is the first rank's; the others have none."""
        self._config = config
        self._directory = directory
        self._learner = learner
        self._buffer = replay
        self._ranks = ranks
        self._pending: _Unpublished | None = None

    @property
    def _replay(self) -> ReplayBuffer:
        assert self._buffer is not None, "asked for on another rank than the first"
        return self._buffer

    def save(self, iteration: int, counters: Mapping[str, Any]) -> None:
        """Begin to save the state of this moment. In the background, `publish` completes it. Raises OSError.

        Nothing happens where the state after this iteration is saved already, or on its way.
        """
        if self._pending is not None and self._pending.iteration == iteration:
            return
        if self._ranks.share(lambda: self._directory.has_checkpoint(iteration)):
            return
        self.publish()
        written = self._ranks.share(lambda: self._begin(iteration, counters))
        with self._whole_or_gone(written):
            weights = self._learner.save(written / WEIGHTS, in_background=self._config.async_save)
        self._pending = _Unpublished(iteration, written, weights)
        if not self._config.async_save:
            self.publish()

    def _begin(self, iteration: int, counters: Mapping[str, Any]) -> Path:
        """All but the weights."""
        written = self._directory.begin_checkpoint(iteration)
        with self._whole_or_gone(written):
            write_json(written / TRAINER_STATE, {**counters, "first_live_row": self._replay.first_live_row})
            write_arrays(written / REPLAY_STATE, self._replay.state_dict())
        return written

    def publish_if_done(self) -> None:
        """Publish what is on its way if that takes no waiting."""
        if self._pending is not None and self._pending.weights.is_done():
            self.publish()

    def publish(self) -> None:
        """Wait for the save that is on its way, if there is one, and make it count. Raises OSError."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._whole_or_gone(pending.directory):
            crc32s = {f"{WEIGHTS}/{name}": value for name, value in pending.weights.finish().items()}
            path = self._ranks.share(lambda: self._directory.publish_checkpoint(pending.directory, crc32s=crc32s))
        self._ranks.share(self._remove_unneeded)
        logger.info("checkpoint %s", path)

    def _remove_unneeded(self) -> None:
        """Checkpoints above `keep`, then the shards that no kept one needs."""
        self._directory.remove_checkpoints(keep=self._config.keep)
        needed = [read_trainer_state(path)["first_live_row"] for path in self._directory.kept_checkpoints()]
        self._replay.unlink_evicted(min(needed))

    @contextlib.contextmanager
    def _whole_or_gone(self, written: Path) -> Iterator[None]:
        """An OSError within it removes `written`, which must not hold the space that is missing, and names a file."""
        try:
            yield
        except OSError as error:
            self._remove(written)
            raise OSError(error.errno, error.strerror or str(error), error.filename or str(written)) from error

    def abandon(self) -> None:
        """End a save that is on its way; for a run that ends by an error. Not collective."""
        if self._pending is not None:
            self._pending.weights.abandon()
            self._remove(self._pending.directory)
            self._pending = None

    def _remove(self, written: Path) -> None:
        if self._ranks.is_first:
            shutil.rmtree(written, ignore_errors=True)

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Bring learner and buffer back to where `checkpoint` was taken; returns the counters that `save` was given."""
        counters = self._ranks.share(lambda: read_trainer_state(checkpoint))
        del counters["first_live_row"]
        self._learner.load(checkpoint / WEIGHTS)
        self._ranks.share(lambda: self._replay.load_state_dict(read_arrays(checkpoint / REPLAY_STATE)))
        # what a kill after publishing left; after the last checkpoint nobody else would
        self._ranks.share(self._remove_unneeded)
        return counters
