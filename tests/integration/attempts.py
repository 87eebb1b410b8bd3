"""Starting the `reval` command as a process of its own, or several, killed or not; and nothing of it is left.

Every process has a hard deadline, at which it says where it is. It gets a session of its own, so that what it starts
can be found, and ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.forks import Forks
from tests.integration.killed import Kill, Plan

_DEADLINE_S = 150.0
_ORPHAN_DEADLINE_S = 20.0  # a verifier worker that is busy ends a second after the deadline of its answer
_GRACE_S = 5.0  # a stuck process says where it hangs and ends itself
_POLL_S = 0.05


@dataclass(frozen=True)
class Event:
    at_s: float  # seconds since the start of the process
    text: str

    @classmethod
    def of(cls, line: str) -> Event:
        at_s, _, text = line.partition(" ")
        return cls(float(at_s), text)


@dataclass(frozen=True)
class Attempt:
    """One process, or torchrun with several: how it ended, what was said, and what happened in it."""

    status: int
    output: str
    events: tuple[Event, ...]

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def death(self) -> str:
        """Where the kill was, as phases and an event."""
        inside: list[str] = []
        place = "never"
        for event in self.events:
            verb, _, name = event.text.partition(" ")
            if verb == "enter":
                inside.append(name)
            elif verb == "leave":
                inside.remove(name)
            elif verb == "killed":
                place = name
        return f"in {'/'.join(inside) or 'nothing'}: {place}"

    @property
    def resumes(self) -> list[dict[str, Any]]:
        """What the trainer had when it went on from a checkpoint."""
        words = [event.text.partition(" ") for event in self.events]
        return [json.loads(text) for verb, _, text in words if verb == "resumed"]

    def told(self) -> str:
        return f"status {self.status}, {self.death}\n{self.output[-3000:]}"


@dataclass(frozen=True)
class Moment:
    """An event of an undisturbed run at which others can be killed."""

    event: str
    occurrence: int  # which of its kind, from 1
    duration_s: float  # how long what begins with it took: a phase, or the saving that goes on after one

    def kill(self, fraction: float) -> Kill:
        """A fraction of its duration after the event."""
        return Kill(re.escape(self.event), self.occurrence, fraction * self.duration_s)


def moments(events: Sequence[Event]) -> list[Moment]:
    """In order."""
    happened = [event for event in events if not event.text.startswith("resumed ")]
    counts: dict[str, int] = {}
    found: list[Moment] = []
    for place, event in enumerate(happened):
        counts[event.text] = counts.get(event.text, 0) + 1
        found.append(Moment(event.text, counts[event.text], _end_of(happened[place:]) - event.at_s))
    return found


def _end_of(events: Sequence[Event]) -> float:
    """When that ended which began with the first of the events; its own time where nothing did."""
    first, *rest = events
    verb, _, name = first.text.partition(" ")
    if verb == "enter":
        return next(event.at_s for event in rest if event.text == f"leave {name}")
    if first.text == "leave checkpoint":
        for event in rest:
            if event.text == "enter checkpoint":
                break
            if event.text.endswith("-> checkpoints/latest"):  # in the background
                return event.at_s
    return first.at_s


def attempt(
    forks: Forks,
    run: Path,
    arguments: Sequence[str],
    kill: Kill | None = None,
    *,
    num_processes: int = 1,
    deadline_s: float = _DEADLINE_S,
) -> Attempt:
    """`reval ARGUMENTS`, which work in the run directory `run`, in a new process, or in several under torchrun.

    The kill is for every process that comes to its event. Raises AssertionError where a process is left behind or did
    not end by the deadline.
    """
    trace, log = run.with_name("trace"), run.with_name("log")
    trace.write_bytes(b"")  # there also where the process does not get so far as to open it
    plan = Plan(str(run), str(trace), time.monotonic() + deadline_s, kill)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes), "-m")
    program = ("tests.integration.killed", plan.dumps(), *arguments)
    with log.open("wb") as file:  # not a pipe, whose end would wait for what is left behind
        process = forks.start(
            *(*launcher, *program) if num_processes > 1 else program,
            env={"GLOO_SOCKET_IFNAME": "lo"},
            stdout=file,
        )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=deadline_s + _GRACE_S)
            _wait_until_gone(process.pid, run)
    finally:
        left = list(_of_run(process.pid, run))
        for other in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
        status = process.wait()
    assert left == [], f"processes left behind: {left}\n{log.read_text(errors='replace')}"
    events = tuple(Event.of(line) for line in trace.read_text().splitlines())
    return Attempt(status, log.read_text(errors="replace"), events)


def _wait_until_gone(session: int, run: Path) -> None:
    deadline = time.monotonic() + _ORPHAN_DEADLINE_S
    while time.monotonic() < deadline and any(True for _ in _of_run(session, run)):
        time.sleep(_POLL_S)


def _of_run(session: int, run: Path) -> Iterator[psutil.Process]:
    """Processes that the run started, or that have its directory in their command line, or open, or as their own."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, psutil.AccessDenied):
            if process.status() == psutil.STATUS_ZOMBIE:  # it has ended, and its parent has not looked yet
                continue
            files = [file.path for file in process.open_files()]
            mentions = [*process.cmdline(), process.cwd(), *files]
            if os.getsid(process.pid) == session or any(str(run) in text for text in mentions):
                yield process
