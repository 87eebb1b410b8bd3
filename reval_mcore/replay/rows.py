"""What is known of each row, column by column: facts from the shards, and what updates noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from reval_mcore.replay.loading import INDEX_DTYPE

NOT_SCORED = -1
# name -> (dtype, value of a row that is new). These go into a checkpoint; the facts come back from the shards.
STATES: Mapping[str, tuple[type, float]] = {
    "reference_version": (np.int64, NOT_SCORED),  # NOT_SCORED: the three scores are NaN
    "trajectory_score": (np.float64, np.nan),
    "initial_value": (np.float64, np.nan),
    "final_value": (np.float64, np.nan),
    "times_sampled": (np.int64, 0),
    "last_residual": (np.float64, np.nan),  # NaN: never in an update
    "priority": (np.float64, 1.0),  # without the share of age
}
FACTS = INDEX_DTYPE.names or ()


class RowTable:
    """Columns over the consecutive rows [first_row, end_row). Adding and dropping a row costs O(1) amortised.

    Every column is contiguous: a sampler goes over a million rows of one. `is_live` is False for rows of shards that
    were lost, which keep their place.
    """

    def __init__(self, first_row: int) -> None:
        self.first_row = first_row
        kinds = {name: np.dtype(kind) for name, (kind, _) in STATES.items()}
        kinds |= {name: INDEX_DTYPE[name] for name in FACTS}
        kinds |= {"is_live": np.dtype(np.bool_), "id_hash": np.dtype(np.int64)}
        self._columns = {name: np.empty(0, dtype=kind) for name, kind in kinds.items()}
        self._start = self._end = 0

    @property
    def end_row(self) -> int:
        return self.first_row + self._end - self._start

    def __getitem__(self, name: str) -> np.ndarray:
        """[rows]: a view; writing to it changes the table. Valid until the next `extend`."""
        return self._columns[name][self._start : self._end]

    def extend(self, count: int) -> None:
        """Rows that are not live until `set_facts` says what they are."""
        if self._end + count > len(self._columns["is_live"]):
            size = self._end - self._start
            for name, column in self._columns.items():
                grown = np.empty(2 * (size + count), dtype=column.dtype)
                grown[:size] = column[self._start : self._end]
                self._columns[name] = grown
            self._start, self._end = 0, size
        new = slice(self._end, self._end + count)
        for name, (_, value) in STATES.items():
            self._columns[name][new] = value
        for name in (*FACTS, "is_live", "id_hash"):
            self._columns[name][new] = 0
        self._end += count

    def set_facts(self, first_row: int, facts: np.ndarray, trajectory_ids: Sequence[str]) -> None:
        """INDEX_DTYPE [n]: of rows first_row, first_row + 1, ...; those before the table's first are left out."""
        evicted = max(self.first_row - first_row, 0)
        facts, hashes = facts[evicted:], _hashes(trajectory_ids)[evicted:]
        place = max(first_row - self.first_row, 0)
        self["id_hash"][place : place + len(facts)] = hashes
        for name in FACTS:
            self[name][place : place + len(facts)] = facts[name]
        self["is_live"][place : place + len(facts)] = True

    def drop_below(self, row: int) -> None:
        self._start += row - self.first_row
        self.first_row = row
        assert self._start <= self._end, f"row {row} is past the end"

    def places(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B]: where `rows` are in the columns. They must not be evicted."""
        assert ((rows >= self.first_row) & (rows < self.end_row)).all(), "rows that were evicted, or never admitted"
        return rows - self.first_row

    def rows_that_may_have(self, trajectory_ids: Sequence[str]) -> np.ndarray:
        """int64: live rows with the hash of one of these ids. 8 bytes a row; the ids themselves would take 140."""
        hashes = _hashes(trajectory_ids)
        is_near = np.zeros(1 << 16, dtype=np.bool_)  # by the last bits: of a million rows few are left to compare
        is_near[hashes & 0xFFFF] = True
        column = self["id_hash"]
        near = np.flatnonzero(is_near[column & 0xFFFF] & self["is_live"])
        return self.first_row + near[np.isin(column[near], hashes)]

    def live_rows(self) -> np.ndarray:
        """int64, ascending."""
        return self.first_row + np.flatnonzero(self["is_live"])


def _hashes(trajectory_ids: Sequence[str]) -> np.ndarray:
    """int64 [n]: of this process only."""
    return np.fromiter(map(hash, trajectory_ids), dtype=np.int64, count=len(trajectory_ids))
