"""Two SGLang servers for the session, each started when a test first asks for it; nothing of any is left at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forks import Forks
from tests.sglang.runs import Processes
from tests.sglang.servers import ServerProcess, end_servers, reason_to_skip

Servers = Callable[[int], list[str]]
StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def start_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server(port=...)`: another real server with the demo's model and the key of servers.py, not yet ready.

    At the end of the session all are ended, and it fails where there is a process, a port, shared memory or a
    temporary file of one, wherever it was started and however it ended.
    """
    if (reason := reason_to_skip()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    logs = tmp_path_factory.mktemp("sglang")
    started: list[ServerProcess] = []

    def start(*, port: int | None = None) -> ServerProcess:
        process = ServerProcess(tiny_model, logs / f"{len(started)}.log", port=port)
        started.append(process)
        return process

    try:
        yield start
    finally:
        end_servers(started)
        left = {process.log.name: process.left_behind() for process in started}
        assert not any(left.values()), f"servers left behind: {left}"


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Servers:
    """`servers(n)`: URLs of the first n of the session's servers, ready. They were started with the demo's model, and
    have the key of servers.py. Tests that harm a server start one of their own."""
    running: list[str] = list(filter(None, str(pytestconfig.getoption("--sglang-urls") or "").split(",")))
    if running:
        return lambda number: running[:number]
    start_server: StartServer = request.getfixturevalue("start_server")
    started: list[ServerProcess] = []

    def urls(number: int) -> list[str]:
        new = [start_server() for _ in range(len(started), number)]
        started.extend(new)
        for process in new:
            process.wait_until_ready()
        return [process.url for process in started[:number]]

    return urls


@pytest.fixture
def processes(forks: Forks, tmp_path: Path) -> Iterator[Processes]:
    started = Processes(forks, tmp_path)
    try:
        yield started
    finally:
        started.kill()
