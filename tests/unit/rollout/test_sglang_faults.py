"""What servers do that a real one cannot be made to do: each is that server's loss, with its cause in one line.

The servers are doubles with recorded replies (tests/sglang/test_recordings.py holds those against the real one).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from reval_mcore.records import VersionSpan
from reval_mcore.rollout.engine import EngineError, GenerationRequest, SamplingParams
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_sync import DiskSync
from tests.sglang.faulty_proxy import Reply
from tests.sglang.recorded_server import RecordedServer
from tests.sglang.recordings import recorded

KEY = "a-key"
SAMPLING = SamplingParams(max_response_tokens=5, stop_token_ids=(1,))
# what the framework under SGLang says of an exception in it
INTERNAL_ERROR = Reply(500, "Internal Server Error")


@pytest.fixture
def doubles() -> Iterator[list[RecordedServer]]:
    with ExitStack() as stack:
        made = [RecordedServer(KEY) for _ in range(3)]
        for double in made:
            stack.callback(double.close)
        yield made


Connect = Callable[..., SGLangEngine]


@pytest.fixture
def connect(doubles: list[RecordedServer], tmp_path: Path) -> Iterator[Connect]:
    """To the first `number` doubles."""
    (tmp_path / "model").mkdir()
    with ExitStack() as stack:

        def make(number: int, **settings: float) -> SGLangEngine:
            sync = DiskSync(tmp_path / "weights", companions=tmp_path / "model", timeout_s=10.0, control_timeout_s=1.0)
            urls = [double.url for double in doubles[:number]]
            settings = {"control_timeout_s": 1.0, "patience_s": 20.0, **settings}
            engine = SGLangEngine(urls, sync, vocab_size=512, api_key=KEY, **settings)  # pyright: ignore[reportArgumentType]
            stack.callback(engine.close)
            return engine

        yield make


def update(engine: SGLangEngine, version: int) -> None:
    engine.update_weights(lambda: [("weight", torch.zeros(2))], version)


def generate(engine: SGLangEngine, version: int, number: int = 24, sampling: SamplingParams = SAMPLING) -> None:
    """All of it is there, of this version."""
    responses = engine.generate([GenerationRequest((2, 3), i) for i in range(number)], sampling)
    assert [response.version_spans for response in responses] == [(VersionSpan(version, 0, 5),)] * number


def lost(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("server lost: ")]


def test_a_version_has_its_name_only_after_what_was_cached_of_another_is_gone(
    connect: Connect, doubles: list[RecordedServer]
) -> None:
    """What is made between load and flush is of both. Seen on a real server, about once in a hundred updates."""
    engine = connect(1)
    update(engine, 3)
    labels: list[tuple[str, str]] = []

    def look(route: str) -> None:
        if route.startswith("/flush_cache"):
            labels.append((doubles[0].label, doubles[0].told))

    doubles[0].is_busy, doubles[0].fault = True, look
    update(engine, 4)
    assert labels == [("updating", "updating")]  # so nobody asks it, and it comes to be idle
    generate(engine, 4)


def test_without_a_fault_all_are_asked(connect: Connect, doubles: list[RecordedServer]) -> None:
    engine = connect(3)
    engine.check()
    update(engine, 3)
    generate(engine, 3)
    assert all(double.routes.count("/generate") > 1 for double in doubles)


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (INTERNAL_ERROR, "HTTP 500: Internal Server Error"),
        (Reply(200, "[1]"), "which is no reply of SGLang"),
        (Reply(200, "{"), "is not as expected"),
        (Reply(200, json.dumps({"output_ids": [1], "meta_info": {}})), "is not as expected"),
    ],
)
def test_a_server_that_answers_nonsense(
    connect: Connect, doubles: list[RecordedServer], caplog: pytest.LogCaptureFixture, reply: Reply, cause: str
) -> None:
    engine = connect(2)
    engine.check()
    update(engine, 3)
    doubles[0].fault = lambda route: reply if route == "/generate" else None
    generate(engine, 3)
    (line,) = lost(caplog)
    assert doubles[0].url in line
    assert cause in line


def test_a_server_that_hangs_holds_up_one_update_and_no_more(
    connect: Connect, doubles: list[RecordedServer], caplog: pytest.LogCaptureFixture
) -> None:
    engine = connect(2)
    engine.check()
    update(engine, 3)
    doubles[0].fault = lambda route: "hang"
    update(engine, 4)
    doubles[0].routes.clear()
    for version in (5, 6, 7):
        update(engine, version)
        generate(engine, version, number=4)
    assert "/update_weights_from_disk" not in doubles[0].routes  # it is looked after, and offered nothing
    assert len(lost(caplog)) == 1
    doubles[0].fault = lambda route: None
    wait_until_asked(engine, doubles[0], version=7)
    assert doubles[0].label == doubles[1].label


def wait_until_asked(engine: SGLangEngine, double: RecordedServer, version: int) -> None:
    double.routes.clear()
    deadline = time.monotonic() + 30.0
    while double.routes.count("/generate") < 2:  # the first is a look at a reply
        assert time.monotonic() < deadline
        generate(engine, version)


def test_a_server_that_refuses_weights(
    connect: Connect, doubles: list[RecordedServer], caplog: pytest.LogCaptureFixture
) -> None:
    engine = connect(2)
    engine.check()
    update(engine, 3)
    refusal = recorded("load_refused", message="no room")
    doubles[0].fault = lambda route: refusal if route == "/update_weights_from_disk" else None
    doubles[0].routes.clear()
    update(engine, 4)
    generate(engine, 4)
    assert "/generate" not in doubles[0].routes
    (line,) = lost(caplog)
    assert line.endswith("HTTP 400: no room")
    doubles[0].fault = lambda route: None
    wait_until_asked(engine, doubles[0], version=4)


def test_a_server_that_holds_other_weights_than_the_others(
    connect: Connect, doubles: list[RecordedServer], caplog: pytest.LogCaptureFixture
) -> None:
    engine = connect(3)
    engine.check()
    doubles[1].checksums = {"model.norm.weight": "another"}
    update(engine, 3)
    doubles[1].routes.clear()
    generate(engine, 3)
    assert "/generate" not in doubles[1].routes
    assert doubles[1].label != doubles[0].label
    assert "holds other weights than the other servers" in lost(caplog)[0]


def test_every_server_is_asked_whether_its_log_probabilities_are_tempered(
    connect: Connect, doubles: list[RecordedServer]
) -> None:
    engine = connect(2)
    engine.check()
    update(engine, 3)
    tempered = SamplingParams(max_response_tokens=5, stop_token_ids=(1,), temperature=0.7)
    doubles[1].is_tempered = True
    with pytest.raises(EngineError, match=f"^{doubles[1].url}: gives log-probabilities at temperature 0.7, not at 1"):
        generate(engine, 3, sampling=tempered)
    generate(engine, 3)  # at 1 there is no difference
    only_one = connect(1)
    only_one.check()
    update(only_one, 3)
    generate(only_one, 3, sampling=tempered)


def test_a_key_that_is_wrong_and_an_sglang_that_lacks_something_are_refused(
    connect: Connect, doubles: list[RecordedServer]
) -> None:
    doubles[0].fault = lambda route: recorded("no_key") if route == "/server_info" else None
    with pytest.raises(ValueError, match="HTTP 401: Unauthorized"):
        connect(2).check()
    doubles[0].fault = lambda route: recorded("no_such_route") if route == "/model_info" else None
    with pytest.raises(ValueError, match="no SGLang of a known kind serves there"):
        connect(2).check()
    bare = json.dumps({"output_ids": [1], "meta_info": {"finish_reason": {}, "output_token_logprobs": []}})
    doubles[0].fault = lambda route: Reply(200, bare) if route == "/generate" else None
    with pytest.raises(ValueError, match="replies of this SGLang have no weight_versions"):
        connect(2).check()
