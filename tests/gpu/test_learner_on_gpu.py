"""The same learner on a GPU, with megatron-core's local layers: nothing but torch, transformers and megatron-core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.builders import (
    dense_scores,
    exported,
    hf_logits,
    learner_weights,
    load_hf,
    make_batch,
    make_config,
    same_tensors,
    save_qwen2,
    scored,
    sequences,
    source_tensors,
    update,
)
from tests.distributed.launch import run_distributed
from tests.forks import Forks

if TYPE_CHECKING:
    from reval_mcore.config import Config
    from reval_mcore.mcore.learner import Learner
    from reval_mcore.mcore.topology import Topology
    from reval_mcore.records import Scores

pytestmark = pytest.mark.gpu

# fp64 sums on a GPU are taken in no fixed order; per-token numbers are, bit for bit
SUM_NOISE = 1e-9


@pytest.fixture(params=["untied", "tied"])
def hf_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_qwen2(tmp_path / "model", tie_word_embeddings=request.param == "tied")


def make_learner(config: Config, topology: Topology) -> Learner:
    from reval_mcore.mcore.learner import Learner

    assert topology.device.type == "cuda"
    return Learner(config, topology)


def assert_same_scores(found: Scores, expected: Scores) -> None:
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    np.testing.assert_array_equal(found.initial_value, expected.initial_value)
    np.testing.assert_array_equal(found.final_value, expected.final_value)
    np.testing.assert_allclose(found.trajectory_score, expected.trajectory_score, rtol=0.0, atol=SUM_NOISE)


def test_the_shim_is_off(topology: Topology) -> None:
    from reval_mcore.mcore import cpu_shim

    assert cpu_shim.install() is False
    assert topology.device.type == "cuda"


def test_scores_equal_those_of_the_cpu(forks: Forks, hf_path: Path, topology: Topology, tmp_path: Path) -> None:
    arguments = {"hf_path": str(hf_path), "out": str(tmp_path / "cpu.npz")}
    run_distributed(forks, "tests.gpu.cpu_scores:score", 1, 180.0, arguments)
    cpu = np.load(tmp_path / "cpu.npz")
    gpu = make_learner(make_config(hf_path), topology).score(make_batch(20))
    for name in ("trajectory_score", "initial_value", "final_value", "logprobs"):
        np.testing.assert_allclose(getattr(gpu, name), cpu[name], rtol=0.0, atol=1e-4, err_msg=name)


def test_logits_equal_transformers_on_the_cpu(hf_path: Path, topology: Topology) -> None:
    from reval_mcore.mcore.model import forward_logits
    from reval_mcore.mcore.packing import build_micro_batch

    learner = make_learner(make_config(hf_path), topology)
    batch = make_batch(6, max_prompt=30, max_response=60)
    with torch.no_grad():
        logits = forward_logits(learner.model, build_micro_batch(batch, np.arange(6), topology.device))[0]
        expected = torch.cat(hf_logits(load_hf(hf_path), batch))
    assert logits.device.type == "cuda"
    assert float((logits[:, : learner.spec.vocab_size].cpu() - expected).abs().max()) < 1e-4
    assert same_tensors(exported(learner), source_tensors(hf_path))


def test_scores_equal_transformers_in_fp64(hf_path: Path, topology: Topology) -> None:
    batch = make_batch(12)
    scores = make_learner(make_config(hf_path), topology).score(batch)
    with torch.no_grad():
        logits = hf_logits(load_hf(hf_path, torch.float64), batch)
    for row, (z, sequence) in enumerate(zip(logits, sequences(batch), strict=True)):
        dense = dense_scores(z, *sequence)
        assert abs(scores.trajectory_score[row] - float(dense.trajectory_score)) < 2e-4
        assert abs(scores.initial_value[row] - float(dense.initial_value)) < 1e-4
        assert abs(scores.final_value[row] - float(dense.final_value)) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_reduce_the_loss(precision: str, hf_path: Path, topology: Topology) -> None:
    config = make_config(hf_path, model={"precision": precision}, optimizer={"lr": 3e-4})
    learner = make_learner(config, topology)
    batch = scored(learner, make_batch(12))
    losses = [update(learner, batch, config).metrics["loss"] for _ in range(25)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_swap_is_exact(precision: str, hf_path: Path, topology: Topology) -> None:
    config = make_config(hf_path, model={"precision": precision})
    learner = make_learner(config, topology)
    batch = make_batch(20)
    stored = learner.score_reference(batch)
    for seed in range(3):
        update(learner, scored(learner, make_batch(8, seed=seed)), config)
    policy, weights = learner.score(batch), learner_weights(learner)
    assert_same_scores(learner.score_reference(batch), stored)
    assert same_tensors(learner_weights(learner), weights)
    assert_same_scores(learner.score(batch), policy)
    assert float(np.abs(policy.logprobs - stored.logprobs).max()) > 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calibration_and_reset_identity(precision: str, hf_path: Path, topology: Topology) -> None:
    config = make_config(hf_path, model={"precision": precision})
    learner = make_learner(config, topology)
    plain = scored(learner, replace(make_batch(16), reward=np.zeros(16, np.float32)))
    assert np.abs(update(learner, plain, config).residual).max() < SUM_NOISE
    for seed in range(2):
        update(learner, scored(learner, make_batch(8, seed=seed)), config)
    learner.reset_reference(1)
    batch = scored(learner, make_batch(16, seed=9))
    expected = -batch.reward.astype(np.float64) / config.objective.beta
    np.testing.assert_allclose(update(learner, batch, config).residual, expected, rtol=0.0, atol=SUM_NOISE)


def test_updates_continue_after_save_and_load(hf_path: Path, topology: Topology, tmp_path: Path) -> None:
    """Not bit for bit: torch's embedding gradient is summed in no fixed order on a GPU."""
    config = make_config(hf_path, optimizer={"lr": 1e-4, "eps": 1e-3})
    learner = make_learner(config, topology)
    for seed in range(2):
        update(learner, scored(learner, make_batch(8, seed=seed)), config)
    written = tmp_path / "checkpoint"
    written.mkdir()
    learner.save(written).finish()
    resumed = make_learner(config, topology)
    resumed.load(written)
    assert same_tensors(learner_weights(resumed), learner_weights(learner))
    assert resumed.num_updates == 2
    for each in (learner, resumed):
        update(each, scored(each, make_batch(8, seed=5)), config)
    left, right = exported(resumed), exported(learner)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-6


@pytest.mark.te
def test_a_transformer_engine_model_exports_the_source_bit_for_bit(hf_path: Path, topology: Topology) -> None:
    """Its norms live inside the linear layers, under other names."""
    learner = make_learner(make_config(hf_path, model={"implementation": "te"}), topology)
    assert same_tensors(exported(learner), source_tensors(hf_path))
