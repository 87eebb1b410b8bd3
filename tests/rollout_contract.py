"""What every rollout engine promises. transformers' own forward pass is the reference.

A test module takes all of it by a subclass of `EngineContract` and fixtures `model` and `engine`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reval_mcore.randomness import stream_key
from reval_mcore.records import VersionSpan
from reval_mcore.rollout.engine import GenerationRequest, GenerationResponse, RolloutEngine, SamplingParams
from tests.builders import load_hf, source_tensors


@dataclass(frozen=True)
class EngineModel:
    """What an engine under test serves as version 0."""

    hf_path: Path
    other: Path  # the same shape, other weights
    vocabulary: int
    sampling: SamplingParams  # some responses stop, some reach the limit
    num_draws: int = 1000


def requests(model: EngineModel, number: int, *, iteration: int = 0) -> list[GenerationRequest]:
    """Prompts of lengths 1 to 9, each with a random stream of its own."""
    rng = np.random.default_rng(1)
    prompts = [tuple(rng.integers(0, model.vocabulary, 1 + i % 9).tolist()) for i in range(number)]
    return [GenerationRequest(p, stream_key(0, "rollout", iteration, i)) for i, p in enumerate(prompts)]


_reference = functools.lru_cache(maxsize=4)(load_hf)  # a test compares many responses with one model


def dense_logprobs(hf_path: Path, request: GenerationRequest, response: np.ndarray) -> np.ndarray:
    """fp64 log-softmax of one whole sequence, at temperature 1."""
    tokens = torch.tensor([*request.token_ids, *response.tolist()])
    with torch.no_grad():
        logprobs = _reference(hf_path)(tokens[None]).logits[0].double().log_softmax(-1)
    first = len(request.token_ids) - 1
    return logprobs[first:-1].gather(-1, tokens[first + 1 :, None])[:, 0].numpy()


def check_logprobs(hf_path: Path, batch: Sequence[GenerationRequest], responses: Sequence[GenerationResponse]) -> None:
    for request, response in zip(batch, responses, strict=True):
        expected = dense_logprobs(hf_path, request, response.token_ids)
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)
        assert response.logprobs.dtype == np.float32
        assert response.token_ids.dtype == np.int32


class EngineContract:
    @pytest.mark.parametrize(
        "changes",
        [{}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 20}, {"temperature": 0.0}],
        ids=["plain", "tempered", "truncated", "greedy"],
    )
    def test_logprobs_are_those_of_the_sampled_tokens_at_temperature_1(
        self, engine: RolloutEngine, model: EngineModel, changes: dict[str, float]
    ) -> None:
        sampling = replace(model.sampling, **changes)
        batch = requests(model, 20)
        check_logprobs(model.hf_path, batch, engine.generate(batch, sampling))

    def test_responses_end_at_the_stop_token_or_at_the_limit(self, engine: RolloutEngine, model: EngineModel) -> None:
        reasons = set()
        stops = set(model.sampling.stop_token_ids)
        for response in engine.generate(requests(model, 64), model.sampling):
            tokens = response.token_ids.tolist()
            reasons.add(response.finish_reason)
            assert (tokens[-1] in stops) == (response.finish_reason == "stop")
            assert not stops & set(tokens[:-1])
            assert len(tokens) == model.sampling.max_response_tokens or response.finish_reason == "stop"
            assert [(span.start, span.end) for span in response.version_spans] == [(0, len(tokens))]
        assert reasons == {"stop", "length"}

    @pytest.mark.parametrize("cut", [{"top_k": 6}, {"top_p": 0.8}], ids=["top_k", "top_p"])
    def test_samples_follow_the_policy(self, engine: RolloutEngine, model: EngineModel, cut: dict[str, Any]) -> None:
        """Chi-square of the first token against transformers' softmax, tempered and cut alike.

        One cut at a time: engines differ in whether top-p is of what top-k left, or of all.
        """
        prompt, number = (3, 14, 15), model.num_draws
        with torch.no_grad():
            logits = load_hf(model.hf_path)(torch.tensor([prompt])).logits[0, -1].double() / 0.8
        ranked, order = logits.softmax(-1).sort(descending=True)
        kept = order[: cut["top_k"]] if "top_k" in cut else order[ranked.cumsum(0) - ranked < cut["top_p"]]
        expected = torch.zeros_like(logits).scatter(0, kept, logits.softmax(-1)[kept]).numpy()
        expected *= number / expected.sum()
        sampling = replace(model.sampling, max_response_tokens=1, temperature=0.8, **cut)
        batch = [GenerationRequest(prompt, stream_key(5, "rollout", i)) for i in range(number)]
        drawn = [response.token_ids[0] for response in engine.generate(batch, sampling)]
        counts = np.bincount(drawn, minlength=model.vocabulary)
        assert counts[expected == 0.0].sum() == 0
        common = expected >= 5.0
        means = np.append(expected[common], expected[~common].sum())
        seen = np.append(counts[common], counts[~common].sum())
        chi_square = float(((seen - means) ** 2 / np.maximum(means, 1.0)).sum())
        degrees = len(means) - 1
        assert degrees >= 3
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5

    def test_greedy_is_the_argmax_of_transformers(self, engine: RolloutEngine, model: EngineModel) -> None:
        reference = load_hf(model.hf_path)
        batch = requests(model, 10)
        for request, response in zip(
            batch, engine.generate(batch, replace(model.sampling, temperature=0.0)), strict=True
        ):
            tokens = list(request.token_ids)
            for token in response.token_ids.tolist():
                with torch.no_grad():
                    assert token == int(reference(torch.tensor([tokens])).logits[0, -1].argmax())
                tokens.append(token)

    def test_an_abort_gives_what_there_is(self, engine: RolloutEngine, model: EngineModel) -> None:
        """The stop token is one that hardly comes, so that all are still running."""
        sampling = replace(model.sampling, max_response_tokens=100, stop_token_ids=model.sampling.stop_token_ids[:1])
        batch = requests(model, 48)
        responses: list[GenerationResponse] = []
        thread = threading.Thread(target=lambda: responses.extend(engine.generate(batch, sampling)))
        start = time.monotonic()
        thread.start()
        time.sleep(0.15)
        engine.abort()
        thread.join(60.0)
        assert len(responses) == len(batch), f"no end after {time.monotonic() - start:.0f} s"
        aborted = [response for response in responses if response.finish_reason == "abort"]
        assert aborted
        check_logprobs(model.hf_path, batch, responses)
        for response in responses:
            length = len(response.token_ids)
            assert [(span.start, span.end) for span in response.version_spans] == ([(0, length)] if length else [])
        again = engine.generate(batch[:4], replace(model.sampling, max_response_tokens=3))
        assert {response.finish_reason for response in again} <= {"stop", "length"}

    def test_updated_weights_are_used_and_named_by_their_version(
        self, engine: RolloutEngine, model: EngineModel
    ) -> None:
        batch = requests(model, 8)
        greedy = replace(model.sampling, temperature=0.0)
        before = engine.generate(batch, greedy)
        engine.update_weights(source_tensors(model.other).items, version=12)
        responses = engine.generate(batch, model.sampling)
        check_logprobs(model.other, batch, responses)
        assert all(r.version_spans == (VersionSpan(12, 0, len(r.token_ids)),) for r in responses)
        engine.update_weights(source_tensors(model.hf_path).items, version=13)
        after = engine.generate(batch, greedy)
        assert [r.token_ids.tolist() for r in before] == [r.token_ids.tolist() for r in after]
        assert all(r.version_spans[0].version == 13 for r in after)
