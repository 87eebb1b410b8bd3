"""Slurm jobs:

    python -m launchers.slurm CONFIG --cluster FILE [section.key=value ...] [--dry-run | --wait]
    python -m launchers.slurm status|logs|stop|attach RUN

Submits one job for the whole run; cut by a time limit or a failure it queues itself again, until it has finished. All
that is asked about it later is answered from the run directory and from squeue, so no accounting is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launchers import looking
from launchers.cluster import REPOSITORY
from launchers.job import ENDED, Job, check_inputs, plan_job, prepare_job, read_state, write_state
from launchers.steps import file_pattern, gpu_request, slurm
from reval_mcore.durable import write_text

_WAIT_INTERVAL_S = 2.0
_VERBS = ("status", "logs", "stop", "attach")
# what else of the submitting shell a job sees: nothing
_EXPORTED = ("HOME", "USER", "LOGNAME", "PATH", "LANG")
_REMEDIES = (  # for what Slurm says, in its own words
    (r"account", "slurm.account in {cluster}; sacctmgr show assoc user=$USER format=account,partition lists yours"),
    (r"partition", "slurm.partition in {cluster}; sinfo -s lists what there is"),
    (r"qos|QOS", "slurm.qos in {cluster}; sacctmgr show assoc user=$USER format=qos lists yours"),
    (r"[Tt]ime limit", "launch.time_limit_minutes; sinfo -o '%P %l' lists the limits"),
    (
        r"[Nn]ode (count|configuration|names)|nodes",
        "the number of nodes in [launch], node.gpus and slurm.constraint in {cluster}",
    ),
    (r"feature|constraint", "slurm.constraint in {cluster}; sinfo -o '%P %f' lists features"),
    (r"reservation", "slurm.reservation in {cluster}; scontrol show reservation lists them"),
    (
        r"[Uu]nable to contact|munge|[Cc]onnection",
        "is this a machine of the cluster, and its controller up? scontrol ping",
    ),
)


# ---------------------------------------------------------------- the script


def job_name(run: Path) -> str:
    """The same for every job of a run directory, so that Slurm (singleton) runs one at a time."""
    plain = re.sub(r"[^\w.-]", "_", run.name, flags=re.ASCII)
    return f"reval-{plain}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"


def options_of(job: Job) -> list[str]:
    """For sbatch, one an argument, unquoted."""
    launch, wanted = job.config.launch, job.cluster.slurm
    named = ("partition", "account", "qos", "constraint", "reservation", "exclude")
    return [
        f"--job-name={job_name(job.run)}",
        f"--nodes={job.num_nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        *([gpu_request(job.cluster)] if wanted.gpu_option != "none" else []),
        *(f"--{name}={value}" for name in named if (value := vars(wanted)[name])),
        f"--time={launch.time_limit_minutes}",
        f"--signal=B:USR1@{launch.stop_before_s}",
        "--no-kill",
        "--requeue",
        "--open-mode=append",
        "--dependency=singleton",
        f"--export={','.join(_EXPORTED)}",
        f"--output={file_pattern(job.log)}",
    ]


def directive(option: str) -> str:
    """A line that sbatch reads as this one argument: it splits at spaces and takes double quotes away."""
    assert not re.search(r'[\x00-\x1f\x7f"\\]', option), f"checked before: {option!r}"
    return f'#SBATCH "{option}"' if re.search(r"[^\w=.,:%/@+-]", option, re.ASCII) else f"#SBATCH {option}"


def render(job: Job) -> str:
    """The whole script. Values of users are in directives, quoted, or in launch/*.toml; none is code."""
    names = " ".join(map(shlex.quote, job.cluster.modules))
    modules = [f"module load {names} || exit 1"] if names else []  # which has unset variables, so before set -u
    return "\n".join(
        [
            "#!/bin/bash -l" if modules else "#!/bin/bash",
            *map(directive, options_of(job)),
            *modules,
            "set -eu",
            "unset SLURM_EXPORT_ENV  # else steps would see no more of the environment than this script was given",
            *supervisor_lines(job),
            "",
        ]
    )


def supervisor_lines(job: Job) -> list[str]:
    """From where this command was given, so that relative paths mean the same."""
    return [
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}",
        f"exec {shlex.quote(job.cluster.supervisor_python)} -u -m launchers.supervisor {shlex.quote(str(job.run))}",
    ]


def check_script(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"not a script: {done.stderr}\n{script}"


# ---------------------------------------------------------------- submitting


def submit(job: Job, cluster_file: Path) -> str:
    """Its job id. Raises ValueError in Slurm's own words, with what to do."""
    check_inputs(job)
    prepare_job(job, lambda state: in_queue(state.job_ids))
    script = render(job)
    check_script(script)
    write_text(job.script, script)
    done = slurm("sbatch", "--parsable", str(job.script))
    if done.returncode != 0:
        job.tell("failed", f"not submitted: {done.stderr.strip()}")
        raise ValueError(refusal(done.stderr.strip(), cluster_file))
    job_id = done.stdout.strip().partition(";")[0]
    note_job(job, job_id)
    return job_id


def note_job(job: Job, job_id: str) -> None:
    """It is one of this run's. It may have started already, and told so itself."""
    state = job.state()
    if job_id not in state.job_ids:
        job.tell(state.standing, state.detail, job_ids=(*state.job_ids, job_id))


def refusal(said: str, cluster_file: Path) -> str:
    remedies = [remedy for pattern, remedy in _REMEDIES if re.search(pattern, said)]
    remedy = (remedies or ["[slurm] in {cluster}, and what your site's manual says of it"])[0]
    return f"Slurm refuses the job: {said}; look at {remedy.format(cluster=cluster_file)}"


def wait(run: Path) -> int:
    """Until the run has ended, over all its jobs; its exit status."""
    while (state := read_state(run)).standing not in ENDED:
        time.sleep(_WAIT_INTERVAL_S)
        if state.standing != "submitted" and not in_queue(state.job_ids) and read_state(run) == state:
            print(
                f"launchers.slurm: its job has left the queue without a word; see {run}/launch/job.log", file=sys.stderr
            )
            return 1
    print(f"{state.standing}: {state.detail}")
    return state.exit_status


def in_queue(job_ids: Sequence[str]) -> bool:
    """Also where Slurm does not answer."""
    if not job_ids:
        return False
    listed = slurm("squeue", "-h", "-o", "%i", "-j", job_ids[-1])
    return (listed.returncode != 0 and "Invalid job id" not in listed.stderr) or bool(listed.stdout.strip())


# ---------------------------------------------------------------- asking about it


def status(run: Path) -> int:
    state = read_state(run)
    if state.job_ids:
        listed = slurm("squeue", "-h", "-j", state.job_ids[-1], "-o", "%T  %r  %N  runs for %M of %l")
        looking.show("job", f"{state.job_ids[-1]}  {listed.stdout.strip() or 'not in the queue'}")
    looking.show_state(run, state)
    return 0


def stop(run: Path, *, now: bool) -> int:
    """At a checkpoint; or, where it does not run or `now`, by cancelling the job."""
    state = read_state(run)
    if state.standing in ENDED:
        print(f"nothing to stop: {state.standing}, {state.detail}")
        return 0
    if state.standing == "running" and not now:
        return looking.ask_to_stop(run)
    cancelled = slurm("scancel", *state.job_ids[-1:])
    if cancelled.returncode != 0:
        raise ValueError(cancelled.stderr.strip())
    if state.standing != "running":  # else its supervisor tells the end
        write_state(
            run, replace(state, standing="cancelled", detail="while it was in the queue", updated_at=time.time())
        )
    print(f"job {state.job_ids[-1]} is cancelled; the same command goes on from the last checkpoint")
    return 0


def attach(run: Path, node: str, command: Sequence[str]) -> int:
    """A shell, or a command, beside what runs there."""
    state = read_state(run)
    if not state.job_ids or not in_queue(state.job_ids):
        raise ValueError(f"{run}: no job of it is in the queue")
    where = [f"--nodelist={node}"] if node else []
    terminal = ["--pty"] if sys.stdin.isatty() else []
    options = [f"--jobid={state.job_ids[-1]}", "--overlap", "--nodes=1", "--ntasks=1", *where, *terminal]
    return subprocess.run(["srun", *options, *(command or ["bash", "-l"])], check=False).returncode


# ---------------------------------------------------------------- command line


def _launch(arguments: argparse.Namespace) -> int:
    job = plan_job(arguments.config, arguments.overrides, arguments.cluster)
    if arguments.dry_run:
        looking.show_plan(job, arguments.config)
        script = render(job)
        check_script(script)
        print(f"\n{job.script}:\n{script}", end="")
        return 0
    job_id = submit(job, arguments.cluster)
    print(f"job {job_id}; python -m launchers.slurm status {shlex.quote(os.path.relpath(job.run))} tells how it stands")
    return wait(job.run) if arguments.wait else 0


def _ask(arguments: argparse.Namespace) -> int:
    run = Path(os.path.abspath(arguments.run))
    if arguments.verb == "status":
        return status(run)
    if arguments.verb == "logs":
        return looking.logs(run, arguments.name, follow=arguments.follow)
    if arguments.verb == "stop":
        return stop(run, now=arguments.now)
    return attach(run, arguments.node, arguments.command)


def run_command(name: str, description: str, launch: Callable[[argparse.Namespace], int], words: list[str]) -> int:
    """Of this launcher, or another that submits to Slurm."""
    program = f"launchers.{name}"
    if words[:1] and words[0] in _VERBS:
        parser = looking.verb_parser(f"python -m {program}", _VERBS)
        return looking.told(program, lambda: _ask(parser.parse_args(words)))
    parser = looking.launch_parser(f"python -m {program}", description)
    parser.add_argument("--wait", action="store_true", help="until the run has ended; the exit status is the run's")
    return looking.told(program, lambda: launch(looking.parse(parser, words)))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("slurm", __doc__ or "", _launch, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
