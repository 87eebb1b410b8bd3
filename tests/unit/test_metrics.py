"""One object an iteration, whatever the numbers are."""

from __future__ import annotations

import io
import json
from pathlib import Path

from reval_mcore.metrics import MetricsWriter, PhaseClock


def test_every_value_survives_json_nan_and_infinity_too(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_iteration=0, num_iterations=2, tensorboard=False, console=io.StringIO())
    writer.write(0, {"a": 1.5, "b": float("nan"), "c": float("-inf")})
    writer.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["iteration"], record["a"], record["b"], record["c"]) == (0, 1.5, "nan", "-inf")


def test_the_same_scalars_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, first_iteration=0, num_iterations=3, tensorboard=True, console=io.StringIO())
    for iteration in range(3):
        writer.write(iteration, {"update/loss": 0.5 * iteration})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("update/loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


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
