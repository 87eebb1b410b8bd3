"""The objectives, through the real packing and loss head on fp64 logits, against dense log_softmax references."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from reval_mcore.config import ObjectiveConfig, RewardConfig
from reval_mcore.objectives import make_objective, make_targets, shape_rewards
from reval_mcore.records import Batch, ObjectiveOutput, Scores, TokenScores
from tests.builders import VOCABULARY, dense_loss, dense_scores, make_batch, sequences, with_reference

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology

BETA = 0.05


def random_logits(batch: Batch, *, seed: int, level: float = 0.0) -> list[torch.Tensor]:
    """fp64 [L, V] of each trajectory, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(int(length), VOCABULARY) for length in batch.lengths]
    drawn = [3.0 * torch.randn(shape, generator=generator, dtype=torch.float64) + level for shape in shapes]
    return [logits.requires_grad_() for logits in drawn]


def dense_reference(batch: Batch, logits: list[torch.Tensor]) -> Batch:
    """The batch with the scores of these logits as the reference's."""
    found = [dense_scores(z.detach(), *sequence) for z, sequence in zip(logits, sequences(batch), strict=True)]
    return with_reference(
        batch,
        Scores(
            trajectory_score=np.array([float(scores.trajectory_score) for scores in found]),
            initial_value=np.array([float(scores.initial_value) for scores in found]),
            final_value=np.array([float(scores.final_value) for scores in found]),
            logprobs=np.zeros(len(batch.tokens), np.float32),
        ),
    )


def packed_scores(batch: Batch, logits: list[torch.Tensor], topology: Topology) -> TokenScores:
    """All trajectories in one micro-batch, in reversed order; the logits with padded columns that hold rubbish."""
    from reval_mcore.mcore.loss_head import token_scores
    from reval_mcore.mcore.packing import build_micro_batch

    members = np.arange(len(batch))[::-1].copy()
    packed = torch.cat([logits[member] for member in members])
    rubbish = torch.full((len(packed), 128 - VOCABULARY), 50.0, dtype=packed.dtype)
    micro_batch = build_micro_batch(batch, members, topology.device)
    padded = torch.cat([packed, rubbish], dim=-1).to(topology.device)
    return token_scores(padded, micro_batch, tp_group=topology.groups.tp, num_valid=VOCABULARY)


def run_objective(
    batch: Batch,
    logits: list[torch.Tensor],
    topology: Topology,
    objective: ObjectiveConfig,
    reward: RewardConfig,
    *,
    importance_exponent: float = 0.0,
) -> ObjectiveOutput:
    """Through packing, loss head, targets and objective, in the batch's order."""
    scores = packed_scores(batch, logits, topology)
    targets = make_targets(batch, reward, importance_exponent=importance_exponent)
    flipped = replace(
        targets,
        **{name: getattr(targets, name).flip(0).to(topology.device) for name in targets.__dataclass_fields__},
    )
    output = make_objective(objective)(scores, flipped, lambda value: value)
    metrics = {name: values.flip(0).cpu() for name, values in output.metrics.items()}
    return ObjectiveOutput(output.loss.flip(0).cpu(), output.residual.flip(0).cpu(), metrics)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------- losses, residuals and gradients


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("truncation", ["mask", "bootstrap"])
@pytest.mark.parametrize("loss_scale", ["residual", "beta_residual"])
@pytest.mark.parametrize("name", ["reval", "tbrm"])
def test_loss_residual_and_logit_gradients_equal_dense_autograd(
    topology: Topology, name: Any, loss_scale: Any, truncation: Any, seed: int
) -> None:
    plain = make_batch(9, seed=seed, unjudged=True)
    batch = dense_reference(plain, random_logits(plain, seed=seed + 100, level=2.0))
    objective = ObjectiveConfig(name=name, beta=BETA, loss_scale=loss_scale)
    reward = RewardConfig(shaping="group_normalized", truncation=truncation)

    logits = random_logits(batch, seed=seed)
    output = run_objective(batch, logits, topology, objective, reward)
    weight = make_targets(batch, reward).weight
    (output.loss.sum() / weight.sum()).backward()

    dense = random_logits(batch, seed=seed)
    loss, residual = dense_loss(
        dense,
        batch,
        shape_rewards(batch, reward),
        beta=BETA,
        loss_scale=loss_scale,
        bootstrap=truncation == "bootstrap",
        tbrm=name == "tbrm",
    )
    loss.backward()

    assert output.loss.dtype == torch.float64
    assert (output.loss.sum() / weight.sum()).item() == pytest.approx(loss.item(), rel=1e-12)
    assert relative_error(output.residual, residual.detach()) < 1e-12
    assert relative_error(torch.cat([z.grad for z in logits]), torch.cat([z.grad for z in dense])) < 1e-12  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(("loss_scale", "scale"), [("residual", 1.0), ("beta_residual", BETA**2)])
