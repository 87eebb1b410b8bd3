"""A server fails: no response is lost, no version is mixed up, and one line of the log has the cause."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from reval_mcore.architecture import read_spec
from reval_mcore.records import VersionSpan
from reval_mcore.rollout.engine import EngineError, GenerationRequest, GenerationResponse, SamplingParams
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_broadcast import BroadcastSync
from reval_mcore.rollout.weight_sync import DiskSync, FollowedWeights, WeightSync
from tests.builders import save_like, source_tensors
from tests.rollout_contract import EngineModel, check_logprobs, dense_logprobs, requests
from tests.sglang.conftest import Servers, StartServer
from tests.sglang.faulty_proxy import FaultyProxy, Reply, no_fault
from tests.sglang.recordings import recorded
from tests.sglang.servers import API_KEY

Connect = Callable[..., SGLangEngine]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineModel:
    return EngineModel(
        hf_path=save_like(tiny_model, tmp_path_factory.mktemp("model"), seed=0),
        other=save_like(tiny_model, tmp_path_factory.mktemp("other"), seed=1),
        vocabulary=read_spec(tiny_model).vocab_size,
        sampling=SamplingParams(max_response_tokens=40, stop_token_ids=(7,)),
    )


@pytest.fixture
def proxies(servers: Servers) -> Iterator[list[FaultyProxy]]:
    """One before each of the two servers."""
    with ExitStack() as stack:
        made = [FaultyProxy(url) for url in servers(2)]
        for proxy in made:
            stack.callback(proxy.close)
        yield made


@pytest.fixture
def connect(model: EngineModel, tmp_path: Path) -> Iterator[Connect]:
    with ExitStack() as stack:

        def make(urls: list[str], sync: WeightSync | None = None, **settings: float) -> SGLangEngine:
            settings = {"control_timeout_s": 20.0, "patience_s": 60.0, **settings}
            sync = sync or DiskSync(
                tmp_path / "weights",
                companions=model.hf_path,
                timeout_s=60.0,
                control_timeout_s=settings["control_timeout_s"],
            )
            engine = SGLangEngine(
                urls,
                sync,
                vocab_size=model.vocabulary,
                api_key=API_KEY,
                **settings,  # pyright: ignore[reportArgumentType]
            )
            stack.callback(engine.close)
            return engine

        yield make


def whole(model: EngineModel, responses: list[GenerationResponse], version: int, hf_path: Path | None = None) -> None:
    """All there, all of these weights."""
    check_logprobs(hf_path or model.hf_path, requests(model, len(responses)), responses)
    for response in responses:
        length = len(response.token_ids)
        assert length == model.sampling.max_response_tokens or response.token_ids[-1] == 7
        assert response.version_spans == (VersionSpan(version, 0, length),)


def during_generation(engine: SGLangEngine, model: EngineModel, act: Callable[[], None]) -> list[GenerationResponse]:
    """`act` while responses are being made."""
    responses: list[GenerationResponse] = []
    thread = threading.Thread(target=lambda: responses.extend(engine.generate(requests(model, 48), model.sampling)))
    thread.start()
    time.sleep(0.5)
    act()
    thread.join(240.0)
    assert len(responses) == 48
    return responses


def test_a_server_that_answers_500_is_replaced_by_another(
    connect: Connect, proxies: list[FaultyProxy], model: EngineModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = connect([proxy.url for proxy in proxies])
    engine.update_weights(source_tensors(model.hf_path).items, version=3)
    proxies[0].fault = lambda route: Reply(500, "Internal Server Error") if route == "/generate" else None
    with caplog.at_level(logging.WARNING, "reval_mcore"):
        whole(model, engine.generate(requests(model, 16), model.sampling), version=3)
    lines = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert lines == [f"server lost: {proxies[0].url}/generate: HTTP 500: Internal Server Error"]


def test_a_port_that_is_cut_while_responses_are_made(
    connect: Connect, proxies: list[FaultyProxy], model: EngineModel, caplog: pytest.LogCaptureFixture
) -> None:
    # less than the longest wait before a lost server is looked at again: that all of its requests fail is one failure
    engine = connect([proxy.url for proxy in proxies], patience_s=20.0)
    engine.update_weights(source_tensors(model.hf_path).items, version=3)
    with caplog.at_level(logging.WARNING, "reval_mcore"):
        whole(model, during_generation(engine, model, proxies[0].cut), version=3)
    assert sum("server lost" in record.getMessage() for record in caplog.records) == 1
    # it misses a version, and comes back with it
    engine.update_weights(source_tensors(model.other).items, version=4)
    proxies[0].mend()
    proxies[1].cut()
    whole(model, engine.generate(requests(model, 8), model.sampling), version=4, hf_path=model.other)


def test_a_server_that_accepts_and_never_answers(
    connect: Connect, proxies: list[FaultyProxy], model: EngineModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = connect([proxy.url for proxy in proxies], control_timeout_s=4.0)
    engine.update_weights(source_tensors(model.hf_path).items, version=3)

    def freeze() -> None:
        proxies[0].fault = lambda route: "hang"

    with caplog.at_level(logging.WARNING, "reval_mcore"):
        whole(model, during_generation(engine, model, freeze), version=3)
    engine.update_weights(source_tensors(model.other).items, version=4)  # held up by 4 s, not by its own deadline
    whole(model, engine.generate(requests(model, 4), model.sampling), version=4, hf_path=model.other)


@pytest.mark.parametrize("way", ["disk", "distributed"])
def test_a_refused_update_is_that_servers_loss(
    connect: Connect,
    proxies: list[FaultyProxy],
    model: EngineModel,
    tmp_path: Path,
    way: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sync: WeightSync = BroadcastSync(backend="gloo", timeout_s=60.0)
    if way == "disk":
        sync = DiskSync(tmp_path / "w", companions=model.hf_path, timeout_s=60.0)
    engine = connect([proxy.url for proxy in proxies], sync)
    engine.update_weights(source_tensors(model.hf_path).items, version=3)
    refused: list[str] = []

    def refuse(route: str) -> Reply | None:
        """The first two tries."""
        if route.startswith("/update_weights_from") and len(refused) < 2:
            refused.append(route)
            return recorded("load_refused" if way == "disk" else "end_of_nothing", message="not now")
        return None

    proxies[0].fault = refuse
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "reval_mcore"):
        engine.update_weights(source_tensors(model.other).items, version=4)
    assert refused
    assert any("HTTP 400: not now" in record.getMessage() for record in caplog.records)
    assert time.monotonic() - start < 120.0  # nobody waits in a collective for what was refused
    whole(model, engine.generate(requests(model, 16), model.sampling), version=4, hf_path=model.other)


def test_the_last_server_goes_and_the_engine_says_why(
    connect: Connect, proxies: list[FaultyProxy], model: EngineModel
) -> None:
    engine = connect([proxies[0].url], patience_s=3.0)
    engine.update_weights(source_tensors(model.hf_path).items, version=3)
    proxies[0].cut()
    with pytest.raises(EngineError, match=f"no server for . s: {proxies[0].url}: no connection"):
        engine.generate(requests(model, 4), model.sampling)


@pytest.mark.parametrize("way", ["disk", "distributed"])
def test_responses_made_during_updates_name_the_weights_that_made_them(
    connect: Connect,
    servers: Servers,
    model: EngineModel,
    tmp_path: Path,
    way: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a collector has them while a trainer brings new weights: each span is of its version, no server is lost.

    Several updates: now and then SGLang does not throw away at once what it cached of the weights before.
    """
    sync: WeightSync = BroadcastSync(backend="gloo", timeout_s=60.0, max_bucket_bytes=100_000)
    if way == "disk":
        sync = DiskSync(tmp_path / "w", companions=model.hf_path, timeout_s=60.0)
    trainer = connect(servers(2), sync)
    collector = connect(servers(2), FollowedWeights(), max_concurrent_requests=12)
    collector.follow(trainer.attempt)
    versions = range(3, 10)
    weights = {version: (model.hf_path, model.other)[version % 2] for version in versions}
    trainer.update_weights(source_tensors(weights[3]).items, version=3)
    made: list[tuple[GenerationRequest, GenerationResponse]] = []
    is_over = threading.Event()

    def collect() -> None:
        while not is_over.is_set():
            batch = requests(model, 32)
            made.extend(zip(batch, collector.generate(batch, model.sampling), strict=True))

    caplog.set_level(logging.WARNING, "reval_mcore")
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(collect)
        try:
            for version in versions[1:]:
                time.sleep(0.5)
                trainer.update_weights(source_tensors(weights[version]).items, version)
        finally:
            is_over.set()
        collecting.result(200.0)
    seen = set[int]()
    for request, response in made:
        ends = [span.end for span in response.version_spans]
        assert [span.start for span in response.version_spans] == [0, *ends[:-1]]
        assert ends[-1] == len(response.token_ids)
        for span in response.version_spans:
            part = slice(span.start, span.end)
            expected = dense_logprobs(weights[span.version], request, response.token_ids)[part]
            np.testing.assert_allclose(response.logprobs[part], expected, atol=1e-4)
            seen.add(span.version)
    assert len(seen) >= 3
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("reval_mcore")]


