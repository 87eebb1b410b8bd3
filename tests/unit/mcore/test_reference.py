"""Calibration, resets and the reference: the identities that hold exactly, and how far others hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from reval_mcore.architecture import read_spec
from reval_mcore.config import ObjectiveConfig
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.loss_head import token_scores
from reval_mcore.mcore.model import build_model, forward_logits
from reval_mcore.mcore.packing import pack
from reval_mcore.objectives import make_objective, make_targets, shape_rewards
from reval_mcore.records import Batch, Scores
from tests.builders import (
    FROZEN,
    dense_batch_scores,
    learner_weights,
    make_batch,
    make_config,
    same_tensors,
    score_gap,
    scored,
    take,
    train,
    update,
    with_reference,
)

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology

# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_the_reference_without_reward_an_update_is_exactly_nothing(
    precision: str, hf_path: Path, topology: Topology
) -> None:
    """Residuals, loss and gradient norm are 0.0, and Adam's step on them leaves every weight bit for bit."""
    config = make_config(hf_path, model={"precision": precision}, reward={"truncation": "bootstrap"})
    learner = Learner(config, topology)
    batch = replace(make_batch(16, unjudged=True), reward=np.zeros(16, np.float32))
    batch = scored(learner, batch)
    before = learner_weights(learner)
    for _ in range(2):
        stats = update(learner, batch, config)
        np.testing.assert_array_equal(stats.residual, np.zeros(16))
        assert stats.metrics["loss"] == stats.metrics["grad_norm"] == 0.0
        assert not stats.skipped
    assert same_tensors(learner_weights(learner), before)


def test_weight_decay_would_drift_at_the_reference(untied: Path, topology: Topology) -> None:
    config = make_config(untied, optimizer={"weight_decay": 0.1})
    learner = Learner(config, topology)
    batch = scored(learner, replace(make_batch(8), reward=np.zeros(8, np.float32)))
    before = learner_weights(learner)
    update(learner, batch, config)
    assert not same_tensors(learner_weights(learner), before)


def test_across_packings_fp32_residuals_at_the_reference_are_at_rounding_level(
    untied: Path, topology: Topology
) -> None:
    batch = replace(make_batch(16), reward=np.zeros(16, np.float32))
    wide = make_config(untied, updates={"max_tokens_per_micro_batch": 2000}, optimizer=FROZEN)
    narrow = make_config(untied, updates={"max_tokens_per_micro_batch": 80}, optimizer=FROZEN)
    stored = scored(Learner(wide, topology), batch)
    stats = update(Learner(narrow, topology), stored, narrow)
    assert np.abs(stats.residual).max() < 5e-5


def test_across_packings_fp64_residuals_at_the_reference_vanish(hf_path: Path, topology: Topology) -> None:
    """And TBRM's do not: it lacks V_ref(s_1)."""
    spec = read_spec(hf_path)
    model = build_model(make_config(hf_path).model, spec, topology).double()
    batch = replace(make_batch(16, unjudged=True), reward=np.zeros(16, np.float32))
    config = make_config(hf_path, reward={"truncation": "bootstrap"})

    def per_trajectory(batch: Batch, max_tokens: int, compute: Callable[..., torch.Tensor]) -> np.ndarray:
        """Float64 [B, columns], with `compute(token scores, members)` on each micro-batch."""
        found: dict[int, np.ndarray] = {}
        for micro_batch in pack(batch, max_tokens=max_tokens, device=topology.device):
            logits = forward_logits(model, micro_batch)[0]
            assert logits.dtype == torch.float64
            tokens = token_scores(logits, micro_batch, tp_group=topology.groups.tp, num_valid=spec.vocab_size)
            values = compute(tokens, micro_batch.members).detach().cpu().numpy()
            found.update(zip(micro_batch.members.tolist(), values, strict=True))
        return np.array([found[row] for row in range(len(batch))])

    columns = per_trajectory(
        batch, 2000, lambda t, _: torch.stack([t.trajectory_score(), t.initial_value, t.final_value], -1)
    )
    stored = with_reference(batch, Scores(*columns.T.copy(), logprobs=np.zeros(0, np.float32)))
    assert score_gap(Scores(*columns.T.copy(), logprobs=np.zeros(1)), _no_logprobs(hf_path, batch)) < 1e-5

    def residuals(name: Any, max_tokens: int) -> np.ndarray:
        objective = make_objective(ObjectiveConfig(name=name, beta=0.01))

        def compute(tokens: Any, members: np.ndarray) -> torch.Tensor:
            targets = make_targets(take(stored, members.tolist()), config.reward)
            on_device = {key: getattr(targets, key).to(topology.device) for key in targets.__dataclass_fields__}
            return objective(tokens, replace(targets, **on_device), lambda value: value).residual

        return per_trajectory(stored, max_tokens, compute)

    assert np.abs(residuals("reval", 80)).max() < 1e-10
    np.testing.assert_array_equal(residuals("reval", 2000), np.zeros(16))
    missing = stored.reference.initial_value - np.where(batch.has_verdict, 0.0, stored.reference.final_value)
    np.testing.assert_allclose(residuals("tbrm", 80), missing, atol=1e-10)
    assert np.abs(missing[batch.has_verdict]).min() > 1.0


