"""A run on a real Slurm, over time limits, failures, and its users."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.slurm.conftest import CLUSTER, ROOT, SMALL, MiniSlurm, Run, processes

TWO_TRAINERS = (*SMALL, "launch.num_trainer_nodes=2")


def job_of(run: Run) -> str:
    return run.state["job_ids"][-1]


def kill_trainer(run: Run, number: int = signal.SIGKILL) -> None:
    """The first process of the trainer."""
    (pid,) = processes("reval_mcore.cli train", str(run.path), "\0RANK=0\0", "\0LOCAL_RANK=0\0")
    os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_chain_goes_on_over_time_limits_a_failure_and_a_refused_requeue(
    slurm: MiniSlurm, tiny_model: Path, run: Run
) -> None:
    """Two trainer nodes. The signal before the time limit comes twice; the second time Slurm refuses to requeue, and
    another job is submitted after this one, whose trainer falls silent. No iteration is missing or there twice."""
    num_iterations = 24
    settings = run.settings(tiny_model, tiny_model)
    changes = (f"run.num_iterations={num_iterations}", "launch.trainer_timeout_s=30", "launch.preflight=false")
    slurm.submit(*settings, *TWO_TRAINERS, *changes)
    first_job = job_of(run)
    for cut in range(2):
        run.wait_for_iterations(4 * (cut + 1))
        if cut == 1:
            slurm.run("scontrol", "update", f"jobid={first_job}", "requeue=0")
        assert slurm.run("scancel", "--batch", "--signal=USR1", first_job).returncode == 0
        run.wait_for_log(rf"(?s)(time_limit: stopped at a checkpoint.*){{{cut + 1}}}")
        run.wait("the next attempt begins", lambda cut=cut: len(run.attempts()) == cut + 2)
    assert "Slurm does not requeue this job" in run.log
    assert len(run.state["job_ids"]) == 2
    before = len(run.iterations())
    run.wait_for_iterations(before + 3)
    kill_trainer(run, signal.SIGSTOP)
    told = r"failed after a newer checkpoint: the trainer was silent for 3\d s, after it had come to iteration"
    run.wait_for_log(f"requeued: {told}")
    run.wait_for_end("finished")
    assert run.iterations() == list(range(num_iterations))
    assert run.attempts() == [f"attempt_{number:03d}" for number in range(4)]
    assert run.state["num_failures"] == 1
    assert (run.path / "summary.json").exists()
    run.wait("nothing of it runs", lambda: not slurm.of(run.path) and not slurm.queue(), timeout_s=30)


@pytest.mark.slow
def test_a_trainer_that_crashes_before_any_new_checkpoint_ends_the_chain(
    slurm: MiniSlurm, tiny_model: Path, run: Run
) -> None:
    settings = run.settings(tiny_model, tiny_model)
    changes = ("run.num_iterations=1000", "checkpoint.interval=1000", "launch.preflight=false")
    slurm.submit(*settings, *TWO_TRAINERS, *changes)
    run.wait_for_iterations(1)
    kill_trainer(run)
    run.wait_for_end("failed")
    assert "failed before any new checkpoint, so the next attempt would too" in run.state["detail"]
    assert run.attempts() == ["attempt_000"]
    assert "failed before any new checkpoint" in slurm.launch("status", str(run.path)).stdout
    run.wait("nothing of it runs", lambda: not slurm.of(run.path) and not slurm.queue(), timeout_s=30)
    assert "ExitCode=1:0" in slurm.run("scontrol", "show", "job", job_of(run)).stdout


@pytest.mark.slow
def test_users_look_stop_and_cancel(slurm: MiniSlurm, tiny_model: Path, run: Run) -> None:
    """Nothing of an environment that a user writes is lost, or becomes code, on its way to the trainer."""
    note = "a b $(touch pwned) `touch pwned` 'it is' \"so\"\nnext line"
    file = run.path.parent / "my.toml"
    file.write_text(CLUSTER.read_text().replace("[environment]\n", f"[environment]\nNOTE = {json.dumps(note)}\n"))
    settings = run.settings(tiny_model, tiny_model)
    arguments = (*settings, *SMALL, "run.num_iterations=1000", "launch.preflight=false", "--cluster", str(file))
    assert slurm.launch(*arguments).returncode == 0
    run.wait_for_iterations(1)
    assert processes("reval_mcore.cli train", str(run.path), f"\0NOTE={note}\0")
    told = slurm.launch("status", str(run.path)).stdout
    for expected in ("RUNNING", "running", "attempt_000", "iteration", "step_0"):
        assert expected in told
    assert re.search(r"\[ *\d+/1000\]", slurm.launch("logs", str(run.path), "trainer").stdout)
    refused = slurm.launch("logs", str(run.path), "nothing")
    assert refused.returncode == 2
    assert "there are: job.log" in refused.stderr
    attached = slurm.launch("attach", str(run.path), "--", "printenv", "SLURMD_NODENAME")
    assert attached.stdout.strip() == "n1"
    again = slurm.launch(*arguments)
    assert again.returncode == 2
    assert "stop it first" in again.stderr

    assert slurm.launch("stop", str(run.path)).returncode == 0
    run.wait_for_end("stopped")
    assert "stopped by its user" in run.state["detail"]
    done = len(run.iterations())
    assert (run.path / "checkpoints" / "latest").readlink().name == f"step_{done:06d}"

    assert slurm.launch(*arguments).returncode == 0  # the same command goes on from there
    run.wait_for_iterations(done + 1)
    assert slurm.run("scontrol", "requeue", job_of(run)).returncode == 0  # an administrator's
    run.wait("the next attempt begins", lambda: len(run.attempts()) == 3)
    run.wait(
        "it trains", lambda: run.state["standing"] == "running" and (run.path / "control" / "trainer.json").exists()
    )
    assert slurm.run("scancel", job_of(run)).returncode == 0
    run.wait("nothing of it runs", lambda: not slurm.of(run.path) and not slurm.queue(), timeout_s=60)
    assert run.state["standing"] == "cancelled"
    assert not list(run.path.parent.rglob("pwned"))
    assert not (ROOT / "pwned").exists()
    assert run.iterations() == list(range(len(run.iterations())))
    assert "nothing to stop" in slurm.launch("stop", str(run.path)).stdout


def test_unfit_nodes_are_named_before_anything_starts(slurm: MiniSlurm, tiny_model: Path, run: Run) -> None:
    file = run.path.parent / "my.toml"
    file.write_text(CLUSTER.read_text().replace("min_free_disk_gib = 1.0", "min_free_disk_gib = 1e6"))
    settings = (*run.settings(tiny_model, tiny_model), *SMALL, "launch.num_trainer_nodes=2", "--cluster", str(file))
    done = slurm.launch(*settings, "--wait", timeout_s=120)
    assert done.returncode == 1
    for expected in ("n1: ", "n2: ", "node.min_free_disk_gib", 'exclude = "n1,n2"'):
        assert expected in done.stdout
    assert not (run.path / "metrics.jsonl").exists()


def test_a_job_cancelled_in_the_queue_can_be_submitted_again(slurm: MiniSlurm, tiny_model: Path, run: Run) -> None:
    busy = slurm.run("sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    settings = (*run.settings(tiny_model, tiny_model), *SMALL, "--cluster", str(CLUSTER))
    assert slurm.launch(*settings).returncode == 0
    assert "PENDING" in slurm.launch("status", str(run.path)).stdout
    refused = slurm.launch(*settings)
    assert refused.returncode == 2
    assert "its last job is submitted; stop it first" in refused.stderr
    assert slurm.launch("stop", str(run.path)).returncode == 0
    assert run.state["standing"] == "cancelled"
    assert slurm.launch(*settings).returncode == 0
    assert slurm.run("scancel", job_of(run)).returncode == 0  # by hand: nobody tells the run
    assert slurm.launch(*settings).returncode == 0
    assert slurm.run("scancel", busy.stdout.strip()).returncode == 0


def test_what_slurm_refuses_is_told_in_its_words(slurm: MiniSlurm, tiny_model: Path, run: Run) -> None:
    settings = run.settings(tiny_model, tiny_model)
    file = run.path.parent / "my.toml"
    for lines, said, remedy in (
        ('partition = "gpux"', "invalid partition specified: gpux", f"slurm.partition in {file}"),
        ('partition = "reserved"\naccount = "physics"', "Invalid account", f"slurm.account in {file}"),
    ):
        file.write_text(CLUSTER.read_text().replace("[slurm]\n", f"[slurm]\n{lines}\n"))
        done = slurm.launch(*settings, *SMALL, "--cluster", str(file))
        assert done.returncode == 2, done.stdout
        assert said in done.stderr
        assert remedy in done.stderr
        assert run.state["standing"] == "failed"


def test_what_is_missing_is_told_before_anything_is_submitted(slurm: MiniSlurm, tiny_model: Path, run: Run) -> None:
    settings = run.settings(tiny_model, tiny_model)
    for changes, told in (
        (("--cluster", "nowhere.toml"), "nowhere.toml: there is no such file"),
        (("--cluster", str(CLUSTER), "model.hf_path=nowhere"), "nowhere"),
        (("--cluster", str(CLUSTER), "run.directory=/proc/nowhere"), "/proc/nowhere"),
        (("--cluster", str(CLUSTER), "parallel.tensor_model_parallel_size=3"), "tensor"),
    ):
        done = slurm.launch(*settings, *SMALL, *changes)
        assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    assert slurm.queue() == ""
