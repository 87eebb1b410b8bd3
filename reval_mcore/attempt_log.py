"""What each process of a trainer has to say of one start of a run: logs/attempt_000/rank_000.log."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from reval_mcore.durable import append
from reval_mcore.ranks import Ranks
from reval_mcore.run_directory import TRAINER_LOG, Found, versions

logger = logging.getLogger(__name__)


class _LogFile(logging.Handler):
    """A line that finds no room is not there. Nothing is written at closing, which would hide the real error."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            append(self._file, f"{self.format(record)}\n".encode(errors="replace"))


@contextlib.contextmanager
def log_to(attempt: Path, found: Found | None, ranks: Ranks) -> Iterator[None]:
    """What this process has to say of the run goes to a file as well, tracebacks and crashes of libraries too."""
    root = logging.getLogger("reval_mcore")
    path = attempt / f"{TRAINER_LOG}{ranks.rank:03d}.log"
    with path.open("ab", buffering=0) as file:
        handler = _LogFile(file)
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        faulthandler.enable(file)
        start = "from the first iteration" if found is None else f"going on from {found.checkpoint}"
        logger.info("%s, with %s", start, versions())
        try:
            yield
        except BaseException as error:
            handler.emit(logger.makeRecord(__name__, logging.ERROR, "", 0, "ended", (), sys.exc_info()))
            error.add_note(f"the log of this attempt: {path}")
            raise
        finally:
            faulthandler.disable()
            root.removeHandler(handler)
