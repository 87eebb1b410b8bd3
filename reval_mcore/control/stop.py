"""How a run is asked to stop: by a signal, or by a file where no signal gets through to every process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Within it, the first SIGTERM, SIGUSR1 or Ctrl-C asks the loop to stop at the end of its iteration.

    Batch systems send the first two ahead of a time limit. A Ctrl-C after any of them interrupts at once. For the main
    thread only.

    So does `file`, once it is there: what is in it is the reason. It is removed by `obeyed`.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._signal: str | None = None  # name of the first
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._ask) for number in _ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self._signal is None and self._file is not None and self._file.exists():
            return self._file.read_text().strip() or self._file.name
        return self._signal

    def obeyed(self) -> None:
        """The next start is not to stop for the same reason."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number).name
            # not print: the signal may have come in the middle of one
            os.write(1, f"{self.reason}: stopping at the end of this iteration; Ctrl-C stops at once\n".encode())
