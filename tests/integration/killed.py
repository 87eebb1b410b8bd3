"""The `reval` command, written down event by event, and killed at one of them.

An event is the beginning or the end of a phase ("enter update", "leave update"), a tensor on its way to the engine, or
an operation on a file of the run, told before it is done ("rename checkpoints/.latest -> checkpoints/latest"). Reading
is none. The kill is a SIGKILL from within: nothing is closed, flushed or cleaned up. What was handed to the
kernel stays, as it does when a batch system or the out-of-memory killer ends a process; a power cut, which loses that
too, is not what is shown here.

As a program: `python -m tests.integration.killed PLAN ARGUMENT...`, where PLAN is JSON and the arguments are reval's.
Under torchrun each process does it for itself, and all write to one trace.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from reval_mcore.cli import main
from reval_mcore.metrics import PhaseClock

START = "process"  # the phase from the start of the program to its end
_UNTOLD = ("tensorboard/", ".lock")  # names of the first hold the time; the second is opened once, and never read


@dataclass(frozen=True)
class Kill:
    """Kill at the `occurrence`-th event (from 1) that `event`, a regular expression, matches whole, or later."""

    event: str
    occurrence: int = 1
    delay_s: float = 0.0
    number: int = signal.SIGKILL  # another signal is sent, and the process goes on


@dataclass(frozen=True)
class Plan:
    root: str  # the run directory
    trace: str  # file to write events to
    ends_at_s: float  # of time.monotonic(): a process that is stuck says where, and ends itself
    kill: Kill | None

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Plan:
        fields = json.loads(text)
        kill = fields.pop("kill")
        return cls(**fields, kill=Kill(**kill) if kill is not None else None)


class Script:
    """What happens to this process: its events go to the trace, and at one of them it is killed.

    A forked child writes to the same trace and counts on from where its parent was. Whoever comes to the event, it is
    the first process that is killed; the child stays where it is, until whatever should end it does.
    """

    def __init__(self, plan: Plan) -> None:
        self._kill = plan.kill
        self._pid = os.getpid()
        self._num_matching = 0
        self._start = time.monotonic()
        self._trace = os.open(plan.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self, text: str) -> None:
        """With the seconds since the start. Unbuffered: nothing is lost in a kill."""
        os.write(self._trace, f"{time.monotonic() - self._start:.6f} {text}\n".encode())

    def event(self, text: str) -> None:
        kill = self._kill
        if kill is not None and re.fullmatch(kill.event, text):
            self._num_matching += 1
            if self._num_matching == kill.occurrence:
                self._kill_after(kill.delay_s, text)
        self.tell(text)

    def end(self) -> None:
        """A process that came to its end before the kill is killed there."""
        if self._kill is not None and self._kill.number == signal.SIGKILL:
            self._die("at the end")

    def _kill_after(self, delay_s: float, text: str) -> None:
        if delay_s == 0.0:
            self._die(f"before {text}")
        timer = threading.Timer(delay_s, self._die, (f"{delay_s:.6f} s after {text}",))
        timer.daemon = True
        timer.start()

    def _die(self, place: str) -> None:
        assert self._kill is not None
        self.tell(f"killed {place}")
        os.kill(self._pid, self._kill.number)
        while self._kill.number == signal.SIGKILL:  # in a child
            time.sleep(1.0)


def _watch_phases(script: Script) -> None:
    original: Callable[[PhaseClock, str], contextlib.AbstractContextManager[None]] = PhaseClock.phase

    @contextlib.contextmanager
    def phase(self: PhaseClock, name: str) -> Iterator[None]:
        script.event(f"enter {name}")
        with original(self, name):
            yield
        script.event(f"leave {name}")

    PhaseClock.phase = phase


def _watch_files(script: Script, root: str) -> None:
    """Python's own operations. What C++ does (torch.save, pyarrow) is not seen; the package fsyncs or renames after."""

    def name(path: Any, directory: int = -1) -> str | None:
        """Relative to the run directory; None of a file elsewhere."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if directory != -1:
            text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
        text = os.path.abspath(text)
        inside = text.removeprefix(f"{root}/")
        return None if inside == text or inside.startswith(_UNTOLD) else inside

    def operation(event: str, arguments: tuple[Any, ...]) -> str | None:
        match event, arguments:
            case "open", (path, _, flags) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return _told("write", name(path))
            case "os.rename", (source, target, source_directory, target_directory):
                before, after = name(source, source_directory), name(target, target_directory)
                return None if before is None else f"rename {before} -> {after}"
            case (("os.remove" | "os.rmdir"), (path, directory)):
                return _told("remove", name(path, directory))
            case "os.mkdir", (path, _, directory):
                return _told("mkdir", name(path, directory))
            case "os.symlink", (target, path, directory):
                return _told("link", name(path, directory))
        return None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith("os."):
            told = operation(event, arguments)
            if told is not None:
                script.event(told)

    sys.addaudithook(hook)
    original = os.fsync

    def fsync(file: int) -> None:
        told = _told("fsync", name(os.readlink(f"/proc/self/fd/{file}")))
        if told is not None:
            script.event(told)
        original(file)

    os.fsync = fsync


def _told(verb: str, path: str | None) -> str | None:
    return None if path is None else f"{verb} {path}"


def _watch_trainer(script: Script) -> None:
    """Every tensor on its way to the engine; and what a resumed trainer has, for the test to hold against the run's."""
    import torch

    from reval_mcore.mcore.learner import Learner
    from reval_mcore.run_directory import Found
    from reval_mcore.trainer import Trainer

    export_weights, original = Learner.export_weights, Trainer.resume

    def exported(self: Learner, *, wanted: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in export_weights(self, wanted=wanted):
            script.event(f"tensor {name}")
            yield name, tensor

    def resume(self: Trainer, found: Found) -> None:
        original(self, found)
        progress, learner = self.progress, self.learner
        fields = {
            "iteration": progress.iteration,
            "num_updates": progress.num_updates,
            "adam_steps": sorted(learner._optimizer.adam_steps()),
            "reference_version": learner.reference_version,
        }
        script.tell(f"resumed {json.dumps(fields)}")

    Learner.export_weights = exported
    Trainer.resume = resume


def _main(plan: Plan, arguments: list[str]) -> int:
    faulthandler.dump_traceback_later(max(plan.ends_at_s - time.monotonic(), 0.1), exit=True)
    sys.setswitchinterval(1e-4)  # a timer gets its turn soon, also where the main thread runs Python all the while
    script = Script(plan)
    _watch_files(script, plan.root)
    _watch_phases(script)
    script.event(f"enter {START}")
    _watch_trainer(script)  # the imports of the trainer: a second
    status = main(arguments)
    script.event(f"leave {START}")
    script.end()
    return status


if __name__ == "__main__":
    sys.exit(_main(Plan.loads(sys.argv[1]), sys.argv[2:]))
