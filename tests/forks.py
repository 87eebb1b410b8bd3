"""Python programs as forks of one process that has imported everything: a process each, in a moment each.

A new process spends five seconds of a core on importing torch, megatron-core and transformers, and the tests start
hundreds. A fork is what `python -m MODULE ARGUMENT...` would be, up to the interpreter's own end, but for its one
thread and the want of a GPU: both are settled while torch is imported.

As a program this is the process whose forks they are: `python -m tests.forks SOCKET MODULE...`. It takes requests from
the socket with this number, and ends, and its forks with it, when that is closed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

ROOT = Path(__file__).parents[1]
_IMPORTS = ("reval_mcore.assembly", "reval_mcore.report")
# a process with more threads must not fork, and one thread adds up in the same order on every machine
_SETTLED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_MAX_REQUEST_BYTES = 1 << 17


class Fork:
    """The part of subprocess.Popen that tests use. The process leads a session of its own."""

    def __init__(self, status: int) -> None:
        """`status` is a pipe: the process id at the start and the exit status at the end come from it, a line each."""
        self._status = open(status, "rb", buffering=0)  # noqa: SIM115 (closed with the last line)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            line = self._status.readline()
            assert line, "the process whose fork it was has died"
            self.returncode = int(line)
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """All that is left of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


class Forks:
    """A context manager. No fork outlives it."""

    def __init__(self, *, command_prefix: Sequence[str] = ()) -> None:
        self._command_prefix = command_prefix

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*self._command_prefix, sys.executable, "-m", __name__, str(theirs.fileno()), *_IMPORTS],
                cwd=ROOT,
                env=os.environ | _SETTLED | {"PYTHONPATH": str(ROOT)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for pytest
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()

    def start(
        self,
        module: str,
        *arguments: str,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
    ) -> Fork:
        """`env` is added to the environment. Output goes nowhere, and errors where the output goes, if nothing is said.
        Standard input is empty.
        """
        environment = {**os.environ, **_SETTLED, **(env or {})}
        request = json.dumps({"module": module, "arguments": arguments, "cwd": str(cwd), "environment": environment})
        assert len(request) < _MAX_REQUEST_BYTES
        reader, writer = os.pipe()
        with open(writer, "wb"), open(os.devnull, "r+b") as nowhere:
            out = stdout or nowhere
            files = [file.fileno() for file in (nowhere, out, stderr or out)]
            socket.send_fds(self._socket, [request.encode()], [*files, writer])
        return Fork(reader)

    def run(
        self,
        module: str,
        *arguments: str,
        timeout_s: float,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """To its end, or until it is killed with subprocess.TimeoutExpired."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(module, *arguments, cwd=cwd, env=env, stdout=out, stderr=err)
            try:
                status = process.wait(timeout_s)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([module, *arguments], status, out.read(), err.read())


# ---------------------------------------------------------------- the process whose forks they are


@dataclass(frozen=True)
class _Program:
    module: str
    arguments: Sequence[str]
    cwd: str
    environment: Mapping[str, str]

    def run(self, standard: Sequence[int], status: int) -> None:
        """Become it. `standard` are the files for its input, output and error."""
        os.setsid()
        os.write(status, f"{os.getpid()}\n".encode())
        os.close(status)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        for number, file in enumerate(standard):
            os.dup2(file, number)
            os.close(file)
        sys.path[0] = self.cwd
        sys.argv = [self.module, *self.arguments]
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


class _Parent:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._selector = selectors.DefaultSelector()
        self._selector.register(requests, selectors.EVENT_READ)
        self._running: dict[int, tuple[int, int]] = {}  # by pidfd: process id, pipe for the exit status

    def serve(self) -> Callable[[], None] | None:
        """Returns in each fork, with what it is to do, and in the parent when there are no more requests."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._requests:
                    self._tell_end(key.fd)
                    continue
                message, files, _, _ = socket.recv_fds(self._requests, _MAX_REQUEST_BYTES, 4)
                if not message:
                    self._kill_all()
                    return None
                *standard, status = files
                pid = os.fork()
                if pid == 0:
                    self._close()
                    return functools.partial(_Program(**json.loads(message)).run, standard, status)
                for file in standard:
                    os.close(file)
                pidfd = os.pidfd_open(pid)
                self._running[pidfd] = (pid, status)
                self._selector.register(pidfd, selectors.EVENT_READ)

    def _tell_end(self, pidfd: int) -> None:
        pid, status = self._running.pop(pidfd)
        _, ended = os.waitpid(pid, 0)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
        os.close(status)

    def _kill_all(self) -> None:
        for pid, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _close(self) -> None:
        """What a fork must not hold open."""
        self._requests.close()
        self._selector.close()
        for pidfd, (_, status) in self._running.items():
            os.close(pidfd)
            os.close(status)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each fork goes through all that was imported again, and so copies it: a second of its end
    become = _Parent(socket.socket(fileno=int(sys.argv[1]))).serve()
    if become is not None:
        become()
