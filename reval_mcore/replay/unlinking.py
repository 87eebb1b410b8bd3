"""Removing shards late: another node may be reading one, or have it in a listing that lags."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path


class DelayedUnlink:
    """Removes files of a folder `delay_s` after they were first asked to go, by `clock` (of this process alone)."""

    def __init__(self, folder: Path, delay_s: float, clock: Callable[[], float]) -> None:
        self._folder, self._delay_s, self._clock = folder, delay_s, clock
        self._since: dict[str, float] = {}

    def unlink(self, names: Iterable[str]) -> list[str]:
        """Those of `names` whose time has come, and that are gone now. Who is not named any more is forgotten."""
        now, present = self._clock(), set(os.listdir(self._folder))
        since = {name: self._since.get(name, now) for name in names if name in present}
        unlinked = [name for name, time_s in since.items() if now - time_s >= self._delay_s]
        for name in unlinked:
            (self._folder / name).unlink(missing_ok=True)
            del since[name]
        self._since = since
        return unlinked
