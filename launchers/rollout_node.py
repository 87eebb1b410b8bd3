"""What runs on a rollout node: its SGLang servers, and in asynchronous mode the collector that works on them.

They live and die together: whatever of them ends, the others are ended and the supervisor starts the node anew. A
server is announced in the run's control/servers/ once it answers, on whatever port was free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from launchers.job import Job, open_job
from launchers.steps import free_port
from reval_mcore.control import announce_server, die_with_parent, withdraw_server

_POLL_S = 0.5
_END_PATIENCE_S = 20.0


class RolloutNode:
    def __init__(self, job: Job, node: str, address: str) -> None:
        self._job = job
        self._node = node
        self._address = address
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # by what they are
        self._announced: list[str] = []
        self._is_asked_to_end = False

    def run(self) -> int:
        """Until asked to end, or the run has finished: 0. Where something of it ends by itself: 1."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._note_end())
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the supervisor's
        try:
            return self._serve()
        finally:
            self._end()

    def _note_end(self) -> None:
        self._is_asked_to_end = True

    def _serve(self) -> int:
        number = self._job.cluster.num_servers(self._job.config.launch.server_tensor_parallel_size)
        urls = {f"{self._node}.{index}": self._start_server(index) for index in range(number)}
        deadline = time.monotonic() + self._job.cluster.server.start_timeout_s
        for name, url in urls.items():
            if not self._wait_for(lambda url=url: answers(url), deadline):
                return self._why(f"server {name} did not answer in time")
            announce_server(self._job.directory.control, name, url)
            self._announced.append(name)
            print(f"server {name} answers at {url}", flush=True)
        if self._job.config.rollout.mode == "asynchronous":
            self._start("collector", self._job.collector_command(self._node))
        self._wait_for(lambda: False, float("inf"))
        return self._why("asked to end")

    def _start_server(self, index: int) -> str:
        port = free_port(self._job.cluster.node.first_port)
        self._start(f"server {self._node}.{index}", self._job.server_command(index, port))
        return f"http://{self._address}:{port}"

    def _start(self, what: str, command: list[str]) -> None:
        server = self._job.cluster.server_environment if what != "collector" else {}
        self._children[what] = subprocess.Popen(
            command,
            env={**os.environ, **server},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _wait_for(self, is_so: Callable[[], bool], deadline: float) -> bool:
        """False where it is in vain: the end has come, or one of the children's."""
        while time.monotonic() < deadline and not self._is_asked_to_end and not self._ended():
            if is_so():
                return True
            time.sleep(_POLL_S)
        return False

    def _ended(self) -> dict[str, int]:
        """Status of the children that have ended by themselves."""
        return {what: child.returncode for what, child in self._children.items() if child.poll() is not None}

    def _why(self, otherwise: str) -> int:
        """Say why this is the end; its status."""
        ended = self._ended()
        if self._is_asked_to_end:
            print("asked to end", flush=True)
            return 0
        if ended == {"collector": 0} and has_finished(self._job.directory.exit_record):
            print("the run has finished", flush=True)
            return 0
        reasons = [f"{what} ended with status {status}" for what, status in ended.items()] or [otherwise]
        print("; ".join(reasons), flush=True)
        return 1

    def _end(self) -> None:
        """The collector first: it has what it made admitted while its servers still live."""
        for name in self._announced:
            withdraw_server(self._job.directory.control, name)
        collector = self._children.pop("collector", None)
        patience_s = self._job.config.rollout.collector_timeout_s + _END_PATIENCE_S
        for group, seconds in (
            ([collector] if collector else [], patience_s),
            (self._children.values(), _END_PATIENCE_S),
        ):
            for child in group:
                if child.poll() is None:
                    child.terminate()
            deadline = time.monotonic() + seconds
            for child in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # and what it left behind


def answers(url: str) -> bool:
    """Whether a server there has loaded its model. Its /health needs no key."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def has_finished(exit_record: Path) -> bool:
    try:
        return json.loads(exit_record.read_text())["reason"] == "finished"
    except FileNotFoundError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launchers.rollout_node", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--node", required=True)
    parser.add_argument("--address", required=True)
    arguments = parser.parse_args()
    return RolloutNode(open_job(arguments.run), arguments.node, arguments.address).run()


if __name__ == "__main__":
    sys.exit(main())
