"""The update step against torch's own clipping and AdamW, schedules, skipped updates, and exact resume."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from reval_mcore.config import Config
from reval_mcore.mcore import passes
from reval_mcore.mcore.learner import Learner
from reval_mcore.objectives import make_objective
from reval_mcore.records import Batch, Objective, ObjectiveOutput
from tests.builders import (
    FROZEN,
    exported,
    learner_gradients,
    learner_weights,
    make_batch,
    make_config,
    max_difference,
    same_tensors,
    scored,
    source_tensors,
    update,
)

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology


def gradients_now(learner: Learner, batch: Batch, topology: Topology, hf_path: Path) -> dict[str, torch.Tensor]:
    """Gradients of the batch at the weights of `hf_path`, by a learner that does not step."""
    frozen = make_config(hf_path, optimizer=FROZEN)
    twin = Learner(frozen, topology)
    update(twin, batch, frozen)
    return learner_gradients(twin)


def adamw(
    weights: Mapping[str, torch.Tensor], gradients: list[dict[str, torch.Tensor]], config: Config
) -> dict[str, torch.Tensor]:
    """torch's clipping and AdamW on fp64 copies, fused parameters or not."""
    settings = config.optimizer
    parameters = {name: torch.nn.Parameter(value.double().clone()) for name, value in weights.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].double().clone()
        if settings.clip_grad > 0.0:
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_grad)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


# ---------------------------------------------------------------- clipping


# a large epsilon makes Adam's step proportional to the gradient, so that its scale can be seen
@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 1e9])
def test_a_clipped_update_moves_the_weights_as_torch_does_with_scaled_gradients(
    clip_grad: float, hf_path: Path, topology: Topology
) -> None:
    config = make_config(hf_path, optimizer={"lr": 0.1, "eps": 1.0, "clip_grad": clip_grad})
    learner = Learner(config, topology)
    batch = scored(learner, make_batch(8, seed=0))
    gradients = gradients_now(learner, batch, topology, hf_path)
    norm = float(torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm())
    stats = update(learner, batch, config)

    assert norm > 1.0
    assert stats.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert stats.metrics["clipped_grad_norm"] == pytest.approx(min(norm, clip_grad or math.inf), rel=1e-5)
    source = source_tensors(hf_path)
    expected = adamw(source, [gradients], config)
    assert max_difference(exported(learner), expected) < 1e-6
    assert max_difference(expected, source) > 1e-3


def test_clipping_is_what_makes_the_difference(untied: Path, topology: Topology) -> None:
    weights = []
    for clip_grad in (0.0, 0.5):
        config = make_config(untied, optimizer={"lr": 0.1, "eps": 1.0, "clip_grad": clip_grad})
        learner = Learner(config, topology)
        update(learner, scored(learner, make_batch(8, seed=0)), config)
        weights.append(exported(learner))
    assert max_difference(*weights) > 1e-3


def test_several_updates_with_weight_decay_equal_torch_adamw(untied: Path, topology: Topology) -> None:
    """Decay off by default; where it is on, it is AdamW's, on matrices and not on norms and biases."""
    settings = {"lr": 1e-2, "eps": 1e-3, "clip_grad": 0.0, "weight_decay": 0.1}
    config = make_config(untied, optimizer=settings)
    learner = Learner(config, topology)
    batch = scored(learner, make_batch(8, seed=0))
    gradients = []
    for _ in range(3):
        update(learner, batch, config)
        gradients.append(learner_gradients(learner))
    source = source_tensors(untied)
    matrices = {name for name, value in source.items() if value.ndim == 2}
    found = exported(learner)
    decayed = adamw(source, gradients, config)
    plain = adamw(
        source,
        gradients,
        config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"weight_decay": 0.0})}),
    )
    for name, value in found.items():
        expected = decayed if name in matrices else plain
        assert float((value.double() - expected[name]).abs().max()) < 2e-6, name


# ---------------------------------------------------------------- gradients that are not finite


def poisoned(objective: Objective, value: float) -> Objective:
    """The same objective, one trajectory's loss times inf or nan."""

    def run(scores: Any, targets: Any, reduce: Any) -> ObjectiveOutput:
        output = objective(scores, targets, reduce)
        factor = torch.ones_like(output.loss)
        factor[0] = value
        return replace(output, loss=output.loss * factor)

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(
    value: float, precision: str, untied: Path, topology: Topology
) -> None:
    """Two learners, one of which is poisoned between updates, stay bit for bit equal afterwards."""
    config = make_config(untied, model={"precision": precision})
    hurt, spared = Learner(config, topology), Learner(config, topology)
    batch = scored(hurt, make_batch(8, seed=0))
    for learner in (hurt, spared):
        update(learner, batch, config)
    before = learner_weights(hurt)

    stats = update(hurt, batch, config, poisoned(make_objective(config.objective), value))
    assert stats.skipped
    assert not math.isfinite(stats.metrics["grad_norm"])
    assert same_tensors(learner_weights(hurt), before)
    assert hurt.num_updates == 1
    assert hurt._optimizer.adam_steps() == {1}

    for learner in (hurt, spared):
        assert not update(learner, batch, config).skipped
    assert same_tensors(learner_weights(hurt), learner_weights(spared))
    assert hurt.num_updates == spared.num_updates == 2
    assert hurt._optimizer.adam_steps() == {2}