def test_gradient_rows_follow_the_formula(topology: Topology, loss_scale: Any, scale: float) -> None:
    """2 w residual (onehot - p) at h >= 2, 2 w residual onehot at s_1, -2 w residual p at a bootstrapped cut."""
    plain = make_batch(12, seed=5, unjudged=True)
    batch = dense_reference(plain, random_logits(plain, seed=6))
    logits = random_logits(batch, seed=7)
    output = run_objective(
        batch,
        logits,
        topology,
        ObjectiveConfig(beta=BETA, loss_scale=loss_scale),
        RewardConfig(shaping="raw", truncation="bootstrap"),
    )
    weights = torch.rand(len(batch), generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    weights[3] = 0.0
    (weights * output.loss).sum().backward()

    for row, (z, (tokens, positions)) in enumerate(zip(logits, sequences(batch), strict=True)):
        k = 2.0 * scale * float(weights[row] * output.residual[row])
        p = z.detach().softmax(-1)
        expected = torch.zeros_like(z)
        for t in positions[1:]:
            expected[t] = -k * p[t]
        for t in positions:
            expected[t, tokens[t + 1]] += k
        if not batch.has_verdict[row]:
            expected[-1] = -k * p[-1]
        assert z.grad is not None
        assert float((z.grad - expected).abs().max()) <= 1e-12 * max(abs(k), 1.0)
        row_sums = z.grad.sum(-1)
        assert float(row_sums[positions[0]]) == pytest.approx(k, rel=1e-12)  # the level of s_1 moves ...
        assert float(row_sums[positions[1:]].abs().sum()) <= 1e-11 * max(abs(k), 1.0)  # ... and no other


def test_masked_rows_get_no_gradient_and_leave_the_mean(topology: Topology) -> None:
    plain = make_batch(10, seed=3, unjudged=True)
    batch = dense_reference(plain, random_logits(plain, seed=4))
    reward = RewardConfig(shaping="raw", truncation="mask")
    logits = random_logits(batch, seed=1)
    output = run_objective(batch, logits, topology, ObjectiveConfig(beta=BETA), reward)
    output.loss.sum().backward()
    for row, z in enumerate(logits):
        assert z.grad is not None
        assert bool(z.grad.any()) == bool(batch.has_verdict[row])
        assert bool(output.loss[row] > 0.0) == bool(batch.has_verdict[row])
    assert make_targets(batch, reward).weight.sum() == batch.has_verdict.sum()


def test_prompt_and_masked_positions_get_no_gradient(topology: Topology) -> None:
    plain = make_batch(8, seed=9)
    batch = dense_reference(plain, random_logits(plain, seed=4))
    logits = random_logits(batch, seed=1)
    run_objective(
        batch, logits, topology, ObjectiveConfig(beta=BETA), RewardConfig(shaping="raw")
    ).loss.sum().backward()
    for z, (tokens, positions) in zip(logits, sequences(batch), strict=True):
        assert z.grad is not None
        assert set(z.grad.abs().sum(-1).nonzero()[:, 0].tolist()) == set(positions)
        assert len(positions) < len(tokens)


def test_beta_scaled_loss_has_gradients_beta_squared_times_as_large(topology: Topology) -> None:
    plain = make_batch(6, seed=2)
    batch = dense_reference(plain, random_logits(plain, seed=3))
    gradients = []
    for loss_scale in ("residual", "beta_residual"):
        logits = random_logits(batch, seed=4)
        objective = ObjectiveConfig(beta=BETA, loss_scale=loss_scale)
        run_objective(batch, logits, topology, objective, RewardConfig(shaping="raw")).loss.sum().backward()
        gradients.append(torch.cat([z.grad for z in logits]))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert relative_error(gradients[1], BETA**2 * gradients[0]) < 1e-12


def test_at_the_reference_without_reward_reval_is_zero_and_tbrm_is_the_initial_value(topology: Topology) -> None:
    plain = make_batch(9, seed=2, unjudged=True)
    same = random_logits(plain, seed=11, level=4.0)
    batch = replace(dense_reference(plain, same), reward=np.zeros(9, np.float32), has_verdict=np.ones(9, bool))
    reward = RewardConfig(shaping="raw")
    reval = run_objective(batch, same, topology, ObjectiveConfig(name="reval", beta=BETA), reward)
    tbrm = run_objective(batch, same, topology, ObjectiveConfig(name="tbrm", beta=BETA), reward)
    assert float(reval.residual.abs().max()) < 1e-11
    np.testing.assert_allclose(tbrm.residual.numpy(), batch.reference.initial_value, rtol=1e-11)
    assert float(tbrm.residual.abs().min()) > 1.0


def test_metrics_are_the_log_ratio_and_the_value_gap(topology: Topology) -> None:
    plain = make_batch(7, seed=12)
    reference = random_logits(plain, seed=13, level=3.0)
    batch = dense_reference(plain, reference)
    logits = random_logits(batch, seed=14)
    output = run_objective(batch, logits, topology, ObjectiveConfig(beta=BETA), RewardConfig(shaping="raw"))
    for row, sequence in enumerate(sequences(batch)):
        policy, anchor = dense_scores(logits[row], *sequence), dense_scores(reference[row], *sequence)
        assert float(output.metrics["log_ratio"][row]) == pytest.approx(
            float(policy.logprobs.sum() - anchor.logprobs.sum()), rel=1e-9, abs=1e-9
        )
        assert float(output.metrics["value_gap"][row]) == pytest.approx(
            float(policy.initial_value - anchor.initial_value), rel=1e-9
        )
        assert float(output.metrics["initial_value"][row]) == pytest.approx(float(policy.initial_value), rel=1e-12)
    assert not output.residual.requires_grad
    assert not any(values.requires_grad for values in output.metrics.values())


# ---------------------------------------------------------------- rewards

# five rows of two groups (mean 0.75 and 0.25); the fourth row has no verdict
REWARD = [1.0, 0.0, 1.0, 0.0, 0.5]
GROUP_MEAN = [0.75, 0.75, 0.25, 0.25, 0.25]
GROUP_STD = [0.25, 0.25, 0.5, 0.5, 0.5]
HAS_VERDICT = [True, True, True, False, True]
E = 1e-6
BATCH_STD = float(np.sqrt((0.375**2 + 0.625**2 + 0.375**2 + 0.125**2) / 4))  # of 1, 0, 1, 0.5 about 0.625


def reward_batch(has_verdict: list[bool]) -> Batch:
    return replace(
        make_batch(5),
        reward=np.array(REWARD, np.float32),
        group_reward_mean=np.array(GROUP_MEAN, np.float32),
        group_reward_std=np.array(GROUP_STD, np.float32),
        has_verdict=np.array(has_verdict),
        finish_reason=np.where(has_verdict, "stop", "length"),
    )


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        ("raw", [1.0, 0.0, 1.0, 0.0, 0.5]),
        ("plus_minus_one", [1.0, -1.0, 1.0, 0.0, 0.0]),
        ("group_centered", [0.25, -0.75, 0.75, 0.0, 0.25]),
        ("group_normalized", [0.25 / (0.25 + E), -0.75 / (0.25 + E), 0.75 / (0.5 + E), 0.0, 0.25 / (0.5 + E)]),
        ("batch_centered", [0.375, -0.625, 0.375, 0.0, -0.125]),
        ("batch_normalized", [x / (BATCH_STD + E) for x in (0.375, -0.625, 0.375, 0.0, -0.125)]),
    ],
)
def test_shaped_rewards_equal_hand_computed_ones(shaping: Any, expected: list[float]) -> None:
    shaped = shape_rewards(reward_batch(HAS_VERDICT), RewardConfig(shaping=shaping))
    assert shaped.dtype == np.float64
    np.testing.assert_allclose(shaped, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "shaping", ["raw", "plus_minus_one", "group_centered", "group_normalized", "batch_centered", "batch_normalized"]
)
def test_shaped_rewards_are_finite_zeros_where_nothing_has_a_verdict(shaping: Any) -> None:
    shaped = shape_rewards(reward_batch([False] * 5), RewardConfig(shaping=shaping))
    np.testing.assert_array_equal(shaped, np.zeros(5))


