"""The recorded replies, which the double gives, are those of the real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sglang import recordings
from tests.sglang.conftest import Servers
from tests.sglang.recordings import REQUESTS, ask, load, save, shape
from tests.sglang.servers import API_KEY


def test_the_real_server_answers_as_it_was_recorded(
    servers: Servers, tiny_model: Path, pytestconfig: pytest.Config
) -> None:
    """The same statuses and fields; `--update-recordings` writes them anew, to be read."""
    (url,) = servers(1)
    found = {name: ask(each, url, API_KEY, tiny_model) for name, each in REQUESTS.items()}
    if pytestconfig.getoption("--update-recordings"):
        save(found)
    known = load()
    assert list(found) == list(known)
    for name, exchange in found.items():
        assert (exchange.status, shape(exchange.reply)) == (known[name].status, shape(known[name].reply)), name
        assert (exchange.method, exchange.route, exchange.body) == (
            *(known[name].method, known[name].route),
            known[name].body,
        ), f"{name}: recorded of another request; --update-recordings"


def test_recordings_tell_of_no_machine() -> None:
    text = recordings.PATH.read_text()
    assert not any(word in text for word in ("/tmp", "/root", "/home"))