def test_a_skipped_first_update_leaves_policy_and_reference_the_same(untied: Path, topology: Topology) -> None:
    config = make_config(untied)
    learner = Learner(config, topology)
    batch = scored(learner, make_batch(8, seed=0))
    assert update(learner, batch, config, poisoned(make_objective(config.objective), math.nan)).skipped
    again = scored(learner, make_batch(8, seed=0))
    np.testing.assert_array_equal(again.reference.trajectory_score, batch.reference.trajectory_score)


def test_an_update_without_a_trajectory_in_the_loss_takes_no_step(untied: Path, topology: Topology) -> None:
    """Else Adam's momentum would move the weights on a batch that says nothing."""
    config = make_config(untied)
    learner = Learner(config, topology)
    batch = scored(learner, make_batch(8, seed=0))
    update(learner, batch, config)
    before = learner_weights(learner)
    masked = replace(batch, has_verdict=np.zeros(len(batch), bool))
    stats = update(learner, masked, config)
    assert stats.skipped
    assert stats.metrics["masked_fraction"] == 1.0
    assert same_tensors(learner_weights(learner), before)
    assert learner._optimizer.adam_steps() == {1}


# ---------------------------------------------------------------- learning rates


def rate(number: int, *, lr: float, min_lr: float, warmup: int, total: int, schedule: str) -> float:
    """Of update `number`, from 1: linear from 0 to lr, then from lr to min_lr at the last update."""
    if warmup and number <= warmup:
        return lr * number / warmup
    done = (number - warmup) / (total - warmup)
    falling = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
    return min_lr + (lr - min_lr) * falling


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_nth_update_is_taken_with_the_nth_rate(
    schedule: str, warmup: int, untied: Path, topology: Topology
) -> None:
    """Without momentum Adam's step is the rate itself wherever the gradient is not tiny, so the weights show it."""
    optimizer = {
        "lr": 1e-2,
        "min_lr": 1e-3,
        "schedule": schedule,
        "warmup_updates": warmup,
        "betas": [0.0, 0.0],
        "eps": 1e-12,
    }
    config = make_config(untied, run={"num_iterations": 4}, updates={"per_iteration": 2}, optimizer=optimizer)
    learner = Learner(config, topology)
    batch = scored(learner, make_batch(8, seed=0))
    for number in range(1, 9):
        expected = rate(number, lr=1e-2, min_lr=1e-3, warmup=warmup, total=8, schedule=schedule)
        before = learner_weights(learner)
        stats = update(learner, batch, config)
        assert stats.metrics["learning_rate"] == pytest.approx(expected, rel=1e-12)
        step = (
            learner_weights(learner)["decoder.final_layernorm.weight"] - before["decoder.final_layernorm.weight"]
        ).abs()
        np.testing.assert_allclose(step.cpu().numpy(), expected, rtol=1e-3)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(("model", "precision"), [("untied", "fp32"), ("tied", "bf16")])
def test_updates_after_save_and_load_into_fresh_objects_continue_bit_for_bit(
    model: str, precision: str, request: pytest.FixtureRequest, topology: Topology, tmp_path: Path
) -> None:
    config = make_config(
        request.getfixturevalue(model),
        model={"precision": precision},
        optimizer={"lr": 3e-3, "schedule": "linear", "warmup_updates": 2, "weight_decay": 0.01},
    )
    learner = Learner(config, topology)
    for number in range(2):
        update(learner, scored(learner, make_batch(8, seed=number)), config)
    learner.reset_reference(7)
    for number in range(2, 4):
        update(learner, scored(learner, make_batch(8, seed=number)), config)
    learner.save(tmp_path).finish()

    resumed = Learner(config, topology)
    resumed.load(tmp_path)
    assert resumed.num_updates == 4
    assert resumed.reference_version == 7
    assert resumed._optimizer.adam_steps() == {4}
    assert same_tensors(learner_weights(resumed), learner_weights(learner))
    before = learner_weights(learner)
    for number in range(4, 7):
        stats = []
        for each in (learner, resumed):
            stats.append(update(each, scored(each, make_batch(8, seed=number)), config))
        assert stats[0].metrics == stats[1].metrics
        np.testing.assert_array_equal(stats[0].residual, stats[1].residual)
    assert same_tensors(learner_weights(resumed), learner_weights(learner))
    assert not same_tensors(before, learner_weights(learner))
    assert resumed.num_updates == learner.num_updates == 7
    assert resumed._optimizer.adam_steps() == learner._optimizer.adam_steps() == {7}


