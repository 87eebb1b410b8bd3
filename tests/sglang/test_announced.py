"""Servers that announce themselves: found, joining late, moved to another port, withdrawn, left over from before."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from reval_mcore.architecture import read_spec
from reval_mcore.control import announce_server, read_servers, withdraw_server
from reval_mcore.records import VersionSpan
from reval_mcore.rollout.engine import GenerationResponse, SamplingParams
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.sglang_server import SGLangServer
from reval_mcore.rollout.weight_broadcast import BroadcastSync
from reval_mcore.rollout.weight_sync import DiskSync, WeightSync
from tests.builders import source_tensors
from tests.rollout_contract import EngineModel, requests
from tests.sglang.conftest import Servers
from tests.sglang.faulty_proxy import FaultyProxy
from tests.sglang.runs import Processes, on_servers, settings, summary_of, wait_for_iterations
from tests.sglang.servers import API_KEY

_NOBODY = "http://127.0.0.1:9"  # refuses connections
StartProxy = Callable[[str], FaultyProxy]


@pytest.fixture
def start_proxy() -> Iterator[StartProxy]:
    """A port of its own for a server."""
    with ExitStack() as stack:

        def start(url: str) -> FaultyProxy:
            proxy = FaultyProxy(url)
            stack.callback(proxy.close)
            return proxy

        yield start


def forget_weights(url: str) -> None:
    """As a server that was started again: it does not call what it holds by a name of the run."""

    async def rename() -> None:
        server = SGLangServer(url, API_KEY)
        try:
            await server.rename_weights("default", 30.0)
        finally:
            await server.close()

    asyncio.run(rename())


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


@pytest.mark.parametrize("way", ["disk", "distributed"])
def test_servers_join_move_and_leave_under_an_engine(
    servers: Servers,
    tiny_model: Path,
    start_proxy: StartProxy,
    tmp_path: Path,
    way: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampling = SamplingParams(max_response_tokens=30, stop_token_ids=(7,))
    model = EngineModel(tiny_model, tiny_model, read_spec(tiny_model).vocab_size, sampling)
    control = tmp_path / "control"
    sync: WeightSync = BroadcastSync(backend="gloo", timeout_s=60.0)
    if way == "disk":
        sync = DiskSync(tmp_path / "weights", companions=tiny_model, timeout_s=60.0)
    first, late = (start_proxy(url) for url in servers(2))
    announce_server(control, "left_over", _NOBODY)
    announce_server(control, "a", first.url)
    engine = SGLangEngine(
        lambda: read_servers(control).values(), sync, vocab_size=model.vocabulary, api_key=API_KEY, patience_s=30.0
    )
    caplog.set_level(logging.INFO, "reval_mcore")

    def update(version: int) -> None:
        engine.update_weights(source_tensors(tiny_model).items, version)

    def generate(version: int) -> list[GenerationResponse]:
        responses = engine.generate(requests(model, 24), sampling)
        for response in responses:
            assert response.version_spans == (VersionSpan(version, 0, len(response.token_ids)),)
        return responses

    try:
        engine.check()
        update(3)
        generate(3)
        announce_server(control, "b", late.url)
        forget_weights(late.url)
        if way == "distributed":
            assert wait_until(lambda: f"server joins: {late.url}" in caplog.text)
            update(4)
        else:
            assert wait_until(lambda: "/generate" in late.routes)  # were it only for a look at a reply
        version = 3 if way == "disk" else 4
        late.routes.clear()
        generate(version)
        assert "/generate" in late.routes

        moved = start_proxy(servers(1)[0])
        first.cut()
        forget_weights(moved.url)
        announce_server(control, "a", moved.url)
        assert wait_until(lambda: f"server leaves: {first.url}" in caplog.text)
        withdraw_server(control, "b")
        if way == "distributed":
            assert wait_until(lambda: f"server joins: {moved.url}" in caplog.text)
            update(5)
            version = 5
        moved.routes.clear()
        generate(version)
        assert "/generate" in moved.routes
        assert wait_until(lambda: f"server leaves: {late.url}" in caplog.text)
        late.routes.clear()
        generate(version)
        assert late.routes == []
    finally:
        engine.close()
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    # at most the connections that were cut before the new place was announced
    assert {line.partition(": ")[0] for line in told} <= {"server not there yet", "server lost"}
    assert [line for line in told if _NOBODY in line] == [line for line in told if "not there yet" in line]
    assert len(told) <= 2


def test_an_engine_waits_for_a_server_and_says_so(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    announce_server(tmp_path, "left_over", _NOBODY)
    sync = DiskSync(tmp_path / "weights", companions=tiny_model, timeout_s=60.0)
    engine = SGLangEngine(lambda: read_servers(tmp_path).values(), sync, vocab_size=8, patience_s=2.0)
    try:
        with pytest.raises(ValueError, match=f"none for 2 s; start them first.*: {_NOBODY}: no connection"):
            engine.check()
    finally:
        engine.close()
    assert [record.getMessage()[:20] for record in caplog.records] == ["waiting for a server"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_servers_come_late_and_move(
    servers: Servers, tiny_model: Path, tmp_path: Path, processes: Processes, start_proxy: StartProxy
) -> None:
    """Each collector asks the servers of its name."""
    run = tmp_path / "run"
    control = run / "control"
    one, two = servers(2)
    arguments = [
        *settings(tiny_model, tiny_model, run),
        *on_servers([], tmp_path),
        "rollout.mode=asynchronous",
        "run.num_iterations=12",
        "evaluation.max_prompts=16",
        "rollout.num_prompts=4",
        "rollout.num_responses=4",
        "updates.batch_size=16",
        "updates.per_iteration=1",
    ]
    announce_server(control, "n1.from_before", _NOBODY)
    trainer = processes.start("trainer", "train", *arguments)
    collectors = {name: processes.start(name, "collect", *arguments, "--name", name) for name in ("n1", "n2")}
    assert wait_until(lambda: "waiting for a server" in processes.log("trainer"), timeout_s=120.0)
    first = start_proxy(one)
    announce_server(control, "n1.0", first.url)  # n2 has none so far, and waits
    wait_for_iterations(run, 2, trainer)
    late = start_proxy(two)
    announce_server(control, "n2", late.url)
    assert wait_until(lambda: "/generate" in late.routes)
    wait_for_iterations(run, 4, trainer)
    moved = start_proxy(one)
    first.cut()
    forget_weights(moved.url)
    announce_server(control, "n1.0", moved.url)
    assert trainer.wait(600.0) == 0, processes.log("trainer")
    for name, collector in collectors.items():
        assert collector.wait(120.0) == 0, processes.log(name)
    assert "/generate" in moved.routes
    assert summary_of(run)["iterations"] == 12
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