def _no_logprobs(directory: Path, batch: Batch) -> Scores:
    return replace(dense_batch_scores(directory, batch), logprobs=np.zeros(1))


def test_tbrm_is_not_calibrated_at_the_reference(untied: Path, topology: Topology) -> None:
    config = make_config(untied, objective={"name": "tbrm"}, optimizer=FROZEN)
    learner = Learner(config, topology)
    batch = scored(learner, replace(make_batch(8), reward=np.zeros(8, np.float32)))
    stats = update(learner, batch, config)
    np.testing.assert_allclose(stats.residual, batch.reference.initial_value, rtol=1e-12)
    assert stats.metrics["grad_norm"] > 0.1


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shaping", ["raw", "group_centered"])
def test_right_after_a_reset_every_residual_is_minus_reward_over_beta(
    shaping: str, precision: str, hf_path: Path, topology: Topology
) -> None:
    config = make_config(hf_path, model={"precision": precision}, reward={"shaping": shaping})
    learner = Learner(config, topology)
    train(learner, config, 3)
    learner.reset_reference(3)
    assert learner.reference_version == 3
    batch = scored(learner, make_batch(20, seed=1))
    stats = update(learner, batch, config)
    np.testing.assert_array_equal(stats.residual, -shape_rewards(batch, config.reward) / config.objective.beta)
    assert np.abs(stats.residual).max() > 0.1


def test_a_lazy_refresh_after_the_reset_gives_the_same_reference_scores(untied: Path, topology: Topology) -> None:
    """Scored with the copy, some updates later, as with the policy at the reset."""
    config = make_config(untied)
    learner = Learner(config, topology)
    batch = make_batch(16)
    train(learner, config, 2)
    learner.reset_reference(2)
    eager = learner.score_reference(batch)
    train(learner, config, 2, seed=80)
    assert score_gap(learner.score_reference(batch), eager) == 0.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reference_scores_are_reproduced_bit_for_bit_after_updates(
    precision: str, hf_path: Path, topology: Topology
) -> None:
    config = make_config(hf_path, model={"precision": precision})
    learner = Learner(config, topology)
    batch = make_batch(20)
    stored = learner.score_reference(batch)
    train(learner, config, 4)
    policy, weights = learner.score(batch), learner_weights(learner)
    pointers = [parameter.data_ptr() for parameter in learner.model.parameters()]

    assert score_gap(learner.score_reference(batch), stored) == 0.0
    assert same_tensors(learner_weights(learner), weights)  # the policy is back ...
    assert score_gap(learner.score(batch), policy) == 0.0
    assert score_gap(policy, stored) > 1e-2  # ... and had moved
    assert [parameter.data_ptr() for parameter in learner.model.parameters()] == pointers


def test_scoring_the_reference_leaves_later_updates_as_they_were(untied: Path, topology: Topology) -> None:
    """The swap writes into the optimizer's buffers; two learners, one of which swaps, stay bit for bit equal."""
    config = make_config(untied)
    learners = [Learner(config, topology) for _ in range(2)]
    batch = scored(learners[0], make_batch(12))
    for number in range(4):
        for learner in learners:
            update(learner, batch, config)
        learners[0].score_reference(make_batch(6, seed=number))
    assert same_tensors(learner_weights(learners[0]), learner_weights(learners[1]))


def test_an_error_while_the_reference_is_in_place_brings_the_policy_back(untied: Path, topology: Topology) -> None:
    config = make_config(untied)
    learner = Learner(config, topology)
    train(learner, config, 1)
    weights = learner_weights(learner)
    too_long = make_batch(2, max_prompt=300, max_response=300, seed=2)
    with pytest.raises(AssertionError):
        learner.score_reference(too_long)
    assert same_tensors(learner_weights(learner), weights)


def test_reference_scores_of_another_version_are_an_error(untied: Path, topology: Topology) -> None:
    config = make_config(untied)
    learner = Learner(config, topology)
    batch = scored(learner, make_batch(4))
    learner.reset_reference(1)
    with pytest.raises(AssertionError, match="another reference"):
        update(learner, batch, config)
    with pytest.raises(AssertionError, match="another reference"):
        update(learner, make_batch(4), config)
