"""The replay buffer: which trajectories are live, what is known about each, and batches of them. Trainer rank 0 only.

A row is the global admission number of a trajectory: int64, counted from 0, never reused. The buffer holds the last
`capacity` of them, exact to the trajectory. A trajectory whose id a live row has already is skipped and gets no
number, so admitting a re-done block twice adds nothing. Shards are admitted one by one in the order of their names and
each is journalled with the eviction it causes: the same shards in the same order give the same journal, however calls
to `admit` group them.

What changes about a trajectory (reference scores, times sampled, last residual, priority) lives in memory and goes into
the training checkpoint by `state_dict`, with the journal position; everything else comes back from shards and journal.
Tokens are in memory only as far as `max_memory_bytes` goes: a shard is read, and verified, again when its rows are
wanted. One that is damaged by then, or gone, goes to quarantine, its rows are lost, and training goes on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from reval_mcore.durable import fsync
from reval_mcore.randomness import generator
from reval_mcore.records import Batch, ReferenceScores, RowRewards, Scores
from reval_mcore.replay.gather import Gathered
from reval_mcore.replay.journal import Admit, Evict, Index, Journal, Quarantine
from reval_mcore.replay.loading import IndexedShard, LoadedShard, read_shard
from reval_mcore.replay.reuse import reuse_statistics
from reval_mcore.replay.rows import STATES, RowTable
from reval_mcore.replay.samplers import Sampler, UniformSampler
from reval_mcore.replay.segments import Segments
from reval_mcore.replay.shards import QUARANTINE, SHARDS, CorruptShardError, ShardName, make_folders
from reval_mcore.replay.unlinking import DelayedUnlink

logger = logging.getLogger(__name__)
_REFERENCE = [field.name for field in fields(ReferenceScores)]
_COUNTERS = ("num_evicted", "num_evicted_unsampled", "num_uses")


class ReplayBuffer:
    """The index authority over one replay directory, and the live trajectories."""

    def __init__(
        self,
        directory: Path,
        *,
        capacity: int,
        seed: int,
        sampler: Sampler | None = None,
        max_memory_bytes: int = 1 << 34,
        unlink_delay_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open or create `directory`: replay its journal, and read the index columns of its live shards.

        `sampler` is uniform where none is given. Evicted shards stay on the disk for `unlink_delay_s`, by `clock`,
        for readers on other nodes. Raises ValueError where the journal is damaged before its last line, a shard or the
        journal is of an unknown version, or a live shard is missing. A damaged shard is quarantined instead, and its
        rows are lost; see loading.py for what is verified when.
        """
        assert capacity >= 1, f"capacity {capacity}"
        self.directory = directory
        self.capacity = capacity
        self._seed = seed
        self._sampler: Sampler = UniformSampler() if sampler is None else sampler
        make_folders(directory)
        self._unlinking = DelayedUnlink(directory / SHARDS, unlink_delay_s, clock)
        self._journal = Journal(directory / "journal.jsonl")
        self._segments = Segments(directory / SHARDS, max_memory_bytes)
        self._reload()

    def __len__(self) -> int:
        return self._num_live

    @property
    def live_rows(self) -> np.ndarray:
        """int64 [len(self)], ascending. Consecutive, but for the rows of shards that were lost."""
        return self._table.live_rows()

    @property
    def first_live_row(self) -> int:
        """The oldest row that was not evicted: what a checkpoint gives `unlink_evicted` to keep its shards."""
        return self._index.first_live_row

    @property
    def journal_position(self) -> int:
        """Number of journalled events."""
        return self._journal.position

    @property
    def num_quarantined(self) -> int:
        return len(self._index.quarantined)

    @property
    def memory_bytes(self) -> int:
        """Of the shards in memory: differs between a run and the same run resumed, as nothing else here does."""
        return self._segments.num_bytes

    # ------------------------------------------------------------ admission and eviction

    def pending_shards(self) -> list[str]:
        """Complete shards that were not judged yet, in the order in which `admit` takes them.

        A listing of a network filesystem may lag by a minute: what a writer names may be admitted before it shows.
        """
        return self._pending(os.listdir(self.directory / SHARDS))

    def admit(
        self, shards: Collection[str] | None = None, *, is_done: Callable[[str], bool] = lambda _: False
    ) -> np.ndarray:
        """Admit pending shards, all or those named, and evict the oldest rows above capacity.

        Returns the new rows, int64 ascending, less those that the same call evicted. Damaged shards go to quarantine.
        `is_done` tells of a trajectory id that it was admitted before, though it may be evicted by now: a block that
        was done twice, the second time very late. Raises ValueError on a shard of an unknown schema version and OSError
        where a shard cannot be read (yet); what was admitted before it stays admitted.
        """
        first_new = self._index.next_row
        for name in self.pending_shards() if shards is None else self._pending(shards):
            self._admit_shard(name, is_done)
        for evict in self._evictions(0):  # after a torn append, or a lowered capacity
            self._journal.append([evict])
            self._evict(evict)
        return np.arange(max(first_new, self.first_live_row), self._index.next_row, dtype=np.int64)

    def unlink_evicted(self, keep_from_row: int) -> list[str]:
        """Remove the files of shards all of whose rows are evicted and below `keep_from_row`; returns their names.

        `keep_from_row` is the least `first_live_row` of the checkpoints that may still be resumed from.
        """
        limit = min(keep_from_row, self.first_live_row)
        return self._unlinking.unlink([a.shard for a in self._index.admitted.values() if a.end_row <= limit])

    def discard_pending(self, *, keep: Collection[str] = ()) -> list[str]:
        """Remove the files of pending shards, those of an abandoned future, but for `keep`. Returns their names."""
        names = [name for name in self.pending_shards() if name not in keep]
        for name in names:
            (self.directory / SHARDS / name).unlink(missing_ok=True)
        return names

    def _pending(self, names: Iterable[str]) -> list[str]:
        parsed = sorted(filter(None, map(ShardName.parse, names)))
        return [str(name) for name in parsed if str(name) not in self._index]

    def _admit_shard(self, name: str, is_done: Callable[[str], bool]) -> None:
        try:
            shard = read_shard(self.directory / SHARDS / name)
        except CorruptShardError as error:
            self._quarantine(name, str(error))
            return
        live, ids = self._live_among(shard.trajectory_ids), enumerate(shard.trajectory_ids)
        skipped = tuple(place for place, id_ in ids if id_ in live or is_done(id_))
        shard = shard.without(skipped)
        admit = Admit(name, shard.file_crc32, len(shard), self._index.next_row, skipped)
        evictions = self._evictions(len(shard))
        self._journal.append([admit, *evictions])
        self._index.apply(admit)
        if len(shard):
            self._segments.keep_in_memory(shard)
            live = self._table["is_live"]
            maximum = self._table["priority"].max(initial=0.0, where=live) if self._num_live else 1.0
            self._table.extend(len(shard))
            self._add(admit, IndexedShard.of(shard))
            self._table["priority"][-len(shard) :] = maximum
        for evict in evictions:
            self._evict(evict)

    def _live_among(self, trajectory_ids: Sequence[str]) -> set[str]:
        """Those that a live row has."""
        rows = self._table.rows_that_may_have(trajectory_ids)
        found: set[str] = set()
        for segment, places, _ in self._segments.owners(rows, np.arange(len(rows))):
            try:
                ids = self._segments.index_of(segment).trajectory_ids
            except (CorruptShardError, FileNotFoundError) as error:
                self._lose(segment, str(error))
            else:
                found.update(ids[place] for place in places)
        return found

    def _add(self, admit: Admit, indexed: IndexedShard) -> None:
        """A segment, for whose rows the table has place."""
        self._segments.add(admit)
        self._table.set_facts(admit.first_row, indexed.rows, indexed.trajectory_ids)
        self._num_live += admit.end_row - max(admit.first_row, self.first_live_row)
        self._weights = None

    def _evictions(self, num_new: int) -> list[Evict]:
        excess = self._num_live + num_new - self.capacity
        if excess <= 0:
            return []
        if excess >= self._num_live:
            return [Evict(self._index.next_row + excess - self._num_live)]
        return [Evict(int(self.live_rows[excess]))]

    def _evict(self, evict: Evict) -> None:
        old = slice(0, evict.first_live_row - self.first_live_row)
        live = self._table["is_live"][old]
        self.num_evicted += int(live.sum())
        self.num_evicted_unsampled += int((self._table["times_sampled"][old][live] == 0).sum())
        self._num_live -= int(live.sum())
        self._segments.drop_below(evict.first_live_row)
        self._index.apply(evict)
        self._table.drop_below(evict.first_live_row)
        self._weights = None

    def _quarantine(self, name: str, reason: str) -> None:
        # journalled first: a crash in between leaves the file in place, and the next opening moves it
        event = Quarantine(name, reason)
        self._journal.append([event])
        self._index.apply(event)
        self._move(name, SHARDS, QUARANTINE)
        logger.warning("replay shard %s quarantined: %s", name, reason)

    def _move(self, name: str, source: str, target: str) -> None:
        """Nothing where it is gone already."""
        if (self.directory / source / name).exists():
            (self.directory / source / name).replace(self.directory / target / name)
            fsync(self.directory / target)
            fsync(self.directory / source)

    # ------------------------------------------------------------ reading

    def batch(self, rows: np.ndarray) -> Batch:
        """The trajectories at live `rows` (int64 [B]), in that order, with copies of their reference scores.

        Those that were lost, or are because their shard proves to be damaged or gone as it is read, are left out;
        `Batch.rows` has the others.
        """
        return self._batch(rows, np.ones(len(rows)))

    def sample(self, n: int, update_index: int) -> Batch:
        """min(n, len(self)) different live rows; a function of (seed, update_index, rows admitted so far, live rows).

        Of the priorities too, where the sampler goes by them. Not of the journal position: that counts shards, and so
        how many processes collected. Where a shard is lost on the way, the draw is made again from what is left.
        """
        while True:
            weights = self._current_weights()
            stream = generator(self._seed, "replay_sample", update_index, self._index.next_row)
            places = self._sampler.draw(weights, n, stream)
            relative = weights[places] * self._num_live / weights.sum() if len(places) else np.empty(0)
            batch = self._batch(self._table.first_row + places, relative)
            if len(batch) == len(places):
                return batch

    def _batch(self, rows: np.ndarray, relative_probability: np.ndarray) -> Batch:
        places = self._table.places(rows)
        owners = self._segments.owners(rows, np.flatnonzero(self._table["is_live"][places]))
        from_memory = all(self._segments.is_in_memory(segment) for segment, _, _ in owners)
        gathered = Gathered(len(rows), from_memory=from_memory)
        for segment, places_in_it, members in owners:
            shard = self._load(segment)
            if shard is not None:
                gathered.take(shard, places_in_it, members)
        found = gathered.found
        states = {name: self._table[name][places[found]] for name in _REFERENCE}
        return gathered.batch(rows, relative_probability, ReferenceScores(**states))

    def _load(self, segment: Admit) -> LoadedShard | None:
        """None, and its rows are lost, where the file is not what it was."""
        try:
            return self._segments.load(segment)
        except CorruptShardError as error:
            self._lose(segment, str(error))
            return None

    def _lose(self, segment: Admit, reason: str) -> None:
        self._quarantine(segment.shard, reason)
        self._segments.remove(segment)
        first = max(segment.first_row, self.first_live_row)
        self._table["is_live"][first - self._table.first_row : segment.end_row - self._table.first_row] = False
        self._num_live -= segment.end_row - first
        self._weights = None

    def _current_weights(self) -> np.ndarray:
        """float64 over the table's rows, 0 where they are not live; a function of what a checkpoint holds."""
        if self._weights is None:
            live, versions = self._table["is_live"], self._table["policy_version"]
            newest = versions.max(initial=0, where=live)
            self._age_factors = np.where(live, self._sampler.age_factor(newest - versions), 0.0)
            self._weights = self._table["priority"] * self._age_factors
        return self._weights

    # ------------------------------------------------------------ noting

    def stale_rows(self, rows: np.ndarray, reference_version: int) -> np.ndarray:
        """Those of the live `rows` whose stored scores are not of `reference_version`, in the order given."""
        places = self._table.places(rows)
        is_stale = self._table["reference_version"][places] != reference_version
        return rows[is_stale & self._table["is_live"][places]]

    def set_reference_scores(self, rows: np.ndarray, scores: Scores, reference_version: int) -> None:
        """Store what reference `reference_version` (>= 0) scored for live `rows`, in the order of `scores`."""
        assert reference_version >= 0, f"reference_version {reference_version}"
        places = self._table.places(rows)
        self._table["trajectory_score"][places] = scores.trajectory_score
        self._table["initial_value"][places] = scores.initial_value
        self._table["final_value"][places] = scores.final_value
        self._table["reference_version"][places] = reference_version

    def record_update(self, rows: np.ndarray, residuals: np.ndarray) -> None:
        """Note that live `rows`, each once, were in an update, with these residuals (float64 [B])."""
        assert len(np.unique(rows)) == len(rows), "a row more than once in one update"
        self._table["times_sampled"][self._table.places(rows)] += 1
        self.num_uses += len(rows)
        self.set_residuals(rows, residuals)

    def set_residuals(self, rows: np.ndarray, residuals: np.ndarray) -> None:
        """The residuals of live `rows` (float64 [B]), and with them their priorities, where they are finite."""
        places, residuals = self._table.places(rows), residuals.astype(np.float64)
        self._table["last_residual"][places] = residuals
        is_finite = np.isfinite(residuals)
        changed = places[is_finite]
        self._table["priority"][changed] = self._sampler.priority(residuals[is_finite])
        if self._weights is not None:
            self._weights[changed] = self._table["priority"][changed] * self._age_factors[changed]

    def reset_residuals(self, residuals: Callable[[RowRewards], np.ndarray]) -> None:
        """What the residuals are under a new reference, of all live rows: a function of rewards (-> float64 [B])."""
        live = self._table["is_live"]
        rewards = RowRewards(**{field.name: self._table[field.name][live] for field in fields(RowRewards)})
        self.set_residuals(self.live_rows, residuals(rewards))

    def statistics(self, policy_version: int) -> dict[str, float]:
        """Reuse in numbers; ages are in policy versions before `policy_version`. Means over nothing are 0."""
        counts = {"num_uses": self.num_uses, "num_admitted": self._index.next_row}
        return reuse_statistics(self._table, policy_version, **counts) | {
            "evicted_unsampled_share": self.num_evicted_unsampled / max(self.num_evicted, 1),
            "num_quarantined": float(self.num_quarantined),
        }

    # ------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, int | np.ndarray]:
        """What shards and journal do not say: integers, and an array per state over rows [first_live_row, next_row)."""
        return {
            "journal_position": self.journal_position,
            "first_live_row": self.first_live_row,
            "next_row": self._index.next_row,
            **{name: vars(self)[name] for name in _COUNTERS},
            **{name: np.array(self._table[name]) for name in STATES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state` was taken. Raises ValueError where it belongs to another replay directory."""
        position = int(state["journal_position"])
        index = Index.of(self._journal.first(position))
        found, expected = (index.first_live_row, index.next_row), (int(state["first_live_row"]), int(state["next_row"]))
        if found != expected:
            raise ValueError(
                f"{self._journal.path}: rows {found} at position {position}, but {expected} in the checkpoint; "
                f"it belongs to another replay directory, give that one"
            )
        self.rewind(position)
        for name in STATES:
            self._table[name][:] = state[name]
        self.num_evicted, self.num_evicted_unsampled, self.num_uses = (int(state[name]) for name in _COUNTERS)

    def rewind(self, journal_position: int) -> None:
        """Forget what was journalled after a position; all states are as never scored. 0 starts from an empty buffer.

        Shards judged after it are pending again, the quarantined ones too: judged again in the same order they give
        the same journal. Raises ValueError where the journal is shorter than that.
        """
        kept = len(self._journal.first(journal_position))
        for event in self._journal.events[kept:]:
            if isinstance(event, Quarantine):
                self._move(event.shard, QUARANTINE, SHARDS)
        self._journal.truncate(journal_position)
        self._reload()

    def _reload(self) -> None:
        """Make the index and memory say what the journal says; shards in memory already are not read again."""
        self._index = Index.of(self._journal.events)
        self._segments.clear()
        self._num_live = 0
        self._weights: np.ndarray | None = None  # made when they are wanted; see _current_weights
        self._age_factors = np.empty(0)
        self._table = RowTable(self.first_live_row)
        self._table.extend(self._index.next_row - self.first_live_row)
        for name in sorted(self._index.quarantined):
            self._move(name, SHARDS, QUARANTINE)
        for admit in self._index.live_shards():
            try:
                self._add(admit, self._segments.index_of(admit))
            except CorruptShardError as error:
                self._quarantine(admit.shard, str(error))
            except FileNotFoundError as error:
                raise ValueError(
                    f"{error.filename}: the journal says that it is live, and it is not there; check that the whole "
                    f"replay directory is mounted, and restore the file or start with an empty directory"
                ) from None
        self.num_evicted = self.num_evicted_unsampled = self.num_uses = 0
