"""`reval train` in several processes: the same run under every layout, stopped and gone on with under another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from reval_mcore.replay.shards import read_trajectories
from tests.integration.test_train import ROOT, SMALL, metrics, paths_of

TP2 = ("parallel.tensor_model_parallel_size=2",)
DP2 = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
PP2_DP2 = ("parallel.pipeline_model_parallel_size=2", *DP2)


def command(num_processes: int, *arguments: str) -> list[str]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes), "-m")
    return [sys.executable, "-m", *(launcher if num_processes > 1 else ()), "reval_mcore.cli", *arguments]


def start(num_processes: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(num_processes, *arguments),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 150.0) -> str:
    """What it printed; it must end well, and is ended with all that it started where it does not end at all."""
    try:
        said, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


def train(tiny_model: Path, run: Path, num_processes: int, *overrides: str) -> str:
    return finish(start(num_processes, "train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL, *overrides))


def trajectories(run: Path) -> list[tuple[str, list[int], float]]:
    """In the order of admission: the shards of an iteration by rank."""
    paths = sorted((run / "replay" / "shards").iterdir(), key=lambda path: path.stem.split("-")[::-1])
    return [
        (each.trajectory_id, each.response_tokens.tolist(), each.reward)
        for path in paths
        for each in read_trajectories(path)
    ]


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for record, other in zip(found, expected, strict=True):
        assert set(record) == set(other)
        for name, value in other.items():
            is_count = name.startswith(("collect/", "replay/", "evaluation/", "progress/")) or name == "iteration"
            if is_count:
                assert record[name] == pytest.approx(value, rel=1e-12), name
            elif not name.startswith("mismatch/"):  # rounding, and no more than that: it is compared with 0 below
                assert record[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
        assert record["mismatch/logprob_abs_max"] < 1e-4


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process; every shard is kept."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_model, run, 1, "checkpoint.keep=9")
    return run


LAYOUTS: Mapping[str, tuple[int, tuple[str, ...]]] = {"tp2": (2, TP2), "dp2": (2, DP2), "pp2_dp2": (4, PP2_DP2)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_under_a_layout_is_the_run_of_one_process(
    alone: Path, tiny_model: Path, tmp_path: Path, layout: str
) -> None:
    """The same prompts, responses, rewards and samples of the buffer; losses up to rounding."""
    num_processes, parallel = LAYOUTS[layout]
    said = train(tiny_model, tmp_path / "run", num_processes, *parallel, "checkpoint.keep=9", "updates.passes=2")
    assert said.count("[4/4]") == said.count("finished;") == 1
    assert_same_run(metrics(tmp_path / "run"), metrics(alone))
    assert trajectories(tmp_path / "run") == trajectories(alone)
    shards = {path.name.partition("-")[0] for path in (tmp_path / "run" / "replay" / "shards").iterdir()}
    assert shards == {f"inline{rank:03d}" for rank in range(num_processes)}
    logs = {path.name for path in (tmp_path / "run" / "logs" / "attempt_000").iterdir()}
    assert logs == {f"rank_{rank:03d}.log" for rank in range(num_processes)}


def test_a_signal_to_any_rank_stops_all_and_another_layout_goes_on(
    alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL, "checkpoint.keep=9")
    process = start(2, *arguments, *TP2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/4]"):
            break
    workers = psutil.Process(process.pid).children(recursive=True)
    last = next(w for w in workers if w.environ().get("RANK") == "1" and "reval_mcore.cli" in " ".join(w.cmdline()))
    last.send_signal(signal.SIGUSR1)
    said = finish(process)
    record = json.loads((run / "control" / "exit.json").read_text())
    assert record["reason"] == "SIGUSR1", said
    assert record["iteration"] < 4
    train(tiny_model, run, 2, *DP2, "checkpoint.keep=9")
    assert_same_run(metrics(run), metrics(alone))


def test_a_layout_continues_from_a_checkpoint_of_another_after_a_kill(
    alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Every process of a data-parallel run is killed in a background save or near it; one process goes on."""
    run = tmp_path / "run"
    arguments = ("train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL, "checkpoint.keep=9")
    process = start(2, *arguments, *DP2, "checkpoint.async_save=true")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/4]"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    workers = [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or [])]
    for worker in workers:
        worker.kill()
    process.wait()
    deadline = time.monotonic() + 30.0
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, "a process is left behind"
        time.sleep(0.05)
    train(tiny_model, run, 1, "checkpoint.keep=9")
    assert_same_run(metrics(run), metrics(alone))


def test_a_layout_without_its_processes_is_refused_before_any_group_is_made(tiny_model: Path, tmp_path: Path) -> None:
    process = start(2, "train", "configs/demo.toml", *paths_of(tiny_model, tmp_path / "run"), *SMALL,
                    "parallel.context_parallel_size=4")  # fmt: skip
    said, _ = process.communicate(timeout=120.0)
    assert "one copy of the model takes 1 x 1 x 4 = 4 processes" in said
    assert "choose sizes whose product is one of 1, 2" in said
    assert not (tmp_path / "run").exists()


HALFWAY = 5
LEARNING = ("evaluation.interval=5", "evaluation.max_prompts=256")


@pytest.fixture(scope="module")
def halfway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo after some iterations in one process, at about 0.5."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    arguments = ("train", "configs/demo.toml", *paths_of(tiny_model, run), f"run.num_iterations={HALFWAY}")
    finish(start(1, *arguments, *LEARNING))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [TP2, DP2], ids=["tp2", "dp2"])
def test_the_demo_learns_in_two_processes(
    halfway: Path, tiny_model: Path, tmp_path: Path, parallel: tuple[str, ...]
) -> None:
    """From a checkpoint of one process; at least 0.10 in 15 iterations."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(halfway), str(run)], check=True)
    arguments = ("train", "configs/demo.toml", *paths_of(tiny_model, run), f"run.num_iterations={HALFWAY + 15}")
    finish(start(2, *arguments, *LEARNING, *parallel), timeout_s=280.0)
    accuracy = [record["evaluation/accuracy"] for record in metrics(run) if "evaluation/accuracy" in record]
    at_checkpoint = accuracy[HALFWAY // 5 - 1]
    assert 0.4 < at_checkpoint < 0.7
    assert accuracy[-1] - at_checkpoint > 0.10, accuracy
    residuals = [record["update/residual_abs"] for record in metrics(run)]
    assert np.isfinite(residuals).all()
