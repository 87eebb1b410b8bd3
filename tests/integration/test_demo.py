"""The demo as a new user runs it: a clean copy of the tree, one command, and what it must have learned."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.report import draw_curve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without what was made in it; the warm-started model is put where the demo would make it."""
    clone = tmp_path_factory.mktemp("demo") / "clone"
    made = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, clone, ignore=made)
    shutil.copytree(tiny_model, clone / "runs" / "demo_model")
    return clone


def demo(clone: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tools/demo.sh", *overrides], cwd=clone, capture_output=True, text=True, timeout=1200, check=False
    )


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_learns_to_add(clone: Path) -> None:
    done = demo(clone)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(clone / "runs" / "demo")
    evaluation = summary["evaluation"]
    assert evaluation["num_prompts"] * evaluation["num_samples"] >= 512
    assert evaluation["temperature"] == 1.0
    assert summary["accuracy_before"] <= 0.45
    assert summary["greedy_accuracy_before"] <= 0.75
    assert summary["accuracy_after"] >= 0.75
    assert summary["reference_resets"] >= 1
    assert summary["skipped_updates"] == 0
    assert (clone / "runs" / "demo" / "curve.png").stat().st_size > 20_000
    assert draw_curve(clone / "runs" / "demo").is_file()
    for told in ("runs/demo/summary.json", "runs/demo/curve.png", "tensorboard"):
        assert told in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_permuted_rewards_teach_nothing(clone: Path) -> None:
    """The control: the same demo, its rewards dealt out at random among the trajectories of an iteration."""
    overrides = ("run.directory=runs/control", "verifier.permute_rewards=true", "evaluation.interval='never'")
    done = demo(clone, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(clone / "runs" / "control")
    assert summary["accuracy_after"] - summary["accuracy_before"] <= 0.05
