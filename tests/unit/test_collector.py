"""Groups, verdicts and statistics as the collector writes them.

The engine is scripted, so that every response is known; verifier and shards are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reval_mcore.collector import Answerer, Collector
from reval_mcore.config import Config, VerifierConfig
from reval_mcore.prompts import prompts_for_iteration
from reval_mcore.ranks import Ranks
from reval_mcore.records import FinishReason, Prompt, Trajectory, VersionSpan
from reval_mcore.replay.shards import ShardWriter, read_trajectories
from reval_mcore.rollout.engine import GenerationRequest, GenerationResponse, SamplingParams, WeightSource
from reval_mcore.verifiers import VerifierPool
from tests.builders import make_config
from tools import tiny_task

STOP = 0
# (response text, finish reason), dealt out in turn to the responses of an iteration
SCRIPT: list[tuple[str, FinishReason]] = [
    (r"\boxed{4}", "stop"),
    (r"\boxed{5}", "stop"),
    (r"no idea", "stop"),
    (r"\boxed{4} and on", "length"),
]


class ByteTokenizer:
    """One token a byte, 0 to stop."""

    def batch_decode(self, sequences: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [bytes(token for token in tokens if token != STOP).decode() for tokens in sequences]


class ScriptedEngine:
    wants_weights = False

    def __init__(self) -> None:
        self.version = 3
        self.seeds: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[GenerationResponse]:
        self.seeds += [request.seed for request in requests]
        return [self._response(*SCRIPT[i % len(SCRIPT)]) for i in range(len(requests))]

    def _response(self, text: str, reason: FinishReason) -> GenerationResponse:
        tokens = np.frombuffer(text.encode() + (bytes([STOP]) if reason == "stop" else b""), np.uint8).astype(np.int32)
        return GenerationResponse(
            tokens, np.full(len(tokens), -0.5, np.float32), reason, (VersionSpan(self.version, 0, len(tokens)),)
        )

    def abort(self) -> None: ...
    def update_weights(self, weights: WeightSource, version: int) -> None: ...
    def close(self) -> None: ...


PROMPTS = [Prompt(f"p{i}", f"2+2={'?' * i}", (50, 43, 50, *[63] * i), "4") for i in range(10)]


@pytest.fixture
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig()) as pool:
        yield pool


def make_collector(tmp_path: Path, verifier: VerifierPool, config: Config) -> tuple[Collector, ScriptedEngine]:
    engine = ScriptedEngine()
    writer = ShardWriter(
        tmp_path,
        writer="inline",
        incarnation=len(list(tmp_path.glob("shards/*"))),
        tokenizer_hash="t",
        template_hash="m",
    )
    tokenizer: Any = ByteTokenizer()
    return Collector(config, PROMPTS, Answerer(engine, tokenizer, verifier), writer, (STOP,), Ranks()), engine


def collect(
    tmp_path: Path, verifier: VerifierPool, config: Config, *, iteration: int = 0
) -> tuple[list[Trajectory], dict[str, float], ScriptedEngine]:
    collector, engine = make_collector(tmp_path, verifier, config)
    collected = collector.collect(iteration)
    return read_trajectories(tmp_path / "shards" / collected.shards[0]), collected.metrics, engine


def config(**sections: Any) -> Config:
    rollout = {"num_prompts": 3, "num_responses": 4, "max_response_tokens": 32}
    return make_config(Path("unused"), **({"rollout": rollout} | sections))


def test_no_prompts_have_no_answers(tmp_path: Path, verifier: VerifierPool) -> None:
    """As on a rank that has no part where there are more ranks than prompts."""
    tiny_task.save_tokenizer(tmp_path)
    tokenizer = tiny_task.load_tokenizer(tmp_path)
    answerer = Answerer(ScriptedEngine(), tokenizer, verifier)
    assert answerer.answer([], 2, SamplingParams(4, (2,)), lambda prompt, index: 0) == []


def test_every_prompt_of_the_block_has_one_whole_group(tmp_path: Path, verifier: VerifierPool) -> None:
    trajectories, _, engine = collect(tmp_path, verifier, config(), iteration=2)
    block = prompts_for_iteration(2, 3, len(PROMPTS), 0)
    assert [t.prompt_id for t in trajectories] == [f"p{i}" for i in block for _ in range(4)]
    assert [t.sample_index for t in trajectories] == [0, 1, 2, 3] * 3
    assert len({t.trajectory_id for t in trajectories}) == 12
    assert len({t.group_id for t in trajectories}) == 3
    assert len(set(engine.seeds)) == 12
    assert all(t.policy_version == 3 for t in trajectories)


def test_zero_reward_judges_cut_responses_as_wrong_members_of_their_group(
    tmp_path: Path, verifier: VerifierPool
) -> None:
    trajectories, metrics, _ = collect(tmp_path, verifier, config(reward={"truncation": "zero_reward"}))
    group = trajectories[:4]
    assert [t.reward for t in group] == [1.0, 0.0, 0.0, 0.0]
    assert [t.verdict for t in group] == ["correct", "wrong", "no_answer", "correct"]
    assert [t.finish_reason for t in group] == ["stop", "stop", "stop", "length"]
    assert {t.group_size for t in group} == {4}
    assert {t.group_reward_mean for t in group} == {0.25}
    assert group[0].group_reward_std == pytest.approx(np.std([1, 0, 0, 0]))
    assert metrics["truncated_fraction"] == 0.25
    assert metrics["verdict_no_answer"] == 3.0


@pytest.mark.parametrize("truncation", ["mask", "bootstrap"])
def test_mask_and_bootstrap_leave_cut_responses_without_a_verdict(
    tmp_path: Path, verifier: VerifierPool, truncation: str
) -> None:
    trajectories, _, _ = collect(tmp_path, verifier, config(reward={"truncation": truncation}))
    group = trajectories[:4]
    assert [t.verdict for t in group] == ["correct", "wrong", "no_answer", "unverified"]
    assert {t.group_size for t in group} == {3}
    assert group[0].group_reward_mean == pytest.approx(1 / 3)
    assert group[0].group_reward_std == pytest.approx(np.std([1, 0, 0]))


def test_permuted_rewards_keep_their_number_and_lose_their_responses(tmp_path: Path, verifier: VerifierPool) -> None:
    plain, _, _ = collect(tmp_path, verifier, config(reward={"truncation": "zero_reward"}))
    dealt, metrics, _ = collect(
        tmp_path, verifier, config(reward={"truncation": "zero_reward"}, verifier={"permute_rewards": True})
    )
    before, after = ([(t.reward, t.verdict) for t in trajectories] for trajectories in (plain, dealt))
    assert sorted(before) == sorted(after)
    assert before != after
    assert metrics["reward_mean"] == pytest.approx(np.mean([reward for reward, _ in after]))
    assert metrics["accuracy"] == 0.5  # what is logged is the truth: 2 of 4 answers are right


def test_streams_are_named_by_iteration_prompt_and_sample(tmp_path: Path, verifier: VerifierPool) -> None:
    seeds = [collect(tmp_path, verifier, config(), iteration=i)[2].seeds for i in (0, 0, 1)]
    assert seeds[0] == seeds[1]
    assert not set(seeds[0]) & set(seeds[2])


def test_shards_left_behind_are_used_and_report_the_same(tmp_path: Path, verifier: VerifierPool) -> None:
    """Those of another iteration than asked for wait; what is no whole iteration, or damaged, is made again."""
    first, _ = make_collector(tmp_path, verifier, config(reward={"truncation": "mask"}))
    before = [first.collect(iteration) for iteration in (4, 5, 6)]
    shards = tmp_path / "shards"
    damaged = shards / before[2].shards[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    other, _ = make_collector(tmp_path, verifier, config(rollout={"num_prompts": 2, "num_responses": 4}))
    part = other.collect(7)

    resumed, engine = make_collector(tmp_path, verifier, config(reward={"truncation": "mask"}))
    names = [each.shards[0] for each in (*before, part)]
    assert resumed.take_over(shards, names) == [before[0].shards[0], before[1].shards[0]]
    assert [resumed.collect(iteration) for iteration in (4, 5)] == before[:2]
    assert engine.seeds == []
    again = resumed.collect(6)
    assert (again.metrics, again.samples) == (before[2].metrics, before[2].samples)
    assert again.shards[0] != before[2].shards[0]
    assert len(engine.seeds) == 12
