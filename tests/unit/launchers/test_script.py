"""Job scripts: short, as golden files, and nothing that a user writes becomes code."""

from __future__ import annotations

import shlex
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.cluster import REPOSITORY, Cluster, load_cluster, parse_cluster
from launchers.job import Job, State, open_job, plan_job, prepare_job, read_state
from launchers.slurm import check_script, directive, job_name, options_of, refusal, render
from reval_mcore.config import Config, dumps, load, parse

GOLDEN = Path(__file__).parent / "scripts"
NASTY = [
    "$(touch pwned)",
    "`touch pwned`",
    "a b",
    "it's",
    "; touch pwned;",
    "&& touch pwned",
    "%j",
    "\u00fc",
    "-x",
    "#",
]


def paper(**launch: object) -> Config:
    raw = tomllib.loads(dumps(load(REPOSITORY / "configs" / "paper_7b_slurm.toml")))
    return parse({**raw, "launch": {**raw["launch"], **launch}}, "test")


def h100(**changes: object) -> Cluster:
    raw = tomllib.loads((REPOSITORY / "slurm" / "clusters" / "h100.toml").read_text())
    return parse_cluster({**raw, **changes}, "test")


JOBS = {
    "h100": Job(paper(), h100(), Path("/shared/runs/paper_7b")),
    "gres_modules_pyxis": Job(
        paper(num_trainer_nodes=4, num_rollout_nodes=12, time_limit_minutes=720),
        h100(
            slurm={
                **{"partition": "batch", "account": "it's ours", "qos": "high", "constraint": "h100&ib"},
                **{"gpu_option": "--gres", "exclude": "gpu[07,12-14]"},
            },
            modules=["cuda/12.8", "nccl/2.27"],
            container={"kind": "pyxis", "image": "/images/reval.sqsh", "mounts": ["/shared:/shared"]},
            python={"server": "python3", "trainer": "python3", "supervisor": "/usr/bin/python3.11"},
        ),
        Path("/shared/runs/a run of 100%"),
    ),
    "mini": Job(
        paper(num_trainer_nodes=2, num_rollout_nodes=2),
        load_cluster(REPOSITORY / "slurm" / "clusters" / "mini.toml"),
        Path("/tmp/run"),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_golden_scripts(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    script = render(JOBS[name])
    check_script(script)
    shown = script.replace(str(REPOSITORY), "/clone")
    golden = GOLDEN / f"{name}.sbatch"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(shown)
    assert shown == golden.read_text()
    assert len(shown.splitlines()) < 30


def test_no_environment_of_a_user_is_in_the_script() -> None:
    cluster = h100(environment={"NOTE": "a b $(touch pwned)"})
    assert "pwned" not in render(Job(paper(), cluster, Path("/runs/x")))


@pytest.mark.parametrize("nasty", NASTY)
def test_what_users_write_is_never_code(nasty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is run, with a supervisor that tells what it was given."""
    place = tmp_path / f"in {nasty.replace('/', '')}"
    place.mkdir()
    monkeypatch.chdir(place)
    told = place / "told"
    supervisor = place / "python"
    supervisor.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{shlex.quote(str(told))}\n')
    supervisor.chmod(0o755)
    cluster = h100(slurm={"account": nasty}, python={"server": "python3", "supervisor": str(supervisor)})
    job = Job(paper(), cluster, place / "run")
    script = render(job)
    check_script(script)
    subprocess.run(["bash"], input=script, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert told.read_text().splitlines() == ["-u", "-m", "launchers.supervisor", str(job.run)]
    assert not list(tmp_path.rglob("pwned"))
    assert directive(f"--account={nasty}") in script.splitlines()


@pytest.mark.parametrize("name", ["a\nb", "a\\b", 'a"b', "a\tb"])
def test_run_directories_that_slurm_cannot_name_are_refused(name: str, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "demo.toml"
    with pytest.raises(ValueError, match=r"run\.directory"):
        plan_job(config, [f"run.directory={tmp_path / name!s}"], REPOSITORY / "slurm" / "clusters" / "mini.toml")


def test_options_say_nothing_that_is_not_given() -> None:
    options = options_of(Job(paper(), h100(slurm={"gpu_option": "none"}), Path("/x")))
    assert not [option for option in options if option.endswith("=") or option.startswith(("--part", "--acc", "--g"))]


def test_a_name_is_of_the_whole_path() -> None:
    assert job_name(Path("/a/run 1")) != job_name(Path("/b/run 1"))
    assert job_name(Path("/a/run 1")).startswith("reval-run_1-")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("sbatch: error: invalid partition specified: gpx", "slurm.partition in my.toml"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", "slurm."),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid", "launch.time_limit_minutes"),
        ("sbatch: error: something new", "[slurm] in my.toml"),
    ],
)
def test_refusals_are_told_in_slurms_words_with_a_remedy(said: str, told: str) -> None:
    message = refusal(said, Path("my.toml"))
    assert said in message
    assert told in message


def test_a_prepared_job_is_what_was_planned(tmp_path: Path) -> None:
    config, cluster = REPOSITORY / "configs" / "paper_7b_slurm.toml", REPOSITORY / "slurm" / "clusters" / "h100.toml"
    job = plan_job(config, [f"run.directory={tmp_path / 'run'}"], cluster)
    prepare_job(job, lambda state: True)
    assert open_job(job.run) == job
    assert read_state(job.run).standing == "submitted"
    key = job.folder / "server.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(job.server_key()) > 30
    with pytest.raises(ValueError, match="its last job is submitted; stop it first"):
        prepare_job(job, lambda state: True)
    prepare_job(job, lambda state: False)  # it was lost with its machine
    job.tell("failed", "for a reason", num_failures=2)
    assert replace(read_state(job.run), updated_at=0.0) == State(
        "failed", "for a reason", num_failures=2, updated_at=0.0
    )
    prepare_job(job, lambda state: True)
    assert read_state(job.run).num_failures == 0
