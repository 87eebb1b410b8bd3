"""Two SGLang servers for the session, each started when a test first asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sglang.servers import ServerProcess, reason_to_skip

Servers = Callable[[int], list[str]]


def skip_without_sglang() -> None:
    if (reason := reason_to_skip()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


@pytest.fixture(scope="session")
def servers(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Servers]:
    """`servers(n)`: URLs of the first n of the session's servers, ready. They were started with the demo's model, and
    have the key of servers.py. Tests that harm a server start one of their own."""
    running: list[str] = list(filter(None, str(pytestconfig.getoption("--sglang-urls") or "").split(",")))
    if running:
        yield lambda number: running[:number]
        return
    skip_without_sglang()
    logs = tmp_path_factory.mktemp("sglang")
    started: list[ServerProcess] = []

    def urls(number: int) -> list[str]:
        new = [ServerProcess(tiny_model, logs / f"{i}.log") for i in range(len(started), number)]
        started.extend(new)
        for process in new:
            process.wait_until_ready()
        return [process.url for process in started[:number]]

    try:
        yield urls
    finally:
        for process in started:
            process.kill()
        assert not [pid for process in started for pid in process.processes()]
