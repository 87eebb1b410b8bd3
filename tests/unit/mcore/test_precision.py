"""The precision policy: bf16 weights with fp32 masters and fp32 gradient buffers; logits onward fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.loss_head import token_scores
from reval_mcore.mcore.model import forward_logits, wrap_precision
from reval_mcore.mcore.packing import pack
from reval_mcore.objectives import make_objective, make_targets
from tests.builders import learner_weights, main_gradient, make_batch, make_config, same_tensors, with_reference

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology


def master_weights(learner: Learner) -> torch.Tensor:
    """What Adam steps on, flat."""
    groups = learner._optimizer._optimizer.param_groups
    return torch.cat([parameter.detach().flatten() for group in groups for parameter in group["params"]])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dtypes_of_weights_masters_gradients_and_logits(precision: str, untied: Path, topology: Topology) -> None:
    learner = Learner(make_config(untied, model={"precision": precision}), topology)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {parameter.dtype for parameter in learner.model.parameters()} == {dtype}
    assert {tensor.dtype for _, tensor in learner.export_weights()} == {dtype}
    assert master_weights(learner).dtype == torch.float32
    assert {main_gradient(parameter).dtype for parameter in learner.model.parameters()} == {torch.float32}
    micro_batch = pack(make_batch(4), max_tokens=100, device=topology.device)[0]
    logits = forward_logits(wrap_precision(learner.model), micro_batch)[0]
    assert logits.dtype == torch.float32
    scores = token_scores(logits, micro_batch, tp_group=topology.groups.tp, num_valid=learner.spec.vocab_size)
    assert {scores.logprob.dtype, scores.first_logit.dtype, scores.initial_value.dtype} == {torch.float32}
    assert scores.trajectory_score().dtype == torch.float64


def test_a_bf16_learner_reduces_the_loss(hf_path: Path, topology: Topology) -> None:
    config = make_config(hf_path, model={"precision": "bf16"}, optimizer={"lr": 3e-4})
    learner = Learner(config, topology)
    batch = make_batch(12)
    batch = with_reference(batch, learner.score_reference(batch))
    targets, objective = make_targets(batch, config.reward), make_objective(config.objective)
    losses = [learner.update(batch, targets, objective).metrics["loss"] for _ in range(16)]
    assert losses[-1] < 0.2 * losses[0]


def test_updates_too_small_for_bf16_gather_in_the_master_weights(untied: Path, topology: Topology) -> None:
    """One update moves every trained master weight and few bf16 weights; many updates move those too."""
    # weights of about 0.25 are 1e-3 apart in bf16; a step of 5e-5 is lost there
    config = make_config(untied, model={"precision": "bf16"}, optimizer={"lr": 5e-5}, run={"num_iterations": 100})
    learner = Learner(config, topology)
    batch = make_batch(12)
    batch = with_reference(batch, learner.score_reference(batch))
    targets, objective = make_targets(batch, config.reward), make_objective(config.objective)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    weights, masters = learner_weights(learner), master_weights(learner)

    learner.update(batch, targets, objective)
    moved_at_once = float((learner_weights(learner)[name] != weights[name]).float().mean())
    assert float((master_weights(learner) != masters).float().mean()) > 0.8  # some rows of the vocabulary never occur
    assert moved_at_once < 0.2

    for _ in range(25):
        learner.update(batch, targets, objective)
    assert float((learner_weights(learner)[name] != weights[name]).float().mean()) > 0.5


def test_bf16_weights_are_the_masters_rounded(untied: Path, topology: Topology) -> None:
    config = make_config(untied, model={"precision": "bf16"})
    learner = Learner(config, topology)
    batch = make_batch(8)
    batch = with_reference(batch, learner.score_reference(batch))
    before = learner_weights(learner)
    for _ in range(3):
        learner.update(batch, make_targets(batch, config.reward), make_objective(config.objective))
    rounded = master_weights(learner).bfloat16().float().cpu().sort().values
    weights = torch.cat([value.float().flatten().cpu() for value in learner_weights(learner).values()]).sort().values
    np.testing.assert_array_equal(rounded.numpy(), weights.numpy())
    assert not same_tensors(before, learner_weights(learner))
