"""One object an iteration, whatever the numbers are and however full the disk."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.metrics import MetricsWriter, PhaseClock
from tests.small_disk import SmallDisk, fill


def open_writer(directory: Path, *, first_iteration: int = 0, tensorboard: bool = False) -> MetricsWriter:
    return MetricsWriter(
        directory, first_iteration=first_iteration, num_iterations=9, tensorboard=tensorboard, console=io.StringIO()
    )


METRICS = {f"group/name_{i}": i / 3 for i in range(40)}


def write_many(writer: MetricsWriter, count: int) -> None:
    for iteration in range(count):
        writer.write(iteration, METRICS)


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def iterations(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_every_value_survives_json_nan_and_infinity_too(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write(0, {"a": 1.5, "b": float("nan"), "c": float("-inf")})
    writer.sync()
    writer.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["iteration"], record["a"], record["b"], record["c"]) == (0, 1.5, "nan", "-inf")


def test_the_same_scalars_go_to_tensorboard(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, tensorboard=True)
    for iteration in range(3):
        writer.write(iteration, {"update/loss": 0.5 * iteration, "b": float("nan")})
    assert curve(tmp_path / "tensorboard", "update/loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]  # before it is closed
    writer.text("samples/0", "1 + 1 = 2", 2)
    writer.close()
    assert b"1 + 1 = 2" in next((tmp_path / "tensorboard").iterdir()).read_bytes()


def test_tensorboard_forgets_the_future_that_was_abandoned(tmp_path: Path) -> None:
    for first_iteration, value in ((0, 1.0), (2, 2.0)):
        writer = open_writer(tmp_path, first_iteration=first_iteration, tensorboard=True)
        for iteration in range(first_iteration, 4):
            writer.write(iteration, {"a": value})
        writer.close()
        for path in (tmp_path / "tensorboard").glob("*.tfevents.*"):  # the next attempt is another process
            path.rename(path.with_name(f"{path.name}.{first_iteration}"))
    assert curve(tmp_path / "tensorboard", "a") == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def write_until_full(disk: Path) -> dict[str, Any]:
    writer = open_writer(disk)
    ballast = fill(disk, leave_kb=4)
    with pytest.raises(OSError) as caught:
        write_many(writer, 100)
    writer.close()
    kept = iterations(disk / "metrics.jsonl")
    ballast.unlink()
    writer = open_writer(disk)
    writer.write(len(kept), METRICS)
    writer.close()
    return {
        "errno": caught.value.errno,
        "message": str(caught.value),
        "kept": kept,
        "after": iterations(disk / "metrics.jsonl"),
    }


def test_a_full_disk_leaves_whole_lines_and_a_clear_error(small_disk: SmallDisk) -> None:
    found = small_disk.call(write_until_full, size_kb=64, timeout_s=30)
    assert found["errno"] == errno.ENOSPC
    assert f"not written: No space left on device: '{small_disk.mount_point}/metrics.jsonl'" in found["message"]
    assert found["kept"] == list(range(len(found["kept"])))
    assert len(found["kept"]) >= 2
    assert found["after"] == [*found["kept"], len(found["kept"])]


def write_beside_a_full_tensorboard(disk: Path, run: str, leave_kb: int) -> dict[str, Any]:
    """metrics.jsonl is on another disk. What reaches stderr is caught: warnings, and tracebacks of threads."""
    stderr = sys.stderr = io.StringIO()
    logging.lastResort = logging.StreamHandler(stderr)
    (Path(run) / "tensorboard").symlink_to(disk)
    writer = open_writer(Path(run), tensorboard=True)
    fill(disk, leave_kb=leave_kb)
    write_many(writer, 200)
    writer.text("samples/0", "1 + 1 = 2", 199)
    threads = threading.active_count()
    writer.close()
    return {"stderr": stderr.getvalue(), "threads": threads, "curve": curve(disk, "group/name_3")}


@pytest.mark.parametrize("leave_kb", [0, 8])
def test_a_full_tensorboard_costs_one_warning_and_nothing_else(
    small_disk: SmallDisk, tmp_path: Path, leave_kb: int
) -> None:
    found = small_disk.call(
        write_beside_a_full_tensorboard, size_kb=64, timeout_s=60, run=str(tmp_path), leave_kb=leave_kb
    )
    warning = "not written: No space left on device; the run goes on without TensorBoard"
    assert found["stderr"] == f"{tmp_path}/tensorboard: {warning}\n"
    assert found["threads"] == 1
    steps = [step for step, _ in found["curve"]]
    assert steps == list(range(len(steps)))  # whole records
    assert len(steps) >= (1 if leave_kb == 0 else 4)
    assert iterations(tmp_path / "metrics.jsonl") == list(range(200))


def test_where_tensorboard_cannot_start_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("something else")
    writer = open_writer(tmp_path, tensorboard=True)
    writer.write(0, {"a": 1.0})
    writer.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/tensorboard: File exists; the run goes on without TensorBoard"
    ]
    assert iterations(tmp_path / "metrics.jsonl") == [0]


def test_the_console_line_shows_progress_and_what_was_asked_for(tmp_path: Path) -> None:
    console = io.StringIO()
    writer = MetricsWriter(tmp_path, first_iteration=0, num_iterations=120, tensorboard=False, console=console)
    writer.write(11, {"update/loss": 0.12345})
    writer.line(11, {"update/loss": 0.12345}, {"update/loss": "loss", "absent": "absent"})
    line = console.getvalue()
    assert line.startswith("[ 12/120]  loss 0.1235  ")
    assert line.endswith(" left\n")
    assert "absent" not in line


def test_phases_add_up_over_a_step_and_over_the_run() -> None:
    clock = PhaseClock()
    for _ in range(2):
        with clock.phase("a"), clock.phase("b"):
            pass
    step = clock.take_step()
    assert set(step) == {"a", "b"}
    assert clock.take_step() == {}
    assert clock.total_s == step
