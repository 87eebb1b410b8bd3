"""The replay buffer: which trajectories are live, what is known about each, and batches of them. Trainer rank 0 only.

A row is the global admission number of a trajectory: int64, counted from 0, never reused. The buffer holds the last
`capacity` of them, exact to the trajectory. A trajectory whose id a live row has already is skipped and gets no
number, so admitting a re-done block twice adds nothing. Shards are admitted one by one in the order of their names and
each is journalled with the eviction it causes: the same shards in the same order give the same journal, however calls
to `admit` group them.

What changes about a trajectory (reference scores, times sampled, last residual) lives in memory and goes into the
training checkpoint by `state_dict`, with the journal position; everything else comes back from shards and journal.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from reval_mcore.durable import fsync
from reval_mcore.records import Batch, ReferenceScores, Scores
from reval_mcore.replay.journal import Admit, Evict, Index, Journal, Quarantine
from reval_mcore.replay.samplers import SAMPLERS, SamplerName
from reval_mcore.replay.shards import (
    QUARANTINE,
    ROW_DTYPE,
    SHARDS,
    TMP,
    CorruptShardError,
    LoadedShard,
    ShardName,
    cumulative,
    read_shard,
)

logger = logging.getLogger(__name__)
NOT_SCORED = -1
STATE_DTYPE = np.dtype([
    ("reference_version", np.int64),  # NOT_SCORED: the three scores are NaN
    ("trajectory_score", np.float64),
    ("initial_value", np.float64),
    ("final_value", np.float64),
    ("times_sampled", np.int64),
    ("last_residual", np.float64),  # NaN: never in an update
])  # fmt: skip
_STATES = STATE_DTYPE.names or ()
_REFERENCE = [field.name for field in fields(ReferenceScores)]
_COLUMNS = [field.name for field in fields(Batch) if field.name in (ROW_DTYPE.names or ())]
_FRESH_STATE = np.array((NOT_SCORED, np.nan, np.nan, np.nan, 0, np.nan), dtype=STATE_DTYPE)


class _StateWindow:
    """The states of consecutive rows, from `first_row` on. Adding and dropping a row costs O(1) amortised."""

    def __init__(self, first_row: int) -> None:
        self.first_row = first_row
        self._array = np.empty(0, dtype=STATE_DTYPE)
        self._start = self._end = 0

    @property
    def states(self) -> np.ndarray:
        """STATE_DTYPE [rows]: a view; writing to it changes the states. Valid until the next `extend`."""
        return self._array[self._start : self._end]

    def extend(self, count: int) -> None:
        if self._end + count > len(self._array):
            live = self.states
            self._array = np.empty(2 * (len(live) + count), dtype=STATE_DTYPE)
            self._array[: len(live)] = live
            self._start, self._end = 0, len(live)
        self._array[self._end : self._end + count] = _FRESH_STATE
        self._end += count

    def drop_below(self, row: int) -> None:
        self._start += row - self.first_row
        self.first_row = row
        assert self._start <= self._end, f"row {row} is past the end"


@dataclass(frozen=True, slots=True)
class _Segment:
    """A shard with at least one live row: row first_row + i is place i of the shard."""

    first_row: int
    shard: LoadedShard

    def place(self, row: int) -> int:
        """Of the first row here that is not below `row`; the number of rows where there is none."""
        return min(max(row - self.first_row, 0), len(self.shard))


class ReplayBuffer:
    """The index authority over one replay directory, and the live trajectories in memory."""

    def __init__(self, directory: Path, *, capacity: int, seed: int, sampler: SamplerName = "uniform") -> None:
        """Open or create `directory`; replay its journal, load and verify its live shards.

        Raises ValueError where the journal is damaged before its last line, a shard or the journal is of an unknown
        version, or a live shard is missing. A damaged shard is quarantined instead, and its rows are lost.
        """
        assert capacity >= 1, f"capacity {capacity}"
        self.directory = directory
        self.capacity = capacity
        for folder in (SHARDS, TMP, QUARANTINE):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        self._sampler = SAMPLERS[sampler](seed)
        self._journal = Journal(directory / "journal.jsonl")
        self._index = Index()
        self._segments: list[_Segment] = []  # oldest first
        self._reload()

    def __len__(self) -> int:
        return sum(len(segment.shard) - segment.place(self.first_live_row) for segment in self._segments)

    @property
    def live_rows(self) -> np.ndarray:
        """int64 [len(self)], ascending. Consecutive, but for the rows of shards that were quarantined when reopened."""
        ranges = [s.first_row + np.arange(s.place(self.first_live_row), len(s.shard)) for s in self._segments]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

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

    # ------------------------------------------------------------ admission and eviction

    def pending_shards(self) -> list[str]:
        """Complete shards that were not judged yet, in the order in which `admit` takes them."""
        return self._pending(os.listdir(self.directory / SHARDS))

    def admit(self, shards: Collection[str] | None = None) -> np.ndarray:
        """Admit pending shards, all or those named, and evict the oldest rows above capacity.

        Returns the new rows, int64 ascending, less those that the same call evicted. Damaged shards go to quarantine.
        Raises ValueError on a shard of an unknown schema version and OSError where a shard cannot be read; what was
        admitted before it stays admitted.
        """
        first_new = self._index.next_row
        for name in self.pending_shards() if shards is None else self._pending(shards):
            self._admit_shard(name)
        for evict in self._evictions(0):  # after a torn append, or a lowered capacity
            self._journal.append([evict])
            self._evict(evict)
        return np.arange(max(first_new, self.first_live_row), self._index.next_row, dtype=np.int64)

    def unlink_evicted(self, keep_from_row: int) -> list[str]:
        """Remove the files of shards all of whose rows are evicted and below `keep_from_row`; returns their names.

        `keep_from_row` is the least `first_live_row` of the checkpoints that may still be resumed from.
        """
        limit = min(keep_from_row, self.first_live_row)
        folder = self.directory / SHARDS
        present = set(os.listdir(folder))
        evicted = [admit.shard for admit in self._index.admitted.values() if admit.end_row <= limit]
        unlinked = [name for name in evicted if name in present]
        for name in unlinked:
            (folder / name).unlink()
        return unlinked

    def discard_pending(self, *, keep: Collection[str] = ()) -> list[str]:
        """Remove the files of pending shards, those of an abandoned future, but for `keep`. Returns their names."""
        names = [name for name in self.pending_shards() if name not in keep]
        for name in names:
            (self.directory / SHARDS / name).unlink(missing_ok=True)
        return names

    def _pending(self, names: Iterable[str]) -> list[str]:
        parsed = sorted(filter(None, map(ShardName.parse, names)))
        return [str(name) for name in parsed if str(name) not in self._index]

    def _admit_shard(self, name: str) -> None:
        try:
            shard = read_shard(self.directory / SHARDS / name)
        except CorruptShardError as error:
            self._quarantine(name, str(error))
            return
        skipped = tuple(i for i, name in enumerate(shard.trajectory_ids) if name in self._trajectory_ids)
        shard = shard.without(skipped)
        admit = Admit(name, shard.file_crc32, len(shard), self._index.next_row, skipped)
        evictions = self._evictions(len(shard))
        self._journal.append([admit, *evictions])
        self._index.apply(admit)
        self._window.extend(len(shard))
        self._trajectory_ids.update(shard.trajectory_ids)
        if len(shard):
            self._segments.append(_Segment(admit.first_row, shard))
        for evict in evictions:
            self._evict(evict)

    def _evictions(self, num_new: int) -> list[Evict]:
        excess = len(self) + num_new - self.capacity
        if excess <= 0:
            return []
        rows = np.append(self.live_rows, self._index.next_row + np.arange(num_new))
        return [Evict(int(rows[excess]))]

    def _evict(self, evict: Evict) -> None:
        rows = self.live_rows[: np.searchsorted(self.live_rows, evict.first_live_row)]
        self.num_evicted += len(rows)
        self.num_evicted_unsampled += int((self._states(rows)["times_sampled"] == 0).sum())
        for s in self._segments:
            places = slice(s.place(self.first_live_row), s.place(evict.first_live_row))
            self._trajectory_ids.difference_update(s.shard.trajectory_ids[places])
        self._index.apply(evict)
        self._window.drop_below(evict.first_live_row)
        self._segments = [s for s in self._segments if s.place(evict.first_live_row) < len(s.shard)]

    def _quarantine(self, name: str, reason: str) -> None:
        # journalled first: a crash in between leaves the file in place, and the next opening moves it
        event = Quarantine(name, reason)
        self._journal.append([event])
        self._index.apply(event)
        self._move(name, SHARDS, QUARANTINE)
        logger.warning("replay shard %s quarantined: %s", name, reason)

    def _move(self, name: str, source: str, target: str) -> None:
        (self.directory / source / name).replace(self.directory / target / name)
        fsync(self.directory / target)
        fsync(self.directory / source)

    # ------------------------------------------------------------ reading and noting

    def batch(self, rows: np.ndarray) -> Batch:
        """The trajectories at live `rows` (int64 [B]), in that order, with copies of their reference scores."""
        places = self._places(rows)
        columns = np.empty(len(rows), dtype=ROW_DTYPE)
        for b, (shard, place) in enumerate(places):
            columns[b] = shard.rows[place]
        cu_seqlens = cumulative(columns["length"])
        tokens = np.empty(cu_seqlens[-1], dtype=np.int32)
        loss_mask = np.empty(cu_seqlens[-1], dtype=np.bool_)
        rollout_logprobs = np.empty(cu_seqlens[-1], dtype=np.float32)
        for b, (shard, place) in enumerate(places):
            source = slice(shard.cu_seqlens[place], shard.cu_seqlens[place + 1])
            target = slice(cu_seqlens[b], cu_seqlens[b + 1])
            tokens[target] = shard.tokens[source]
            loss_mask[target] = shard.loss_mask[source]
            rollout_logprobs[target] = shard.rollout_logprobs[source]
        states = self._states(rows)
        return Batch(
            rows=rows.copy(),
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            prompt_lengths=np.ascontiguousarray(columns["prompt_length"]),
            loss_mask=loss_mask,
            rollout_logprobs=rollout_logprobs,
            reference=ReferenceScores(**{name: np.ascontiguousarray(states[name]) for name in _REFERENCE}),
            **{name: np.ascontiguousarray(columns[name]) for name in _COLUMNS},
        )

    def sample(self, n: int, update_index: int) -> Batch:
        """min(n, len(self)) different live rows; a function of (seed, update_index, rows admitted so far, live rows).

        Not of the journal position: that counts shards, and so how many processes collected.
        """
        place = {"update_index": update_index, "num_admitted": self._index.next_row}
        return self.batch(self._sampler.sample(self.live_rows, n, **place))

    def stale_rows(self, rows: np.ndarray, reference_version: int) -> np.ndarray:
        """Those of the live `rows` whose stored scores are not of `reference_version`, in the order given."""
        return rows[self._states(rows)["reference_version"] != reference_version]

    def set_reference_scores(self, rows: np.ndarray, scores: Scores, reference_version: int) -> None:
        """Store what reference `reference_version` (>= 0) scored for live `rows`, in the order of `scores`."""
        assert reference_version >= 0, f"reference_version {reference_version}"
        places = self._state_places(rows)
        states = self._window.states
        states["trajectory_score"][places] = scores.trajectory_score
        states["initial_value"][places] = scores.initial_value
        states["final_value"][places] = scores.final_value
        states["reference_version"][places] = reference_version

    def record_update(self, rows: np.ndarray, residuals: np.ndarray) -> None:
        """Note that live `rows`, each once, were in an update, with these residuals (float64 [B])."""
        assert len(np.unique(rows)) == len(rows), "a row more than once in one update"
        places = self._state_places(rows)
        self._window.states["times_sampled"][places] += 1
        self._window.states["last_residual"][places] = residuals

    def statistics(self, policy_version: int) -> dict[str, float]:
        """Reuse in numbers; ages are in policy versions before `policy_version`. Means over nothing are 0."""
        versions = [s.shard.rows["policy_version"][s.place(self.first_live_row) :] for s in self._segments]
        ages = policy_version - np.concatenate([np.empty(0, dtype=np.int64), *versions])
        size = len(ages)
        return {
            "size": float(size),
            "age_mean": float(ages.mean()) if size else 0.0,
            "age_max": float(ages.max()) if size else 0.0,
            "times_sampled_mean": float(self._states(self.live_rows)["times_sampled"].mean()) if size else 0.0,
            "evicted_unsampled_share": self.num_evicted_unsampled / max(self.num_evicted, 1),
            "num_quarantined": float(self.num_quarantined),
        }

    def _places(self, rows: np.ndarray) -> list[tuple[LoadedShard, int]]:
        first_rows = np.array([segment.first_row for segment in self._segments], dtype=np.int64)
        owners = np.searchsorted(first_rows, rows, side="right") - 1
        segments = [self._segments[owner] for owner in owners.tolist()]
        assert (rows >= self.first_live_row).all(), "rows that were evicted"
        places = [(s.shard, row - s.first_row) for s, row in zip(segments, rows.tolist(), strict=True)]
        assert all(0 <= place < len(shard) for shard, place in places), "rows that are not live"
        return places

    def _state_places(self, rows: np.ndarray) -> np.ndarray:
        assert (rows >= self.first_live_row).all(), "rows that were evicted"
        return rows - self._window.first_row

    def _states(self, rows: np.ndarray) -> np.ndarray:
        """STATE_DTYPE [B], a copy."""
        return self._window.states[self._state_places(rows)]

    # ------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, int | np.ndarray]:
        """What shards and journal do not say: integers, and an array per state over rows [first_live_row, next_row)."""
        return {
            "journal_position": self.journal_position,
            "first_live_row": self.first_live_row,
            "next_row": self._index.next_row,
            "num_evicted": self.num_evicted,
            "num_evicted_unsampled": self.num_evicted_unsampled,
            **{name: np.array(self._window.states[name]) for name in _STATES},
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
        for name in _STATES:
            self._window.states[name] = state[name]
        self.num_evicted = int(state["num_evicted"])
        self.num_evicted_unsampled = int(state["num_evicted_unsampled"])

    def rewind(self, journal_position: int) -> None:
        """Forget what was journalled after a position; all states are as never scored. 0 starts from an empty buffer.

        Shards judged after it are pending again, the quarantined ones too: judged again in the same order they give
        the same journal. Raises ValueError where the journal is shorter than that.
        """
        kept = len(self._journal.first(journal_position))
        for event in self._journal.events[kept:]:
            if isinstance(event, Quarantine) and (self.directory / QUARANTINE / event.shard).exists():
                self._move(event.shard, QUARANTINE, SHARDS)
        self._journal.truncate(journal_position)
        self._reload()

    def _reload(self) -> None:
        """Make the index and memory say what the journal says; shards in memory already are not read again."""
        in_memory = {segment.shard.name: segment.shard for segment in self._segments}
        self._index, self._segments = Index.of(self._journal.events), []
        for name in sorted(self._index.quarantined):
            if (self.directory / SHARDS / name).exists():
                self._move(name, SHARDS, QUARANTINE)
        for admit in self._index.live_shards():
            try:
                shard = in_memory.get(admit.shard) or self._read_admitted(admit)
            except CorruptShardError as error:
                self._quarantine(admit.shard, str(error))
            else:
                self._segments.append(_Segment(admit.first_row, shard))
        live_ids = (s.shard.trajectory_ids[s.place(self.first_live_row) :] for s in self._segments)
        self._trajectory_ids = set(itertools.chain.from_iterable(live_ids))
        self._window = _StateWindow(self.first_live_row)
        self._window.extend(self._index.next_row - self.first_live_row)
        self.num_evicted = self.num_evicted_unsampled = 0

    def _read_admitted(self, admit: Admit) -> LoadedShard:
        path = self.directory / SHARDS / admit.shard
        if not path.exists():
            raise ValueError(
                f"{path}: the journal says that it is live, and it is not there; check that the whole replay "
                f"directory is mounted, and restore the file or start with an empty directory"
            )
        shard = read_shard(path)
        if shard.file_crc32 != admit.file_crc32:
            raise CorruptShardError(f"CRC32 {shard.file_crc32:08x}, admitted with {admit.file_crc32:08x}")
        return shard.without(admit.skipped)
