"""The same on one machine without Slurm: a trainer, and rollout nodes with servers and collectors beside it.

    python -m launchers.local CONFIG --cluster FILE [section.key=value ...] [--dry-run]
    python -m launchers.local status|logs|stop RUN

The "nodes" share this machine: with node.gpus = 4 in FILE the first has GPUs 0 to 3, the second 4 to 7. It stays in the
foreground until the run has ended, through failures too, and has its exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers import looking
from launchers.job import ENDED, Job, check_inputs, plan_job, prepare_job, read_state
from launchers.supervisor import supervise_here

_VERBS = ("status", "logs", "stop")


def _launch(arguments: argparse.Namespace) -> int:
    job = plan_job(arguments.config, arguments.overrides, arguments.cluster)
    if arguments.dry_run:
        looking.show_plan(job, arguments.config)
        return 0
    check_inputs(job)
    with only_here(job):
        prepare_job(job, lambda state: False)
        supervise_here(job)
    return job.state().exit_status


@contextlib.contextmanager
def only_here(job: Job) -> Iterator[None]:
    """Raises ValueError where another launcher of this machine sees to the run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run.directory = {job.run}: another launcher is at work on it; stop that one first "
                f"(python -m launchers.local stop {job.run}), or give another directory"
            ) from None
        yield


def _ask(arguments: argparse.Namespace) -> int:
    run = Path(os.path.abspath(arguments.run))
    state = read_state(run)
    if arguments.verb == "status":
        looking.show_state(run, state)
        return 0
    if arguments.verb == "logs":
        return looking.logs(run, arguments.name, follow=arguments.follow)
    if state.standing in ENDED:
        print(f"nothing to stop: {state.standing}, {state.detail}")
        return 0
    if arguments.now:
        raise ValueError("--now: press Ctrl-C twice where it runs")
    return looking.ask_to_stop(run)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in _VERBS:
        parser = looking.verb_parser("python -m launchers.local", _VERBS)
        return looking.told("launchers.local", lambda: _ask(parser.parse_args(words)))
    parser = looking.launch_parser("python -m launchers.local", __doc__ or "")
    return looking.told("launchers.local", lambda: _launch(looking.parse(parser, words)))


if __name__ == "__main__":
    sys.exit(main())
