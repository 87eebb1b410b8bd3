"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Within it, the first SIGTERM, SIGUSR1 or Ctrl-C asks the loop to stop at the end of its iteration.

    Batch systems send the first two ahead of a time limit. A Ctrl-C after any of them interrupts at once. For the main
    thread only.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # name of the first signal
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._ask) for number in _ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.reason is None:
            self.reason = signal.Signals(number).name
            # not print: the signal may have come in the middle of one
            os.write(1, f"{self.reason}: stopping at the end of this iteration; Ctrl-C stops at once\n".encode())
