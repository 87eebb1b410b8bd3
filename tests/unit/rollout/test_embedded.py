"""The embedded engine keeps the contract of all engines, and promises of its own: what it draws can be drawn again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reval_mcore.rollout.embedded import EmbeddedEngine
from reval_mcore.rollout.engine import RolloutEngine, SamplingParams
from tests.builders import VOCABULARY, save_qwen2, source_tensors
from tests.rollout_contract import EngineContract, EngineModel, requests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EngineModel:
    return EngineModel(
        hf_path=save_qwen2(tmp_path_factory.mktemp("qwen2"), tie_word_embeddings=True),
        other=save_qwen2(tmp_path_factory.mktemp("other"), seed=1, tie_word_embeddings=True),
        vocabulary=VOCABULARY,
        sampling=SamplingParams(max_response_tokens=12, stop_token_ids=(7, 8)),
    )


@pytest.fixture
def engine(model: EngineModel) -> Iterator[RolloutEngine]:
    engine = EmbeddedEngine(model.hf_path, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=8)
    yield engine
    engine.close()


class TestEmbedded(EngineContract):
    pass


def test_a_response_does_not_depend_on_its_neighbours(engine: RolloutEngine, model: EngineModel) -> None:
    batch = requests(model, 20)
    together = engine.generate(batch, model.sampling)
    alone = [engine.generate([request], model.sampling)[0] for request in batch]
    backwards = engine.generate(batch[::-1], model.sampling)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()


def test_another_stream_gives_another_response(engine: RolloutEngine, model: EngineModel) -> None:
    first = engine.generate(requests(model, 20), model.sampling)
    second = engine.generate(requests(model, 20, iteration=1), model.sampling)
    assert sum(a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(first, second, strict=True)) <= 2


def test_an_incomplete_or_unknown_update_is_refused(engine: RolloutEngine, model: EngineModel) -> None:
    tensors = source_tensors(model.hf_path)
    with pytest.raises(ValueError, match="unknown tensor nonsense"):
        engine.update_weights(lambda: [("nonsense", torch.zeros(1))], version=1)
    tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"1 tensors missing, model\.norm\.weight"):
        engine.update_weights(tensors.items, version=1)
