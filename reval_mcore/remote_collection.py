"""Collection by other processes, as the trainer sees it: who may begin what, what is there, and when it is enough.

One block of the prompt order is the prompts of one iteration, and one shard. Collectors run ahead of the trainer by at
most `rollout.max_versions_behind` blocks. An iteration takes one block, the first that is there: were it to take all,
the collectors would have lost their lead for good.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reval_mcore.collector import Answerer, Collected, as_text, outcomes_of, response_metrics
from reval_mcore.config import Config
from reval_mcore.control import Collection, Heartbeat, LeaseKeeper, News, WakeUps, block_of, quota_blocks
from reval_mcore.ranks import Ranks
from reval_mcore.records import Prompt
from reval_mcore.replay.shards import SHARDS, CorruptShardError, read_trajectories
from reval_mcore.rollout.engine import EngineError

logger = logging.getLogger(__name__)


class Patience:
    """With nobody collecting."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._heard = time.monotonic()

    def check(self, hearts: list[Heartbeat]) -> list[Heartbeat]:
        """`hearts`; raises EngineError where there were none for too long."""
        if hearts:
            self._heard = time.monotonic()
        if time.monotonic() - self._heard > self._patience_s:
            raise EngineError(f"nobody collects for {self._patience_s:g} s; start reval collect CONFIG")
        return hearts


class RemoteCollection:
    """Has the methods of a Collector. The first rank watches; every rank has one, and all call it together."""

    def __init__(
        self,
        config: Config,
        control: Path,
        replay: Path,
        prompts: Sequence[Prompt],
        answerer: Answerer,
        ranks: Ranks,
        is_asked_to_stop: Callable[[], bool],
        wakeups: WakeUps,
    ) -> None:
        self._config = config
        self._control = control
        self._shards = replay / SHARDS
        self._prompts = prompts
        self._answerer = answerer
        self._ranks = ranks
        self._is_asked_to_stop = is_asked_to_stop
        self._wakeups = wakeups
        self._told: Collection | None = None  # to collectors
        self._blocks: dict[str, int | None] = {}  # of the shards that were heard of; None: of another making
        self._keeper: LeaseKeeper | None = None
        self.restore({})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` gave. What collectors did since is done again, or taken over."""
        collection = Collection.from_json(state) if state else Collection()
        if self._ranks.is_first:
            self._keeper = LeaseKeeper(self._control, collection, timeout_s=self._config.rollout.collector_timeout_s)

    def state(self) -> dict[str, Any]:
        return self._ranks.share(lambda: self._first.collection.to_json())

    @property
    def _first(self) -> LeaseKeeper:
        assert self._keeper is not None, "asked for on another rank than the first"
        return self._keeper

    def take_over(self, directory: Path, shards: Sequence[str]) -> list[str]:
        """These were not admitted before the last checkpoint; those that hold a block which is not done are kept, to be
        admitted. The others are of no use: blocks that were done twice, and what cannot be read."""
        return self._ranks.share(lambda: list(self._ready(shards).values()))

    def collect(self, iteration: int) -> Collected | None:
        """Wait for a block; None where the run is asked to stop. Raises EngineError where nobody collects for
        `rollout.server_patience_s`."""
        rollout = self._config.rollout
        quota = quota_blocks(iteration, blocks_per_iteration=1, max_versions_behind=rollout.max_versions_behind)
        patience = Patience(rollout.server_patience_s)

        def look() -> tuple[Collected | None] | None:
            if self._is_asked_to_stop():
                return (None,)
            told, self._told = self._told, self._first.turn(iteration, quota)
            if self._told != told:
                self._wakeups.signal(News.COLLECTION)
            hearts = patience.check(self.heartbeats())
            ready = self._ready([name for heart in hearts for name in heart.shards])
            return (self._take(min(ready), ready[min(ready)]),) if ready else None

        return self._ranks.wait(look, lambda: self._wakeups.wait([News.SHARDS]))

    def heartbeats(self) -> list[Heartbeat]:
        """Of the collectors that live. On the first rank."""
        return self._first.heartbeats()

    def _ready(self, announced: Sequence[str]) -> dict[int, str]:
        """A shard of each block that is there and not done; a block that was done twice is taken once."""
        is_done = self._first.collection.is_done
        ready: dict[int, str] = {}
        for name in sorted({*announced, *self._blocks}):
            block = self._block_in(name)
            if block is not None and not is_done(block):
                ready.setdefault(block, name)
        heard_of = {*announced, *ready.values()}
        self._blocks = {name: block for name, block in self._blocks.items() if name in heard_of}
        return ready

    def _block_in(self, name: str) -> int | None:
        """None also where it is not to be seen yet, or was damaged; its collector makes that one again."""
        if name not in self._blocks:
            try:
                trajectories = read_trajectories(self._shards / name)
            except CorruptShardError as error:
                logger.warning("replay shard %s is removed, its block is collected again: %s", name, error)
                (self._shards / name).unlink(missing_ok=True)
                return None
            except FileNotFoundError:
                return None
            self._blocks[name] = block_of(trajectories[0].trajectory_id) if trajectories else None
        return self._blocks[name]

    def _take(self, block: int, shard: str) -> Collected:
        trajectories = read_trajectories(self._shards / shard)
        self._first.complete([block])
        size = self._config.rollout.num_responses
        samples = trajectories[::size][: self._config.logging.num_text_samples]
        return Collected(
            shards=(shard,),
            metrics=response_metrics(outcomes_of(trajectories)),
            samples=as_text(self._answerer, self._prompts, samples),
        )
