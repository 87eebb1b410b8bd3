"""Real SGLang servers for tests, as tools/sglang_cpu/serve.sh starts them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
API_KEY = "a-key-for-tests"
_PR_SET_PDEATHSIG = 1


def reason_to_skip() -> str | None:
    """Why there can be no server here, and what to do about it."""
    if (ROOT / ".sglang_cpu" / "bin" / "python").exists():
        return None
    return "no SGLang for CPU; make it (2.6 GB): bash tools/sglang_cpu/install.sh"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """In the child: a test process that is killed takes its servers with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ServerProcess:
    """One server with all its processes, in a process group of its own."""

    def __init__(self, model: Path, log: Path, *, port: int | None = None, flags: tuple[str, ...] = ()) -> None:
        self.port = port if port is not None else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = ["nice", "bash", "tools/sglang_cpu/serve.sh", str(model), "--port", str(self.port)]
        command += ["--api-key", API_KEY, *flags]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        """Of the main process, and of the group."""
        return self._process.pid

    def wait_until_ready(self, timeout_s: float = 400.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=30) as reply:
                    if reply.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-3000:]
        self.kill()
        raise RuntimeError(f"SGLang did not start:\n{tail}")

    def signal(self, number: int) -> None:
        """To all its processes."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """At once; returns when none of its processes is left."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 30.0
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Those of its group that live."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, group = (entry / "stat").read_text().rpartition(") ")[2].split()[:3]
            except OSError:  # ended meanwhile
                continue
            if int(group) == self.pid and state != "Z":
                found.append(int(entry.name))
        return found
