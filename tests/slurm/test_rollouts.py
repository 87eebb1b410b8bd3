"""The whole system as one Slurm job: trainers, real SGLang servers and collectors, each on nodes of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.sglang.runs import settings
from tests.sglang.servers import reason_to_skip
from tests.slurm.conftest import CLUSTER, MiniSlurm, Run, processes


def servers_of(run: Run) -> dict[str, str]:
    """Announced URLs by name."""
    folder = run.path / "control" / "servers"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {each["name"]: each["url"] for each in found}


def writers(run: Run) -> set[str]:
    """Collectors whose shards were admitted."""
    journal = (run.path / "replay" / "journal.jsonl").read_text()
    return {name for name in ("n3", "n4") if f'"{name}-' in journal}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_learns_though_a_server_crashes_and_a_node_dies(
    slurm: MiniSlurm, tiny_model: Path, half_way: Path, run: Run
) -> None:
    """Two trainer nodes (data parallel over gloo), two rollout nodes. A server is killed: its node is started again. A
    node dies: it is dropped, and training goes on. The time limit comes: the next attempt has the node back."""
    if (reason := reason_to_skip()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    changes = (
        *(
            "rollout.engine=sglang",
            "rollout.mode=asynchronous",
            "rollout.collector_timeout_s=20",
            "logging.tensorboard=true",
        ),
        *("run.num_iterations=24", "optimizer.lr=2e-4", "checkpoint.interval=2", "replay.unlink_delay_s=0"),
        *("launch.num_trainer_nodes=2", "launch.num_rollout_nodes=2", "launch.min_rollout_nodes=1"),
        *("launch.time_limit_minutes=60", "launch.stop_before_s=300"),
    )
    submitted = slurm.launch(*settings(tiny_model, half_way, run.path), *changes, "--cluster", str(CLUSTER))
    assert submitted.returncode == 0, submitted.stderr

    run.wait("both nodes collect", lambda: run.iterations() and writers(run) == {"n3", "n4"}, timeout_s=300)
    before = servers_of(run)
    assert set(before) == {"n3.0", "n4.0"}
    (server, *_) = processes("sglang.launch_server", "SLURMD_NODENAME=n3", f"SLURM_CONF={slurm.directory}")
    os.kill(server, signal.SIGKILL)
    run.wait_for_log(r"rollout n3: ended with status 1; again in 1 s")
    slurm.mini("kill-node", "n4")
    run.wait_for_log("rollout n4: dropped, its node is lost")
    run.wait("n3 is back", lambda: servers_of(run).get("n3.0") not in (None, before["n3.0"]), timeout_s=180)
    done = len(run.iterations())
    run.wait_for_iterations(done + 2, timeout_s=180)

    slurm.mini("start-node", "n4")
    assert slurm.run("scancel", "--batch", "--signal=USR1", run.state["job_ids"][0]).returncode == 0
    run.wait("the next attempt begins", lambda: len(run.attempts()) == 2, timeout_s=120)
    run.wait_for_log(r"attempt_001: trainers n1 n2; rollouts n3 n4")
    run.wait_for_end("finished", timeout_s=420)

    assert run.iterations() == list(range(24))
    summary = json.loads((run.path / "summary.json").read_text())
    print(f"{summary['accuracy_before']:.4f} -> {summary['accuracy_after']:.4f}")
    assert 0.4 <= summary["accuracy_before"] <= 0.6
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.10
    assert list((run.path / "tensorboard").iterdir())
    assert {"collect/accuracy", "update/loss", "replay/replay_ratio", "seconds/update"} <= set(run.metrics()[-1])
    assert servers_of(run) == {}
    run.wait("nothing of it runs", lambda: not slurm.of(run.path) and not slurm.queue(), timeout_s=60)
