"""Servers that announce themselves: the last word of each name holds, damage hides nobody else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from reval_mcore.control import announce_server, read_servers, withdraw_server
from reval_mcore.engines import own_servers


def test_what_was_announced_is_read_by_name(tmp_path: Path) -> None:
    control = tmp_path / "run" / "control"  # before there is a run
    assert read_servers(control) == {}
    for name, url in (("n3.1", "http://n3:2"), ("n3", "http://n3:1"), ("n10", "https://n10:1/"), ("n3", "http://n3:9")):
        announce_server(control, name, url)
    assert list(read_servers(control).items()) == [
        ("n10", "https://n10:1"),
        ("n3", "http://n3:9"),
        ("n3.1", "http://n3:2"),
    ]
    withdraw_server(control, "n3")
    withdraw_server(control, "n3")
    assert list(read_servers(control)) == ["n10", "n3.1"]
    assert {path.name for path in (control / "servers").iterdir()} == {"n10.json", "n3.1.json"}
    fields = json.loads((control / "servers" / "n10.json").read_text())
    assert set(fields) == {"name", "url", "announced_at"}


@pytest.mark.parametrize(
    "text", ["", '{"name": "b"', "[]", '{"url": "http://b:1"}', '{"name": "c", "url": "http://b:1"}']
)
def test_a_damaged_file_is_skipped_with_one_warning(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    announce_server(tmp_path, "a", "http://a:1")
    (tmp_path / "servers" / "b.json").write_text(text)
    told: set[str] = set()
    with caplog.at_level(logging.WARNING, "reval_mcore"):
        assert [read_servers(tmp_path, told=told) for _ in range(3)] == [{"a": "http://a:1"}] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "servers" / "b.json") in line
    announce_server(tmp_path, "b", "http://b:1")
    assert list(read_servers(tmp_path, told=told)) == ["a", "b"]


@pytest.mark.parametrize(("name", "url"), [("", "http://a"), ("a/b", "http://a"), (".a", "http://a"), ("a", "a:1")])
def test_wrong_names_and_urls_are_refused(tmp_path: Path, name: str, url: str) -> None:
    with pytest.raises(ValueError, match=r"^(name|url) = "):
        announce_server(tmp_path, name, url)
    assert not list(tmp_path.iterdir())


def test_a_collector_has_the_servers_of_its_name() -> None:
    announced = {name: f"http://{name}:1" for name in ("n3", "n3.0", "n3.1", "n30", "n30.0", "n4.n3")}
    assert own_servers(announced, "n3") == ["http://n3:1", "http://n3.0:1", "http://n3.1:1"]
    assert own_servers(announced, "") == list(announced.values())
