"""The engine on a real SGLang server keeps the contract of all engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reval_mcore.architecture import read_spec
from reval_mcore.records import VersionSpan
from reval_mcore.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_sync import DiskSync
from tests.builders import save_like, source_tensors
from tests.rollout_contract import EngineContract, EngineModel, check_logprobs, requests
from tests.sglang.conftest import Servers
from tests.sglang.servers import API_KEY

END_TOKEN = 2  # of the model that the server was started with


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineModel:
    """Random weights in the shape of the demo's model, which the servers were started with."""
    return EngineModel(
        hf_path=save_like(tiny_model, tmp_path_factory.mktemp("model"), seed=0),
        other=save_like(tiny_model, tmp_path_factory.mktemp("other"), seed=1),
        vocabulary=read_spec(tiny_model).vocab_size,
        sampling=SamplingParams(max_response_tokens=12, stop_token_ids=tuple(range(7, 27))),
        num_draws=300,  # a request each
    )


@pytest.fixture
def engine(model: EngineModel, servers: Servers, tmp_path: Path) -> Iterator[RolloutEngine]:
    sync = DiskSync(tmp_path / "weights", companions=model.hf_path, timeout_s=60.0)
    engine = SGLangEngine(servers(1), sync, vocab_size=model.vocabulary, api_key=API_KEY)
    engine.update_weights(source_tensors(model.hf_path).items, version=0)
    yield engine
    engine.close()


class TestSGLang(EngineContract):
    pass


def test_the_models_own_end_token_ends_nothing_unless_it_is_a_stop_token(
    engine: RolloutEngine, model: EngineModel
) -> None:
    """SGLang stops there whatever it is told, so the engine has it go on."""
    sampling = SamplingParams(max_response_tokens=60, stop_token_ids=(7,))
    batch = requests(model, 32)
    responses = engine.generate(batch, sampling)
    check_logprobs(model.hf_path, batch, responses)
    assert any(END_TOKEN in response.token_ids[:-1] for response in responses)
    for response in responses:
        assert len(response.token_ids) == 60 or response.token_ids[-1] == 7
        assert response.version_spans == (VersionSpan(0, 0, len(response.token_ids)),)


def test_an_id_that_would_kill_the_server_is_refused(engine: RolloutEngine, model: EngineModel) -> None:
    wrong = GenerationRequest((3, model.vocabulary), 0)
    with pytest.raises(ValueError, match=f"token id {model.vocabulary} in a prompt"):
        engine.generate([wrong], model.sampling)
