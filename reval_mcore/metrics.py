"""Where a run's numbers go: metrics.jsonl, TensorBoard, one line on the console, and seconds by phase."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class PhaseClock:
    """Seconds spent in named phases, of this step and of the whole run."""

    def __init__(self) -> None:
        self.total_s: dict[str, float] = {}
        self._step_s: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
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
    """Appends one JSON object an iteration to metrics.jsonl, and the same scalars to TensorBoard."""

    def __init__(
        self, directory: Path, *, first_iteration: int, num_iterations: int, tensorboard: bool, console: TextIO
    ) -> None:
        """TensorBoard forgets what an earlier attempt wrote at `first_iteration` and after it."""
        self._file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = _summary_writer(directory / "tensorboard", first_iteration) if tensorboard else None
        self._num_iterations = num_iterations
        self._console = console
        self._started_at = time.perf_counter()
        self._num_written = 0

    def start_clock(self) -> None:
        """Pace and time left are counted from here."""
        self._started_at = time.perf_counter()

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """`metrics` by "group/name". Values that JSON has no word for (nan, inf) are written as strings."""
        record = {"iteration": iteration, "time": time.time()} | {key: _plain(value) for key, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, iteration)
        self._num_written += 1

    def text(self, tag: str, text: str, iteration: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_text(tag, f"```\n{text}\n```", iteration)

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
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _summary_writer(directory: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard.writer import SummaryWriter  # imports torch, which the config tools do without

    return SummaryWriter(str(directory), purge_step=first_step)


def _plain(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