def test_a_resume_is_exact_where_the_gradient_buffer_has_padding_between_buckets(
    untied: Path, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a large model under overlap_grad_reduce, or of tied embeddings over pipeline stages."""
    small_buckets = functools.partial(passes.DistributedDataParallelConfig, bucket_size=2000)
    monkeypatch.setattr(passes, "DistributedDataParallelConfig", small_buckets)
    config = make_config(untied, parallel={"overlap_grad_reduce": True}, optimizer={"lr": 3e-3})
    overlapping = replace(topology, parallel=config.parallel)
    learner, resumed = Learner(config, overlapping), Learner(config, overlapping)
    buffers: Any = learner._ddp.buffers
    (buffer,) = buffers
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    assert len(padding) >= 4
    assert any(padding[:-1])
    for seed in range(2):
        update(learner, scored(learner, make_batch(8, seed=seed)), config)
    learner.save(tmp_path).finish()
    resumed.load(tmp_path)
    for seed in (2, 3):
        assert same_tensors(learner_weights(resumed), learner_weights(learner))
        for each in (learner, resumed):
            update(each, scored(each, make_batch(8, seed=seed)), config)
    assert same_tensors(learner_weights(resumed), learner_weights(learner))


def test_a_checkpoint_of_before_the_first_update_loads(untied: Path, topology: Topology, tmp_path: Path) -> None:
    config = make_config(untied)
    learner = Learner(config, topology)
    learner.save(tmp_path).finish()
    resumed = Learner(config, topology)
    update(resumed, scored(resumed, make_batch(8, seed=9)), config)
    resumed.load(tmp_path)
    assert resumed.num_updates == 0
    assert resumed._optimizer.adam_steps() == {0}
    for each in (learner, resumed):
        update(each, scored(each, make_batch(8, seed=1)), config)
    assert same_tensors(learner_weights(resumed), learner_weights(learner))


def test_loading_into_a_learner_that_has_trained_restores_everything(
    untied: Path, topology: Topology, tmp_path: Path
) -> None:
    """A rollback in a live process: weights, Adam, schedule and reference are those of the checkpoint."""
    config = make_config(untied, optimizer={"schedule": "cosine"})
    learner = Learner(config, topology)
    update(learner, scored(learner, make_batch(8, seed=0)), config)
    learner.save(tmp_path).finish()
    reference = learner.score_reference(make_batch(6))
    first = [update(learner, scored(learner, make_batch(8, seed=number)), config).metrics for number in (1, 2)]
    learner.reset_reference(5)
    learner.load(tmp_path)
    assert learner.reference_version == 0
    np.testing.assert_array_equal(learner.score_reference(make_batch(6)).trajectory_score, reference.trajectory_score)
    assert [update(learner, scored(learner, make_batch(8, seed=number)), config).metrics for number in (1, 2)] == first


def test_a_reference_that_is_the_policy_is_still_so_after_a_resume(
    untied: Path, topology: Topology, tmp_path: Path
) -> None:
    config = make_config(untied)
    learner = Learner(config, topology)
    update(learner, scored(learner, make_batch(8, seed=0)), config)
    learner.reset_reference(1)
    learner.save(tmp_path).finish()
    resumed = Learner(config, topology)
    resumed.load(tmp_path)
    batch = make_batch(10)
    for scores in (resumed.score(batch), resumed.score_reference(batch)):
        np.testing.assert_array_equal(scores.trajectory_score, learner.score(batch).trajectory_score)


def test_a_resumed_run_keeps_its_place_and_takes_the_new_settings(
    untied: Path, topology: Topology, tmp_path: Path
) -> None:
    """A run that is made longer goes on falling from where it was, and does not stand still at the old end."""
    short = make_config(untied, run={"num_iterations": 2}, optimizer={"lr": 1e-3, "schedule": "linear"})
    longer = make_config(
        untied, run={"num_iterations": 8}, optimizer={"lr": 2e-3, "schedule": "linear", "betas": [0.5, 0.6]}
    )
    learner = Learner(short, topology)
    batch = scored(learner, make_batch(8, seed=0))
    rates = [update(learner, batch, short).metrics["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([1e-3 * (1 - n / 4) for n in range(1, 5)])
    learner.save(tmp_path).finish()
    resumed = Learner(longer, topology)
    resumed.load(tmp_path)
    rates = [update(resumed, batch, longer).metrics["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([2e-3 * (1 - n / 16) for n in range(5, 8)])
    assert {group["betas"] for group in resumed._optimizer._optimizer.param_groups} == {(0.5, 0.6)}
