"""What the launchers' commands have in common: their arguments, and what is told of a run from its directory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launchers.job import Job, State, read_state
from reval_mcore.config import in_words
from reval_mcore.durable import write_text
from reval_mcore.plan import make_plan
from reval_mcore.plan.text import render
from reval_mcore.run_directory import RunDirectory

_NUM_LINES = 20


def launch_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="for example run.seed=1")
    parser.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="see slurm/clusters")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what would be run; do nothing")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Overrides may stand before and after options."""
    arguments, unknown = parser.parse_known_args(words)
    if any(word.startswith("-") for word in unknown):
        parser.error(f"unrecognized arguments: {' '.join(word for word in unknown if word.startswith('-'))}")
    arguments.overrides = [*arguments.overrides, *unknown]
    return arguments


def verb_parser(prog: str, verbs: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog)
    commands = parser.add_subparsers(dest="verb", required=True)
    helps = {
        "status": "how a run stands",
        "logs": "the last lines of its logs",
        "stop": "at the next checkpoint; the same command goes on from there",
        "attach": "a shell on one of its nodes, beside what runs there",
    }
    for verb in verbs:
        command = commands.add_parser(verb, help=helps[verb])
        command.add_argument("run", type=Path, metavar="RUN", help="a run directory")
        if verb == "logs":
            command.add_argument(
                "name", nargs="?", default="", help="of one file of logs/latest, or what it begins with"
            )
            command.add_argument("-f", "--follow", action="store_true", help="go on with what is added, until Ctrl-C")
        elif verb == "stop":
            command.add_argument("--now", action="store_true", help="without waiting for a checkpoint")
        elif verb == "attach":
            command.add_argument("--node", default="", help="default: the first")
            command.add_argument("command", nargs="*", help="default: a login shell")
    return parser


def told(program: str, work: Callable[[], int]) -> int:
    """Its status; 2 where the user can mend what is wrong, told in one message."""
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"{program}: {in_words(error)}", file=sys.stderr)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
    return 2


def show(name: str, text: str) -> None:
    print(f"{name:10s} {text}")


def show_plan(job: Job, config_file: Path) -> None:
    launch = job.config.launch
    print(render(make_plan(job.config, config_file, world_size=job.num_trainer_processes, gpu_memory_gib=80.0)))
    each = job.cluster.num_servers(launch.server_tensor_parallel_size)
    print(
        f"nodes: {launch.num_trainer_nodes} for training, {job.cluster.processes_per_node} processes each"
        + (f"; {launch.num_rollout_nodes} for rollouts, {each} servers each" if launch.num_rollout_nodes else "")
    )


def show_state(run: Path, state: State) -> None:
    directory = RunDirectory(run)
    show("run", f"{state.standing}{f': {state.detail}' if state.detail else ''}")
    if state.attempt:
        show("attempt", f"{state.attempt}, {state.num_failures} failures so far")
    beat = _json(directory.control / "trainer.json")
    if beat and state.standing == "running":
        show("trainer", f"iteration {beat['iteration'] + 1}, {beat['phase']}, {time.time() - beat['at']:.0f} s ago")
    for path in sorted((directory.control / "collectors").glob("*.json")):
        show("collector", f"{path.stem}, {time.time() - path.stat().st_mtime:.0f} s ago")
    latest = directory.latest_checkpoint()
    show("checkpoint", latest.name if latest is not None else "none yet")
    if directory.metrics.exists() and (lines := directory.metrics.read_text().splitlines()):
        last = json.loads(lines[-1])
        shown = ("collect/accuracy", "update/loss", "evaluation/accuracy")
        values = ", ".join(f"{name} {last[name]:.4g}" for name in shown if name in last)
        show("metrics", f"{last['iteration'] + 1} iterations are done; {values}")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def logs(run: Path, name: str, *, follow: bool) -> int:
    """The job's own and those of its last attempt. Raises ValueError where there is none of that name."""
    read_state(run)
    latest = RunDirectory(run).attempts / "latest"
    found = [path for path in (run / "launch" / "job.log", *sorted(latest.glob("*"))) if path.is_file()]
    wanted = [path for path in found if path.name.startswith(name)]
    if not wanted:
        there = ", ".join(path.name for path in found) or "none yet"
        raise ValueError(f"{run}: no log {name!r}; there are: {there}")
    return subprocess.run(["tail", "-n", str(_NUM_LINES), *(["-F"] if follow else []), *wanted], check=False).returncode


def ask_to_stop(run: Path) -> int:
    write_text(RunDirectory(run).stop_request, "stopped by its user")
    print("asked to stop at the end of its iteration; the same command goes on from there")
    return 0
