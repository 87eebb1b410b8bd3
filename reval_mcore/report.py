"""A run as a picture: what was learned, and how the loss behaved while it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reval_mcore.config import check_readable, read_json

_EVERYWHERE = {"iteration", "progress/reference_age"}  # keys of every record
_INK, _FAINT, _POLICY, _HELD_OUT = "#1a1a1a", "#b8b8b8", "#2f6db5", "#c8442c"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises ValueError where there is none, and where a line is not one of a run."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run}: no metrics.jsonl in it; give a run directory, for example runs/demo")
    check_readable(path)
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):  # a run that is going on may be writing one
            records.append(_record(line, f"{path}, line {number}"))
    return records


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError or UnicodeDecodeError
        raise ValueError(f"{place}: is not JSON; remove the line") from None
    if not isinstance(record, dict) or not record.keys() >= _EVERYWHERE:
        raise ValueError(f"{place}: is not a record of reval train; give the run directory of one")
    return record


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json, empty while the run is going on."""
    path = run / "summary.json"
    return read_json(path) if path.exists() else {}


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(iterations finished, values) of the records that have `key`."""
    chosen = [record for record in records if key in record]
    return np.array([r["iteration"] + 1 for r in chosen]), np.array([float(r[key]) for r in chosen])


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _resets(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Iterations after which the reference was reset."""
    return [record["iteration"] + 1 for record in records if record["progress/reference_age"] == 0]


def draw_curve(run: Path) -> Path:
    """Draw RUN/curve.png from metrics.jsonl and, where the run has ended, summary.json; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records, summary = read_metrics(run), read_summary(run)
    if not records:
        raise ValueError(f"{run / 'metrics.jsonl'}: no iteration is finished yet; come back later")
    figure = Figure(figsize=(10, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.9, 1.0))
    resets = _resets(records)
    _draw_accuracy(figure.add_subplot(grid[0, :]), records, summary, resets)
    small = (
        ("update/residual_abs", r"mean |residual|, nats"),
        ("update/log_ratio", r"mean $\log\,\pi_\theta(\tau)\,/\,\pi_{ref}(\tau)$, nats"),
        ("replay/age_mean", "mean age in the buffer, policy versions"),
    )
    for column, (key, title) in enumerate(small):
        axes = figure.add_subplot(grid[1, column])
        axes.plot(*_series(records, key), color=_INK, linewidth=1.0)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("iteration", fontsize=8)
        _tidy(axes, resets)
    path = run / "curve.png"
    figure.savefig(path)
    return path


def _draw_accuracy(
    axes: Any, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], resets: Sequence[int]
) -> None:
    iterations, accuracy = _series(records, "collect/accuracy")
    axes.plot(iterations, accuracy, color=_POLICY, alpha=0.25, linewidth=0.8)
    axes.plot(iterations, _smooth(accuracy, 10), color=_POLICY, linewidth=1.8, label="fresh rollouts, mean of 10")
    for name, label, style in (("accuracy", "sampled", "o-"), ("greedy_accuracy", "greedy", "s--")):
        x, y = _series(records, f"evaluation/{name}")
        if f"{name}_before" in summary:
            x, y = np.append(0, x), np.append(summary[f"{name}_before"], y)
            if x[-1] != summary["iterations"]:
                x, y = np.append(x, summary["iterations"]), np.append(y, summary[f"{name}_after"])
        if len(x):
            axes.plot(x, y, style, color=_HELD_OUT, markersize=4, linewidth=1.2, label=f"held-out prompts, {label}")
            axes.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), xytext=(6, -3), textcoords="offset points", fontsize=9)
    for iteration in resets[:1]:
        axes.axvline(iteration, color=_FAINT, linewidth=0.8, linestyle=":", label="reference reset")
    axes.set_ylim(0.0, 1.02)
    axes.set_ylabel("accuracy")
    axes.set_xlabel("iteration")
    axes.set_title(_title(summary), fontsize=11, loc="left")
    _tidy(axes, resets)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def _title(summary: Mapping[str, Any]) -> str:
    if not summary:
        return "Accuracy (run not finished)"
    seconds = sum(summary["seconds"].values())
    return (
        f"ReVal: {summary['accuracy_before']:.2f} to {summary['accuracy_after']:.2f} in {summary['iterations']} "
        f"iterations: {summary['updates']} updates, {summary['trajectories_generated']:,} trajectories, {seconds:.0f} s"
    )


def _tidy(axes: Any, resets: Sequence[int]) -> None:
    for iteration in resets:
        axes.axvline(iteration, color=_FAINT, linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