@pytest.mark.parametrize("shaping", ["group_normalized", "batch_normalized"])
def test_normalised_rewards_are_zero_where_all_rewards_are_equal(shaping: Any) -> None:
    batch = replace(
        reward_batch([True] * 5),
        reward=np.ones(5, np.float32),
        group_reward_mean=np.ones(5, np.float32),
        group_reward_std=np.zeros(5, np.float32),
    )
    np.testing.assert_array_equal(shape_rewards(batch, RewardConfig(shaping=shaping)), np.zeros(5))


@pytest.mark.parametrize(
    ("truncation", "weight", "bootstrap"),
    [
        ("zero_reward", [1, 1, 1, 0, 1], [0, 0, 0, 0, 0]),
        ("mask", [1, 1, 1, 0, 1], [0, 0, 0, 0, 0]),
        ("bootstrap", [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]),
    ],
)
def test_targets_of_a_row_without_verdict_follow_the_truncation_mode(
    truncation: Any, weight: list[int], bootstrap: list[int]
) -> None:
    targets = make_targets(reward_batch(HAS_VERDICT), RewardConfig(shaping="group_centered", truncation=truncation))
    np.testing.assert_array_equal(targets.weight.numpy(), np.array(weight, np.float64))
    np.testing.assert_array_equal(targets.bootstrap.numpy(), np.array(bootstrap, bool))
    assert float(targets.reward[3]) == 0.0


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_importance_weights_are_the_dense_formula_and_leave_the_normaliser(topology: Topology, exponent: float) -> None:
    """Loss and gradient of n rows that count: 1/n sum w_i residual_i^2, w_i = (N p_i)^-e / mean of these, by a loop."""
    from reval_mcore.mcore.passes import normalizer

    rng = np.random.default_rng(5)
    batch = replace(make_batch(9, seed=3, unjudged=True), relative_probability=np.exp(rng.normal(size=9)))
    logits = random_logits(batch, seed=4)
    batch = dense_reference(batch, random_logits(batch, seed=5))
    reward = RewardConfig(shaping="raw", truncation="mask")
    targets = make_targets(batch, reward, importance_exponent=exponent)
    counted = np.flatnonzero(batch.has_verdict)
    raw = [float(batch.relative_probability[row]) ** -exponent for row in counted]
    expected = [value / (sum(raw) / len(raw)) for value in raw]
    np.testing.assert_allclose(targets.weight.numpy()[counted], expected, rtol=1e-13)
    assert (targets.weight.numpy()[~batch.has_verdict] == 0.0).all()
    assert normalizer(targets) == len(counted) < len(batch)

    output = run_objective(batch, logits, topology, ObjectiveConfig(beta=BETA), reward, importance_exponent=exponent)
    _, residual = dense_loss(logits, batch, batch.reward, beta=BETA)
    dense = torch.stack([w * residual[row] ** 2 for w, row in zip(expected, counted, strict=True)]).sum() / len(counted)
    loss = output.loss.sum() / normalizer(targets)
    torch.testing.assert_close(loss, dense, rtol=1e-10, atol=0.0)
    used = [logits[row] for row in counted]
    gradients = torch.autograd.grad(loss, used, retain_graph=True)
    for found, wanted in zip(gradients, torch.autograd.grad(dense, used), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_targets_carry_reference_scores_in_float64() -> None:
    batch = make_batch(5)
    scores = Scores(np.arange(5.0) + 1 / 3, np.arange(5.0) - 1 / 7, np.arange(5.0) * 1e9, np.zeros(0, np.float32))
    targets = make_targets(with_reference(batch, scores), RewardConfig())
    np.testing.assert_array_equal(targets.reference_score.numpy(), scores.trajectory_score)
    np.testing.assert_array_equal(targets.reference_initial_value.numpy(), scores.initial_value)
    np.testing.assert_array_equal(targets.reference_final_value.numpy(), scores.final_value)
    assert {field.dtype for field in (targets.reward, targets.weight, targets.reference_score)} == {torch.float64}
