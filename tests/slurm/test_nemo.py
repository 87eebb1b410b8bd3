"""nemo-run submits to a real Slurm, and its users learn how their run stands and how it ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.conftest import CLUSTER, ROOT, SMALL, MiniSlurm, Run

PYTHON = ROOT / ".nemo_run" / "bin" / "python"


@pytest.fixture
def with_account(tmp_path: Path) -> Path:
    """nemo-run names an account always."""
    if not PYTHON.exists():
        reason = "no nemo-run; make its environment (100 MB): bash tools/nemo_run/install.sh"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER.read_text().replace("[slurm]\n", '[slurm]\naccount = "research"\npartition = "all"\n'))
    return file


@pytest.mark.slow
def test_a_run_is_cut_goes_on_and_finishes(
    slurm: MiniSlurm, tiny_model: Path, run: Run, with_account: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    launched = slurm.run(
        *("env", f"NEMORUN_HOME={records}", str(PYTHON), "-m", "launchers.nemo"),
        *(*run.settings(tiny_model, tiny_model), *SMALL, "run.num_iterations=8"),
        *("--cluster", str(with_account)),
        timeout_s=120,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    (job,) = run.state["job_ids"]
    run.wait_for_iterations(3)
    status = slurm.run(str(PYTHON), "-m", "launchers.nemo", "status", str(run.path))
    assert "RUNNING" in status.stdout
    assert slurm.run("scancel", "--signal=USR1", job).returncode == 0  # to every step, as its --signal does it
    run.wait_for_log("requeued: time_limit: stopped at a checkpoint")
    run.wait_for_end("finished")
    assert run.iterations() == list(range(8))
    assert len(run.attempts()) == 2
    (record,) = (records / "experiments").iterdir()
    assert record.name.startswith("reval-run-")


@pytest.mark.slow
def test_a_failure_is_one(slurm: MiniSlurm, tiny_model: Path, run: Run, with_account: Path, tmp_path: Path) -> None:
    """The prompts are gone when the job starts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("no prompts\n")
    launched = slurm.run(
        *("env", f"NEMORUN_HOME={tmp_path / 'records'}", str(PYTHON), "-m", "launchers.nemo"),
        *(*run.settings(tiny_model, tiny_model), f"prompts.train={prompts}", *SMALL, "launch.preflight=false"),
        *("--cluster", str(with_account), "--wait"),
        timeout_s=200,
    )
    assert launched.returncode == 1, launched.stdout + launched.stderr
    assert "failed: failed before any new checkpoint" in launched.stdout
    assert f"{prompts}" in launched.stdout
    shown = slurm.run("scontrol", "show", "job", run.state["job_ids"][0]).stdout
    assert "ExitCode=1:0" in shown


def test_what_nemo_run_cannot_do_is_refused(slurm: MiniSlurm, tiny_model: Path, run: Run, with_account: Path) -> None:
    for changes, told in (
        (("--cluster", str(CLUSTER)), "slurm.account"),
        (("--cluster", str(with_account), f"run.directory={run.path} $(x)"), "nemo-run takes letters"),
    ):
        done = slurm.run(str(PYTHON), "-m", "launchers.nemo", *run.settings(tiny_model, tiny_model), *changes)
        assert (done.returncode, done.stdout) == (2, "")
        assert told in done.stderr


def test_without_nemo_run_it_says_how_to_get_it(
    slurm: MiniSlurm, tiny_model: Path, run: Run, with_account: Path
) -> None:
    settings = (*run.settings(tiny_model, tiny_model), *SMALL, "--cluster", str(with_account))
    done = slurm.launch(*settings, program="nemo")
    assert done.returncode == 2
    assert 'pip install "reval_mcore[launch]"' in done.stderr
