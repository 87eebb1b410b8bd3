"""What every rollout engine promises, shown on the embedded one. transformers' own forward pass is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reval_mcore.randomness import stream_key
from reval_mcore.records import VersionSpan
from reval_mcore.rollout.embedded import EmbeddedEngine
from reval_mcore.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from tests.builders import VOCABULARY, load_hf, save_qwen2, source_tensors

STOP = 7
SAMPLING = SamplingParams(max_response_tokens=12, stop_token_ids=(STOP,))


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("qwen2"), tie_word_embeddings=True)


@pytest.fixture
def engine(hf_path: Path) -> Iterator[RolloutEngine]:
    engine = EmbeddedEngine(hf_path, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=8)
    yield engine
    engine.close()


def requests(number: int, *, iteration: int = 0) -> list[GenerationRequest]:
    """Prompts of lengths 1 to 9, each with a random stream of its own."""
    rng = np.random.default_rng(1)
    prompts = [tuple(rng.integers(0, VOCABULARY, 1 + i % 9).tolist()) for i in range(number)]
    return [GenerationRequest(p, stream_key(0, "rollout", iteration, i)) for i, p in enumerate(prompts)]


def dense_logprobs(hf_path: Path, request: GenerationRequest, response: np.ndarray) -> np.ndarray:
    """fp64 log-softmax of one whole sequence, at temperature 1."""
    tokens = torch.tensor([*request.token_ids, *response.tolist()])
    with torch.no_grad():
        logprobs = load_hf(hf_path)(tokens[None]).logits[0].double().log_softmax(-1)
    first = len(request.token_ids) - 1
    return logprobs[first:-1].gather(-1, tokens[first + 1 :, None])[:, 0].numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, temperature=0.7),
        replace(SAMPLING, top_p=0.8, top_k=20),
        replace(SAMPLING, temperature=0.0),
    ],
    ids=["plain", "tempered", "truncated", "greedy"],
)
def test_logprobs_are_those_of_the_sampled_tokens_at_temperature_1(
    engine: RolloutEngine, hf_path: Path, sampling: SamplingParams
) -> None:
    batch = requests(20)
    for request, response in zip(batch, engine.generate(batch, sampling), strict=True):
        expected = dense_logprobs(hf_path, request, response.token_ids)
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)
        assert response.logprobs.dtype == np.float32
        assert response.token_ids.dtype == np.int32


def test_responses_end_at_the_stop_token_or_at_the_limit(engine: RolloutEngine) -> None:
    reasons = set()
    for response in engine.generate(requests(200), SAMPLING):
        tokens = response.token_ids.tolist()
        reasons.add(response.finish_reason)
        assert (STOP in tokens) == (response.finish_reason == "stop")
        assert STOP not in tokens[:-1]
        assert len(tokens) == SAMPLING.max_response_tokens or response.finish_reason == "stop"
        assert response.version_spans == (VersionSpan(0, 0, len(tokens)),)
    assert reasons == {"stop", "length"}


def test_a_response_does_not_depend_on_its_neighbours(engine: RolloutEngine) -> None:
    batch = requests(20)
    together = engine.generate(batch, SAMPLING)
    alone = [engine.generate([request], SAMPLING)[0] for request in batch]
    backwards = engine.generate(batch[::-1], SAMPLING)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()


def test_another_stream_gives_another_response(engine: RolloutEngine) -> None:
    first, second = engine.generate(requests(20), SAMPLING), engine.generate(requests(20, iteration=1), SAMPLING)
    assert sum(a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(first, second, strict=True)) <= 2


def test_samples_follow_the_policy(engine: RolloutEngine, hf_path: Path) -> None:
    """Chi-square of the first token against transformers' softmax, tempered and cut by top-k and top-p alike."""
    prompt, number = (3, 14, 15), 4000
    with torch.no_grad():
        logits = load_hf(hf_path)(torch.tensor([prompt])).logits[0, -1].double() / 0.8
    logits[logits < logits.topk(30).values[-1]] = -torch.inf
    probabilities = logits.softmax(-1)
    ranked, order = probabilities.sort(descending=True)
    kept = order[ranked.cumsum(0) - ranked < 0.9]
    expected = torch.zeros_like(probabilities).scatter(0, kept, probabilities[kept] / probabilities[kept].sum())
    sampling = SamplingParams(1, (STOP,), temperature=0.8, top_p=0.9, top_k=30)
    batch = [GenerationRequest(prompt, stream_key(5, "rollout", i)) for i in range(number)]
    counts = np.bincount([r.token_ids[0] for r in engine.generate(batch, sampling)], minlength=VOCABULARY)
    possible = expected.numpy() > 0
    assert counts[~possible].sum() == 0
    mean = expected.numpy()[possible] * number
    chi_square = float(((counts[possible] - mean) ** 2 / mean).sum())
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_greedy_is_the_argmax_of_transformers(engine: RolloutEngine, hf_path: Path) -> None:
    model = load_hf(hf_path)
    batch = requests(10)
    for request, response in zip(batch, engine.generate(batch, replace(SAMPLING, temperature=0.0)), strict=True):
        tokens = list(request.token_ids)
        for token in response.token_ids.tolist():
            with torch.no_grad():
                assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)


def test_updated_weights_are_used_and_named_by_their_version(
    engine: RolloutEngine, hf_path: Path, tmp_path: Path
) -> None:
    other = save_qwen2(tmp_path, seed=1, tie_word_embeddings=True)
    batch = requests(8)
    before = engine.generate(batch, SAMPLING)
    engine.update_weights(source_tensors(other).items(), version=12)
    for request, response in zip(batch, engine.generate(batch, SAMPLING), strict=True):
        np.testing.assert_allclose(response.logprobs, dense_logprobs(other, request, response.token_ids), atol=1e-4)
        assert response.version_spans[0].version == 12
    engine.update_weights(source_tensors(hf_path).items(), version=13)
    after = engine.generate(batch, SAMPLING)
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(before, after, strict=True))


def test_an_incomplete_or_unknown_update_is_refused(engine: RolloutEngine, hf_path: Path) -> None:
    tensors = source_tensors(hf_path)
    with pytest.raises(ValueError, match="unknown tensor nonsense"):
        engine.update_weights([("nonsense", torch.zeros(1))], version=1)
    tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"1 tensors missing, model\.norm\.weight"):
        engine.update_weights(tensors.items(), version=1)
