"""Collectors as processes beside a trainer: an asynchronous run learns, ends, and outlives the loss of any of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from reval_mcore.replay.shards import SHARDS, read_trajectories
from tests.forks import Forks
from tests.sglang.conftest import Servers
from tests.sglang.faulty_proxy import FaultyProxy
from tests.sglang.runs import Processes, on_servers, reval, settings, summary_of, wait_for_iterations


def check_replay(run: Path, num_blocks: int, size: int) -> None:
    """What was admitted: every block once and whole, each trajectory with the versions that it is of."""
    admitted = [json.loads(line) for line in (run / "replay" / "journal.jsonl").read_text().splitlines()]
    names = [str(entry["shard"]) for entry in admitted if "shard" in entry]
    blocks: Counter[str] = Counter()
    for name in names:
        for trajectory in read_trajectories(run / "replay" / SHARDS / name):
            blocks[trajectory.trajectory_id.partition("-")[0]] += 1
            spans = trajectory.version_spans
            assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
            assert spans[-1].end == len(trajectory.response_tokens)
    assert len(blocks) >= num_blocks
    assert set(blocks.values()) == {size}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_asynchronous_run_learns_though_processes_are_killed(
    servers: Servers,
    tiny_model: Path,
    half_way: Path,
    tmp_path: Path,
    processes: Processes,
) -> None:
    run = tmp_path / "run"
    arguments = [
        *settings(tiny_model, half_way, run),
        *on_servers(servers(2), tmp_path),
        "run.num_iterations=10",
        "rollout.mode=asynchronous",
        "rollout.collector_timeout_s=30",
        "checkpoint.interval=2",
        "replay.capacity=5120",
    ]
    collectors = {name: processes.start(name, "collect", *arguments, "--name", name) for name in ("one", "two")}
    trainer = processes.start("trainer", "train", *arguments)
    wait_for_iterations(run, 2, trainer)
    os.killpg(collectors["one"].pid, signal.SIGKILL)
    wait_for_iterations(run, 5, trainer)
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    processes.start("one again", "collect", *arguments, "--name", "one")
    trainer = processes.start("trainer again", "train", *arguments)
    assert trainer.wait(1800.0) == 0, processes.log("trainer again")
    assert collectors["two"].wait(120.0) == 0
    assert "stopped by finished" in processes.log("two")
    logs = processes.log("one") + processes.log("two")  # they have evaluated too, before the first iteration
    assert len(set(re.findall(r"evaluation of version 0, part (\d+)", logs))) == 4
    assert "evaluation of version 10, part" in processes.log("two")
    summary = summary_of(run)
    assert summary["iterations"] == 10
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.10
    check_replay(run, num_blocks=10, size=128)


def loop_seconds(run: Path) -> float:
    """Of all iterations but the first, which has the start of everything in it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(value for line in lines[1:] for name, value in line.items() if name.startswith("seconds/"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_collectors_hide_the_latency_of_servers(
    forks: Forks, servers: Servers, tiny_model: Path, tmp_path: Path, processes: Processes
) -> None:
    """Every response takes 2 s longer: an asynchronous run takes at most 0.7 of the time of a synchronous one."""
    with contextlib.ExitStack() as stack:
        proxies = [FaultyProxy(url, latency_s=2.0) for url in servers(2)]
        for proxy in proxies:
            stack.callback(proxy.close)
        for mode in ("synchronous", "asynchronous"):
            arguments = [
                *settings(tiny_model, tiny_model, tmp_path / mode),
                *on_servers([proxy.url for proxy in proxies], tmp_path),
                "run.num_iterations=8",
                "evaluation.max_prompts=16",
                # little to compute, as that takes the same time in both modes
                "rollout.num_prompts=4",
                "rollout.num_responses=4",
                "updates.batch_size=16",
                "updates.per_iteration=1",
                f"rollout.mode={mode}",
            ]
            if mode == "asynchronous":
                processes.train(*arguments, timeout_s=400.0)
            else:
                done = reval(forks, "train", *arguments, timeout_s=400.0)
                assert done.returncode == 0, done.stderr
    synchronous, asynchronous = (loop_seconds(tmp_path / mode) for mode in ("synchronous", "asynchronous"))
    print(f"synchronous {synchronous:.1f} s, asynchronous {asynchronous:.1f} s: {asynchronous / synchronous:.3f}")
    assert asynchronous <= 0.7 * synchronous
