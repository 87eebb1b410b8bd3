"""slurm/train.sbatch, and the launcher of one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import CLUSTER, ROOT, SMALL, MiniSlurm, Run, processes

SETTINGS = tuple(setting for setting in SMALL if not setting.startswith("launch."))


@pytest.mark.slow
def test_the_plain_script_is_cut_goes_on_and_finishes(slurm: MiniSlurm, tiny_model: Path, run: Run) -> None:
    run.path.mkdir()
    config, _, *settings = run.settings(tiny_model, tiny_model)
    submitted = slurm.run(
        *(
            "sbatch",
            "--parsable",
            "--gpus-per-node=0",
            f"--output={run.path}/job.log",
            "--export=ALL,GLOO_SOCKET_IFNAME=lo",
        ),
        *("slurm/train.sbatch", str(run.path), config, *settings, *SETTINGS, "run.num_iterations=10"),
    )
    assert submitted.returncode == 0, submitted.stderr
    run.wait_for_iterations(3)
    assert slurm.run("scancel", "--batch", "--signal=USR1", submitted.stdout.strip()).returncode == 0
    run.wait("it goes on", lambda: len(run.attempts()) == 2)
    run.wait("it has finished", lambda: (run.path / "summary.json").exists())
    assert run.iterations() == list(range(10))
    run.wait("the job has ended", lambda: slurm.queue() == "")
    assert "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", submitted.stdout.strip()).stdout


@pytest.mark.slow
def test_on_one_machine_a_crash_is_survived_and_ctrl_c_stops(tiny_model: Path, tmp_path: Path) -> None:
    """Two "nodes" of one process each."""
    run = Run(tmp_path / "run")
    arguments = (*run.settings(tiny_model, tiny_model), *SMALL, "launch.num_trainer_nodes=2", "launch.preflight=false")
    command = [sys.executable, "-m", "launchers.local", *arguments, "--cluster", str(CLUSTER)]
    log = tmp_path / "told"
    with (
        log.open("wb") as told,
        subprocess.Popen([*command, "run.num_iterations=1000"], cwd=ROOT, stdout=told, stderr=told) as process,
    ):
        try:
            run.wait_for_iterations(2)
            (pid,) = processes("reval_mcore.cli train", str(run.path), "\0RANK=1\0")
            os.kill(pid, signal.SIGKILL)
            run.wait("the next attempt trains", lambda: len(run.attempts()) == 2)
            done = len(run.iterations())
            run.wait_for_iterations(done + 2)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
    assert run.state["standing"] == "cancelled"
    assert run.state["num_failures"] == 1
    assert run.iterations() == list(range(len(run.iterations())))
    assert json.loads((run.path / "control" / "exit.json").read_text())["iteration"] == len(run.iterations())
    run.wait("nothing of it runs", lambda: not processes(str(run.path)), timeout_s=30)
