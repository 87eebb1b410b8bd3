"""nemo-run as a front end: the same Slurm job, with an experiment record of nemo-run's.

    python -m launchers.nemo CONFIG --cluster FILE [section.key=value ...] [--dry-run | --wait]
    python -m launchers.nemo status|logs|stop|attach RUN

The job is one plain task: our supervisor on the first node, which starts everything else itself. So nothing hangs on
what nemo-run 0.11.1 does with groups of tasks (the first that ends, even well, ends the others), with environment
variables (unquoted) or with the end of a failed job (it returns normally): all states are those of launchers.slurm.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers import looking
from launchers import slurm as plain
from launchers.job import Job, check_inputs, plan_job, prepare_job
from launchers.steps import file_pattern
from reval_mcore.durable import write_text

_PLAIN = re.compile(r"[\w./@+-]+", re.ASCII)  # of paths that nemo-run passes on unharmed


def script_of(job: Job) -> str:
    """What its one task runs, without arguments and variables, which nemo-run would have to quote. Slurm signals every
    task of the job ahead of the time limit; what the supervisor starts ignores it."""
    first, *others = plain.supervisor_lines(job)
    # for its record, and for who looks at the run; the signals that everybody gets are not for tee
    tee = f"exec > >(trap '' USR1 TERM; exec tee -a {shlex.quote(str(job.log))}) 2>&1"
    return "\n".join([first, tee, *others, ""])


def check(job: Job) -> None:
    """Raises ValueError where nemo-run cannot do what the plain launcher can."""
    if not _PLAIN.fullmatch(str(job.run)):
        raise ValueError(
            f"run.directory = {job.run}: nemo-run takes letters, digits and '._/@+-' only; give another, or use "
            "launchers.slurm"
        )
    if not job.cluster.slurm.account:
        raise ValueError("slurm.account: nemo-run always names one; give it in the cluster file")
    if job.cluster.modules:
        raise ValueError("modules: not with nemo-run; load them in the shell that submits, or use launchers.slurm")


def executor_of(job: Job, nemo_run: Any) -> Any:
    """One srun of one task on the first node; options given later win over nemo-run's own --wait and the like."""
    launch, wanted = job.config.launch, job.cluster.slurm
    hours, minutes = divmod(launch.time_limit_minutes, 60)
    gpus = job.cluster.node.gpus
    return nemo_run.SlurmExecutor(
        account=wanted.account,
        partition=wanted.partition or None,
        qos=wanted.qos or None,
        constraint=wanted.constraint or None,
        exclude=wanted.exclude or None,
        nodes=job.num_nodes,
        ntasks_per_node=1,
        exclusive=True,
        gpus_per_node=gpus if wanted.gpu_option == "--gpus-per-node" else None,
        gres=f"gpu:{gpus}" if wanted.gpu_option == "--gres" else None,
        time=f"{hours:02d}:{minutes:02d}:00",
        signal=f"USR1@{launch.stop_before_s}",
        retries=0,
        srun_args=["--nodes=1", "--ntasks=1", "--relative=0", "--overlap", "--no-kill", "--wait=0"],
        additional_parameters={
            "job_name": plain.job_name(job.run),
            "output": file_pattern(job.folder / "nemo.log"),
            "no_kill": True,
            "requeue": True,
            "dependency": "singleton",
            **({"reservation": wanted.reservation} if wanted.reservation else {}),
        },
        tunnel=nemo_run.LocalTunnel(job_dir=""),
        packager=nemo_run.Packager(),
    )


def submit(job: Job, cluster_file: Path) -> str:
    """Its job id. Raises ValueError in Slurm's own words, with what to do."""
    try:
        nemo_run = importlib.import_module("nemo_run")  # two seconds of imports, and an extra: only here
    except ModuleNotFoundError as error:
        raise ValueError(
            f'nemo-run does not import ({error}); pip install "reval_mcore[launch]", which pins the leptonai it needs'
        ) from None
    check_inputs(job)
    prepare_job(job, lambda state: plain.in_queue(state.job_ids))
    write_text(job.folder / "task.sh", script_of(job))
    write_text(job.script, plain.render(job))  # for the case that Slurm refuses to requeue
    try:
        with nemo_run.Experiment(
            plain.job_name(job.run), executor=executor_of(job, nemo_run), log_level="WARN"
        ) as record:
            record.add(nemo_run.Script(str(job.folder / "task.sh")), name="reval", tail_logs=False)
            record.run(detach=True, sequential=False)
            (submitted,) = record.jobs
    except Exception as error:  # of any library below it; a run that was not submitted must not seem to be
        job.tell("failed", f"not submitted: {error}")
        raise ValueError(plain.refusal(str(error).strip(), cluster_file)) from error
    job_id = str(submitted.handle).rpartition("/")[2]
    if not job_id.isdecimal():
        job.tell("failed", "not submitted")
        raise ValueError(plain.refusal(f"nemo-run submitted nothing ({submitted.handle})", cluster_file))
    plain.note_job(job, job_id)
    return job_id


def _launch(arguments: argparse.Namespace) -> int:
    job = plan_job(arguments.config, arguments.overrides, arguments.cluster)
    check(job)
    if arguments.dry_run:
        looking.show_plan(job, arguments.config)
        print(f"\n{job.folder}/task.sh:\n{script_of(job)}", end="")
        return 0
    job_id = submit(job, arguments.cluster)
    print(f"job {job_id}; python -m launchers.nemo status {shlex.quote(os.path.relpath(job.run))} tells how it stands")
    return plain.wait(job.run) if arguments.wait else 0


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return plain.run_command("nemo", __doc__ or "", _launch, words)


if __name__ == "__main__":
    sys.exit(main())
