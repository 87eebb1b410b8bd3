"""Disks that are really full: functions run where a small tmpfs lies at a directory of the caller's choice.

The tmpfs is mounted in a user and mount namespace of its own, so nobody else sees it, no rights are needed, and it is
gone with the process. As a program this is that process: `python -m tests.small_disk MOUNT_POINT [MODULE ...]`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parents[1]
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
_START_LIMIT_S = 60.0


@functools.cache
def reason_to_skip() -> str | None:
    """Why there are no small disks here, and what to do about it; None where there are."""
    remedy = (
        "allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a "
        "container, CAP_SYS_ADMIN)"
    )
    try:
        probe = subprocess.run(
            [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except OSError as error:
        return f"no unshare(1) ({error}); install util-linux"
    return None if probe.returncode == 0 else f"cannot mount a tmpfs ({probe.stderr.strip()}); {remedy}"


class SmallDisk:
    """A context manager. The process behind it is ended with all that it started, whatever happens."""

    def __init__(self, mount_point: Path, *, preload: Sequence[str] = ()) -> None:
        """`mount_point` is an empty directory. Each call is a fork of a process that has imported `preload`."""
        self.mount_point = mount_point
        self._preload = preload
        self._log = mount_point.with_name(f"{mount_point.name}.log")

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_UNSHARE, sys.executable, "-m", __name__, str(self.mount_point), *self._preload],
                cwd=_ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._wait(_START_LIMIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(self, function: Callable[..., Any], *, size_kb: int, timeout_s: float, **arguments: Any) -> Any:
        """`function(mount_point, **arguments)` with a new disk there. Arguments and result travel as JSON.

        `function` is of a module's top level, and found again by name.
        """
        assert self._process.poll() is None, "ended by an earlier call"
        function_path = f"{function.__module__}:{function.__name__}"
        result = self.mount_point.with_name(f"{self.mount_point.name}.result")
        result.unlink(missing_ok=True)
        request = {"function": function_path, "size_kb": size_kb, "arguments": arguments, "result": str(result)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self._wait(timeout_s)
        answer = json.loads(result.read_text()) if result.exists() else {"traceback": "the process died"}
        if "traceback" in answer:
            raise AssertionError(f"{function_path}:\n{answer['traceback']}\n{self._log.read_text()}")
        return answer["value"]

    def _wait(self, timeout_s: float) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready or self._process.stdout.readline() != b"done\n":
            self._end()
            raise AssertionError(f"no answer in {timeout_s} s, or it ended:\n{self._log.read_text()}")


def fill(mount_point: Path, *, leave_kb: int) -> Path:
    """Fill the disk but for `leave_kb`; returns the ballast, whose removal makes room."""
    ballast = mount_point / "ballast"
    state = os.statvfs(mount_point)
    size = state.f_bavail * state.f_frsize - leave_kb * 1024
    with ballast.open("ab") as file:
        start = os.fstat(file.fileno()).st_size
        if size > 0:
            os.posix_fallocate(file.fileno(), start, size)
    return ballast


# ---------------------------------------------------------------- the process in the namespace


def _answer(request: Mapping[str, Any], mount_point: Path) -> None:
    try:
        module, name = request["function"].split(":")
        function = vars(importlib.import_module(module))[name]
        answer = {"value": function(mount_point, **request["arguments"])}
    except Exception:
        answer = {"traceback": traceback.format_exc()}
    Path(request["result"]).write_text(json.dumps(answer))


def _serve(mount_point: Path, modules: Sequence[str]) -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    for module in modules:
        importlib.import_module(module)
    context = multiprocessing.get_context("fork")
    print("done", file=said, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        options = f"size={request['size_kb']}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount_point)], check=True)
        process = context.Process(target=_answer, args=(request, mount_point))
        process.start()
        process.join()
        subprocess.run(["umount", str(mount_point)], check=True)  # fails where a process was left behind on the disk
        print("done", file=said, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2:])
