"""Where a run's numbers go: metrics.jsonl, TensorBoard, one line on the console, and seconds by phase."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from reval_mcore.durable import append, fsync

logger = logging.getLogger(__name__)


class PhaseClock:
    """Seconds spent in named phases, of this step and of the whole run."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        """`on_phase` is told of every phase that begins."""
        self._on_phase = on_phase
        self.total_s: dict[str, float] = {}
        self._step_s: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._on_phase is not None:
            self._on_phase(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._step_s[name] = self._step_s.get(name, 0.0) + spent
            self.total_s[name] = self.total_s.get(name, 0.0) + spent

    def take_step(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        step, self._step_s = self._step_s, {}
        return step


class MetricsWriter:
    """Appends one JSON object an iteration to metrics.jsonl, and the same scalars to TensorBoard.

    metrics.jsonl is the record: a line is there whole or not at all, and an OSError is raised where it cannot be.
    TensorBoard is for looking on: where it cannot be written, the run goes on without it.
    """

    def __init__(
        self, directory: Path, *, first_iteration: int, num_iterations: int, tensorboard: bool, console: TextIO
    ) -> None:
        """TensorBoard forgets what an earlier attempt wrote at `first_iteration` and after it. Raises OSError."""
        self._path = directory / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        fsync(directory)
        self._tensorboard = _EventFile(directory / "tensorboard", first_iteration) if tensorboard else None
        self._num_iterations = num_iterations
        self._console = console
        self._started_at = time.perf_counter()
        self._num_written = 0

    def start_clock(self) -> None:
        """Pace and time left are counted from here."""
        self._started_at = time.perf_counter()

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """`metrics` by "group/name". Values that JSON has no word for (nan, inf) are written as strings.

        Raises OSError that names metrics.jsonl, and leaves it as it was.
        """
        record = {"iteration": iteration, "time": time.time()} | {key: _plain(value) for key, value in metrics.items()}
        append(self._file, (json.dumps(record, allow_nan=False) + "\n").encode())
        if self._tensorboard is not None:
            self._tensorboard.scalars(iteration, metrics)
        self._num_written += 1

    def text(self, tag: str, text: str, iteration: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.text(iteration, tag, f"```\n{text}\n```")

    def sync(self) -> None:
        """Have the lines of metrics.jsonl survive a power cut. Raises OSError that names it."""
        fsync(self._path)

    def line(self, iteration: int, metrics: Mapping[str, float], shown: Mapping[str, str]) -> None:
        """One console line: progress, the metrics named in `shown` (key -> label), pace and time left."""
        elapsed = time.perf_counter() - self._started_at
        pace = elapsed / max(self._num_written, 1)
        left = pace * (self._num_iterations - iteration - 1)
        width = len(str(self._num_iterations))
        values = "  ".join(f"{label} {metrics[key]:.4g}" for key, label in shown.items() if key in metrics)
        print(
            f"[{iteration + 1:{width}d}/{self._num_iterations}]  {values}  {pace:.2f} s/it  {_duration(left)} left",
            file=self._console,
            flush=True,
        )

    def close(self) -> None:
        """Raises nothing: what must be on the disk went there by `sync`, and an error here would hide the real one."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        try:
            self._file.close()
        except OSError as error:
            logger.warning("%s: closed with an error: %s", self._path, error.strerror)


class _EventFile:
    """What TensorBoard reads. The first error is logged and ends it.

    torch's SummaryWriter hands records to a thread. On a full disk that thread leaves a torn record and dies with a
    traceback on stderr, and some later call raises its error. Here a record is written at once, whole or not at all.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """Has TensorBoard forget what other files in `directory` say of `first_step` and the steps after it."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._directory = directory
        self._file: io.FileIO | None = None
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        try:
            directory.mkdir(exist_ok=True)
            self._file = (directory / name).open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)
        self._add(step=first_step, file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values_by_tag = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=values_by_tag))

    def text(self, step: int, tag: str, text: str) -> None:
        from torch.utils.tensorboard.summary import text as summary  # imports torch: the config tools do without

        self._add(step=step, summary=summary(tag, text))

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            return
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        try:
            append(self._file, record.getvalue())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s: %s; the run goes on without TensorBoard", self._directory, error.strerror)
        self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # some network filesystems tell at closing only; it is no loss then
                file.close()


def _plain(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
