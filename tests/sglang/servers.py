"""Real SGLang servers for tests, as tools/sglang_cpu/serve.sh starts them, and all that they make."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from reval_mcore.control import die_with_parent

ROOT = Path(__file__).parents[2]
API_KEY = "a-key-for-tests"
_SHARED_MEMORY = Path("/dev/shm")
_POLL_S = 0.05


def reason_to_skip() -> str | None:
    """Why there can be no server here, and what to do about it."""
    if (ROOT / ".sglang_cpu" / "bin" / "python").exists():
        return None
    return "no SGLang for CPU; make it (2.6 GB): bash tools/sglang_cpu/install.sh"


def free_port() -> int:
    """Below those that the system gives to whoever asks for any: a server binds its own only after a minute."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ServerProcess:
    """One server with all its processes, in a session of their own, and with a directory for its temporary files."""

    def __init__(self, model: Path, log: Path, *, port: int | None = None, flags: tuple[str, ...] = ()) -> None:
        self.port = port if port is not None else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._temporary = Path(tempfile.mkdtemp(prefix="sglang-"))  # short: names of sockets in it have 107 bytes
        self._shared_memory: set[Path] = set()  # all that was ever seen
        command = ["nice", "bash", "tools/sglang_cpu/serve.sh", str(model), "--port", str(self.port)]
        command += ["--api-key", API_KEY, *flags]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self._temporary)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # a test process that is killed takes its servers with it
            )

    @property
    def pid(self) -> int:
        """Of the main process, of the group and of the session."""
        return self._process.pid

    def wait_until_ready(self, timeout_s: float = 400.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process.poll() is None:
            self._note_shared_memory()
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=30) as reply:
                    if reply.status == 200:
                        self._note_shared_memory()
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-3000:]
        self.kill()
        raise RuntimeError(f"SGLang did not start:\n{tail}")

    # ------------------------------------------------------------ its end

    def signal(self, number: int) -> None:
        """To all its processes."""
        self._note_shared_memory()
        os.killpg(self.pid, number)

    def ask_to_end(self) -> None:
        """By SIGTERM: it finishes what it has and ends its processes itself."""
        self._note_shared_memory()
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """At once; returns when none of its processes is left, and nothing that it made."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        for pid in self.processes():  # of another group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 30.0
        while self.processes() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for path in self._shared_memory:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def processes(self) -> list[int]:
        """Those of its session that live."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
            except OSError:  # ended meanwhile
                continue
            if int(session) == self.pid and state != "Z":
                found.append(int(entry.name))
        return found

    def _note_shared_memory(self) -> None:
        """SGLang removes none of it, whichever way it ends, and no name tells whose it is: what is mapped does."""
        for pid in self.processes():
            with contextlib.suppress(OSError):  # ended meanwhile
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    path = Path(line.rpartition(" ")[2])
                    if path.parent == _SHARED_MEMORY:
                        self._shared_memory.add(path)

    def left_behind(self) -> list[str]:
        """What there is of it, in words."""
        found = [f"process {pid}" for pid in self.processes()]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                found.append(f"port {self.port}")
        return found + [str(path) for path in (*sorted(self._shared_memory), self._temporary) if path.exists()]


def end_servers(servers: Sequence[ServerProcess], timeout_s: float = 60.0) -> None:
    """All of them at once by SIGTERM; by SIGKILL what is there after `timeout_s`."""
    for server in servers:
        server.ask_to_end()
    deadline = time.monotonic() + timeout_s
    while any(server.processes() for server in servers) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for server in servers:
        server.kill()
