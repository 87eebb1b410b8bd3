"""Collectors evaluate for the trainer: what they find is what it would find, by the version that it asked for."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.collector import Answerer
from reval_mcore.collector_process import WEIGHTS_OF
from reval_mcore.config import EvaluationConfig
from reval_mcore.control import Heart, StopSignals
from reval_mcore.durable import write_json
from reval_mcore.evaluation import Evaluation, evaluate
from reval_mcore.ranks import Ranks
from reval_mcore.remote_evaluation import RemoteEvaluation
from reval_mcore.rollout.engine import EngineError
from reval_mcore.verifiers import VerifierPool
from tests.unit.test_collector import STOP, ByteTokenizer, ScriptedEngine, verifier
from tests.unit.test_remote_collection import CONFIG, HELD_OUT, Site, finish

__all__ = ["verifier"]  # a fixture

EVALUATION = Evaluation(
    HELD_OUT,
    EvaluationConfig(num_samples=2, pass_at_k=(1, 2), max_prompts=129),
    seed=CONFIG.run.seed,
    max_response_tokens=CONFIG.rollout.max_response_tokens,
    stop_token_ids=(STOP,),
)
VERSION = 3


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def site(tmp_path: Path, verifier: VerifierPool, engine: ScriptedEngine) -> Site:
    tokenizer: Any = ByteTokenizer()
    (tmp_path / "control").mkdir()
    write_json(tmp_path / "control" / WEIGHTS_OF, {"attempt": "first"})
    return Site(tmp_path, Answerer(engine, tokenizer, verifier), StopSignals())


def remote(
    site: Site, *, timeout_s: float = 60.0, patience_s: float = 60.0, attempt: str = "first"
) -> RemoteEvaluation:
    deadline = time.monotonic() + timeout_s
    return RemoteEvaluation(
        *(site.run, EVALUATION, Ranks()),
        attempt=attempt,
        patience_s=patience_s,
        heartbeats=site.remote().heartbeats,
        is_asked_to_stop=lambda: time.monotonic() > deadline,
        wakeups=site.wakeups(),
    )


def check_nothing_is_left(site: Site) -> None:
    assert not (site.run / "control" / "evaluation.json").exists()
    assert not (site.run / "evaluation").exists()


def test_it_finds_what_the_trainer_would(site: Site) -> None:
    with site.collecting():
        result = remote(site).evaluate(VERSION)
        finish(site)
    expected = evaluate(EVALUATION, site.answerer, Ranks())
    assert result == expected
    assert expected.num_prompts == 129
    check_nothing_is_left(site)


def test_answers_by_other_weights_are_refused_and_asked_for_again(
    site: Site, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.version = VERSION - 1

    def catch_up() -> None:
        while "answered by versions [2]" not in caplog.text:
            time.sleep(0.05)
        engine.version = VERSION

    catching_up = threading.Thread(target=catch_up, daemon=True)
    catching_up.start()
    with site.collecting():
        result = remote(site).evaluate(VERSION)
        finish(site)
    assert site.engine is not None
    assert site.engine.oldest <= VERSION
    assert result == evaluate(EVALUATION, site.answerer, Ranks())


def test_parts_of_a_collector_that_is_lost_and_damaged_answers_are_made_again(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """It beats once, and has a part then, for as long as it is waited for."""
    Heart(site.run / "control", "lost", 7).beat(num_slots=1)
    directory = site.run / "evaluation" / f"v{VERSION:06d}-first"

    def damage() -> None:
        while not directory.exists():
            time.sleep(0.01)
        (directory / "00000-lost-7.json").write_text("{")

    threading.Thread(target=damage, daemon=True).start()
    with site.collecting():
        result = remote(site).evaluate(VERSION)
        finish(site)
    assert result == evaluate(EVALUATION, site.answerer, Ranks())
    assert "part 0 again" in caplog.text


def test_a_request_of_another_start_of_the_trainer_is_not_answered(site: Site, engine: ScriptedEngine) -> None:
    with site.collecting():
        assert remote(site, attempt="second", timeout_s=2.0).evaluate(VERSION) is None
        finish(site)
    assert engine.seeds == []
    check_nothing_is_left(site)


def test_nobody_to_evaluate_is_an_error_and_a_stop_is_none(site: Site) -> None:
    with pytest.raises(EngineError, match="nobody collects for 1 s"):
        remote(site, patience_s=1.0).evaluate(VERSION)
    assert remote(site, timeout_s=0.0).evaluate(VERSION) is None
    check_nothing_is_left(site)


def test_without_greedy(site: Site) -> None:
    sampled = replace(EVALUATION, config=EvaluationConfig(greedy=False, max_prompts=5))
    evaluation = RemoteEvaluation(
        *(site.run, sampled, Ranks()),
        attempt="first",
        patience_s=60.0,
        heartbeats=site.remote().heartbeats,
        is_asked_to_stop=lambda: False,
        wakeups=site.wakeups(),
    )
    with site.collecting():
        result = evaluation.evaluate(VERSION)
        finish(site)
    expected = evaluate(sampled, site.answerer, Ranks())
    assert result == expected
    assert expected.greedy_accuracy is None