def test_weights_are_asked_of_no_server_before_they_are_written(
    connect: Connect, servers: Servers, model: EngineModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Writing those of a large model takes minutes, in which servers are looked after as always."""
    engine = connect(servers(2), control_timeout_s=2.0)
    engine.update_weights(source_tensors(model.hf_path).items, version=3)

    def weights() -> Iterator[tuple[str, object]]:
        for number, item in enumerate(source_tensors(model.other).items()):
            if number == 1:
                time.sleep(3.0)
            yield item

    with caplog.at_level(logging.WARNING, "reval_mcore"):
        engine.update_weights(weights, version=4)  # pyright: ignore[reportArgumentType]
        whole(model, engine.generate(requests(model, 8), model.sampling), version=4, hf_path=model.other)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("reval_mcore")]


def test_a_server_that_is_stuck_at_an_old_version_makes_no_more_responses(
    connect: Connect, proxies: list[FaultyProxy], model: EngineModel, caplog: pytest.LogCaptureFixture
) -> None:
    """For as long as that one is too old; what a collector may still use, it uses."""
    trainer = connect([proxy.url for proxy in proxies])
    collector = connect([proxy.url for proxy in proxies], FollowedWeights(), max_concurrent_requests=8)

    def generate() -> set[int]:
        proxies[0].routes.clear()
        responses = collector.generate(requests(model, 32), model.sampling)
        return {span.version for response in responses for span in response.version_spans}

    trainer.update_weights(source_tensors(model.hf_path).items, version=3)
    refusal = recorded("load_refused", message="no room")
    proxies[0].fault = lambda route: refusal if "update_weights" in route else None
    for version in (4, 5):
        trainer.update_weights(source_tensors(model.hf_path).items, version)
    collector.follow(trainer.attempt, 3)
    assert generate() == {3, 5}
    with caplog.at_level(logging.WARNING, "reval_mcore"):
        collector.follow(trainer.attempt, 4)
        assert generate() == {5}
        assert generate() == {5}
        assert "/generate" not in proxies[0].routes
    lines = [line for line in caplog.messages if "version 4" in line or "4 is the oldest" in line]
    assert len(lines) == 1
    assert proxies[0].url in lines[0]
    proxies[0].fault = no_fault
    deadline = time.monotonic() + 60.0
    while "/generate" not in proxies[0].routes:  # it has version 5 from the trainer, and is used again
        assert generate() == {5}
        assert time.monotonic() < deadline


@pytest.mark.timeout(900)
def test_a_server_is_killed_while_it_works_and_while_it_is_updated(
    connect: Connect, servers: Servers, start_server: StartServer, model: EngineModel
) -> None:
    """A real one, by SIGKILL. Started again, it is brought up to date before it is asked."""
    victim = start_server()
    victim.wait_until_ready()
    there = " ".join(victim.left_behind())  # what the end of the session goes by sees all
    assert all(kind in there for kind in ("process", f"port {victim.port}", "/dev/shm/sglang_loads_"))
    engine = connect([victim.url, *servers(1)], BroadcastSync(backend="gloo", timeout_s=30.0, max_bucket_bytes=50_000))
    engine.update_weights(source_tensors(model.hf_path).items, version=3)

    def weights() -> Iterator[tuple[str, object]]:
        for number, item in enumerate(source_tensors(model.other).items()):
            if number == 12:  # half of the buckets are there
                victim.kill()
            yield item

    engine.update_weights(weights, version=4)  # pyright: ignore[reportArgumentType]
    whole(model, engine.generate(requests(model, 16), model.sampling), version=4, hf_path=model.other)
    assert victim.left_behind() == []

    victim = start_server(port=victim.port)
    victim.wait_until_ready()
    engine = connect([victim.url, *servers(1)])
    engine.update_weights(source_tensors(model.hf_path).items, version=5)
    whole(model, during_generation(engine, model, lambda: victim.signal(signal.SIGKILL)), version=5)
