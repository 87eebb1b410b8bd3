"""The `reval` command on a disk that fills up at a chosen moment, and again after room was made.

What `tests.small_disk` calls. The run directory is `run` on the small disk; it is copied out after each command.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reval_mcore.cli import main
from reval_mcore.metrics import PhaseClock
from tests.small_disk import fill

PAGE = 4096  # what a tmpfs gives out at once
_DEADLINE_S = 60.0
_WRITER_DEADLINE_S = 20.0
_PIPE_BYTES = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What happens at the start of the command, or on entering the `occurrence`-th phase of a name (from 1).

    The disk is filled but for `leave_kb`. Or, with `limit`, no file grows beyond the size of that file of the run
    directory and a few bytes: a torn write wherever pages end. With `crossing` it happens at the first phase of the
    name where that file has no room in its last page for what was added to it since the one before.
    """

    phase: str
    occurrence: int = 1
    leave_kb: int = 0
    limit: str = ""
    crossing: str = ""


class _Striker:
    def __init__(self, disk: Path, fault: Fault) -> None:
        self._disk = disk
        self._fault = fault
        self._num_entered = 0
        self._size = 0  # of the file that is to cross a page

    def enter(self, phase: str) -> None:
        if phase == "collect":
            _wait_for_writers()
        if phase != self._fault.phase:
            return
        self._num_entered += 1
        if self._is_time():
            self._strike()

    def _is_time(self) -> bool:
        if not self._fault.crossing:
            return self._num_entered == self._fault.occurrence
        before, self._size = self._size, (self._disk / "run" / self._fault.crossing).stat().st_size
        growth = self._size - before
        return self._num_entered >= 2 and self._size % PAGE + 0.9 * growth > PAGE

    def _strike(self) -> None:
        if self._fault.limit:
            size = (self._disk / "run" / self._fault.limit).stat().st_size + 40
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        else:
            fill(self._disk, leave_kb=self._fault.leave_kb)


def _wait_for_writers() -> None:
    """So that a checkpoint in the background is complete an iteration later, however busy the machine is."""
    for child in multiprocessing.active_children():
        if child.name == "checkpoint-writer":
            child.join(_WRITER_DEADLINE_S)


def _strike_in_phases(striker: _Striker) -> None:
    original: Callable[[PhaseClock, str], contextlib.AbstractContextManager[None]] = PhaseClock.phase

    @contextlib.contextmanager
    def phase(self: PhaseClock, name: str) -> Iterator[None]:
        striker.enter(name)
        with original(self, name):
            yield

    PhaseClock.phase = phase


def _fork(disk: Path, arguments: Sequence[str], fault: Fault, told: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(told, 2)
    striker = _Striker(disk, fault)
    striker.enter("start")
    _strike_in_phases(striker)
    sys.exit(main(arguments))


def _with_fault(disk: Path, arguments: Sequence[str], told: Path, fault: Fault) -> int:
    """`reval ARGUMENTS` in a fork of this process, which has imported all of it: that is half the time.

    It prints to a pipe, which no limit on files holds for, and never as much as that takes.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    process = multiprocessing.get_context("fork").Process(target=_fork, args=(disk, arguments, fault, writer))
    process.start()
    process.join(_DEADLINE_S)
    os.write(writer, b"\n")  # something to read
    told.with_suffix(".err").write_bytes(os.read(reader, _PIPE_BYTES)[:-1])
    os.close(reader)
    os.close(writer)
    assert process.exitcode is not None, f"stuck in {fault}"
    return process.exitcode


def _command(arguments: Sequence[str], told: Path) -> int:
    with told.with_suffix(".err").open("w") as err:
        command = [sys.executable, "-m", "reval_mcore.cli", *arguments]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=err, timeout=_DEADLINE_S, check=False)
    return done.returncode


def run(disk: Path, *, arguments: Sequence[str], out: str, faults: Sequence[Mapping[str, Any] | None]) -> list[int]:
    """The same command under each fault in turn, with room made after each; None is the command itself.

    Returns the exit statuses. OUT/0.err and OUT/0 are what the first one told and its run directory after it, and so
    on.
    """
    statuses = []
    for number, fields in enumerate(faults):
        told = Path(out) / str(number)
        if fields is None:
            statuses.append(_command(arguments, told))
        else:
            statuses.append(_with_fault(disk, arguments, told, Fault(**fields)))
        if (disk / "run").exists():
            shutil.copytree(disk / "run", told, symlinks=True)
        (disk / "ballast").unlink(missing_ok=True)
    return statuses


def run_beside_a_full_tensorboard(disk: Path, *, arguments: Sequence[str], out: str) -> list[int]:
    """One command, whose tensorboard/ is on another disk, a full one."""
    curves = disk / "run" / "tensorboard"
    curves.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(curves)], check=True)
    try:
        fill(curves, leave_kb=0)
        return run(disk, arguments=arguments, out=out, faults=[None])
    finally:
        subprocess.run(["umount", str(curves)], check=True)
