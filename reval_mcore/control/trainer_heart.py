"""A sign of life of the trainer: which phase of which iteration it has come to.

It comes from the loop itself and not from a thread beside it, so that a collective that hangs is silence.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

_INTERVAL_S = 1.0


class TrainerHeart:
    """Writes control/trainer.json: {"beat", "iteration", "phase", "at"}. A beat that finds no room is left out."""

    def __init__(self, control: Path) -> None:
        self._path = control / "trainer.json"
        self._num_beats = 0
        self._last = -_INTERVAL_S

    def beat(self, iteration: int, phase: str) -> None:
        """At most one a second is written."""
        now = time.monotonic()
        if now - self._last < _INTERVAL_S:
            return
        self._last, self._num_beats = now, self._num_beats + 1
        said = {"beat": self._num_beats, "iteration": iteration, "phase": phase, "at": time.time()}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:  # nothing hangs on one beat, so none is flushed to the disk either
            temporary.write_text(json.dumps(said))
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
