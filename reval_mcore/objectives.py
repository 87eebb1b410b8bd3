"""Objectives as pure functions of token scores, and the shaping of rewards.

ReVal (arXiv 2603.23355, Eq. 2) trains on the square of a trajectory's Bellman residual, with logits as Q-values and
V(s) their logsumexp:

    residual = V_theta(s_1) - V_ref(s_1) + log pi_theta(tau) - log pi_ref(tau) - r(tau) / beta

V(s_1) + log pi(a_1|s_1) is the raw logit of the first response token, so with the trajectory score

    F(tau) = logit(s_1, a_1) + sum over h >= 2 of log pi(a_h|s_h)

the residual is F_theta - F_ref - r / beta: the reference contributes one number a trajectory, and the gradient of V
is kept (without it the fixed point depends on whose data is trained on). Shape legend: B trajectories, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from reval_mcore.config import ObjectiveConfig, RewardConfig
from reval_mcore.records import Batch, Objective, ObjectiveOutput, Reduce, Rewards, Targets, TokenScores

_STD_EPSILON = 1e-6


# ---------------------------------------------------------------- rewards


def shape_rewards(batch: Rewards, config: RewardConfig) -> np.ndarray:
    """Rewards as the objective sees them, float64 [B]; 0 where there is no verdict.

    Group statistics were taken when the group was collected, over its members that have a verdict; batch statistics
    are over the rows of this batch that have one.
    """
    reward = batch.reward.astype(np.float64)
    judged = reward[batch.has_verdict]
    batch_mean = judged.mean() if len(judged) else 0.0
    batch_std = judged.std() if len(judged) else 0.0
    group_mean = batch.group_reward_mean.astype(np.float64)
    group_std = batch.group_reward_std.astype(np.float64)
    match config.shaping:
        case "raw":
            shaped = reward
        case "plus_minus_one":
            shaped = 2.0 * reward - 1.0
        case "group_centered":
            shaped = reward - group_mean
        case "group_normalized":
            shaped = (reward - group_mean) / (group_std + _STD_EPSILON)
        case "batch_centered":
            shaped = reward - batch_mean
        case "batch_normalized":
            shaped = (reward - batch_mean) / (batch_std + _STD_EPSILON)
    return np.where(batch.has_verdict, shaped, 0.0)


def importance_weights(batch: Batch, counts: np.ndarray, exponent: float) -> np.ndarray:
    """float64 [B]: (N p)^-exponent divided by its mean over the rows that count (bool [B]), 0 where they do not.

    N p is how much likelier a row was to be drawn than by a uniform sampler, as prioritized replay corrects for it
    (arXiv 1511.05952, which divides by the maximum). With the mean, and the number of rows that count as normaliser,
    the size of a step does not depend on how uneven the priorities are.
    """
    weights = np.where(counts, batch.relative_probability**-exponent if exponent else 1.0, 0.0)
    return weights / weights[counts].mean() if exponent and counts.any() else weights


def make_targets(batch: Batch, config: RewardConfig, *, importance_exponent: float = 0.0) -> Targets:
    """Everything of a batch that enters the loss and does not come from the policy.

    A response without a verdict (cut at the length limit under "mask" or "bootstrap", or aborted) has no reward term:
    it keeps its value at the cut where truncation is "bootstrap", and leaves the loss otherwise.
    """
    bootstrap = ~batch.has_verdict & (config.truncation == "bootstrap")
    counts = batch.has_verdict | bootstrap
    return Targets(
        reward=torch.from_numpy(shape_rewards(batch, config)),
        weight=torch.from_numpy(importance_weights(batch, counts, importance_exponent)),
        bootstrap=torch.from_numpy(bootstrap),
        reference_score=torch.from_numpy(batch.reference.trajectory_score),
        reference_initial_value=torch.from_numpy(batch.reference.initial_value),
        reference_final_value=torch.from_numpy(batch.reference.final_value),
    )


# ---------------------------------------------------------------- residuals


def _residual_loss(
    score: torch.Tensor, residual: torch.Tensor, value: torch.Tensor, targets: Targets, config: ObjectiveConfig
) -> ObjectiveOutput:
    scale = config.beta if config.loss_scale == "beta_residual" else 1.0
    value_gap = value - targets.reference_initial_value
    score_gap = score.detach() - targets.reference_score
    return ObjectiveOutput(
        loss=targets.weight * (scale * residual).square(),
        residual=residual.detach(),
        metrics={"log_ratio": score_gap - value_gap, "value_gap": value_gap, "initial_value": value},
    )


def reval(scores: TokenScores, targets: Targets, reduce: Reduce, *, config: ObjectiveConfig) -> ObjectiveOutput:
    """(F_theta - F_ref - r / beta)^2; a bootstrapped response also keeps -(V_theta - V_ref) at its cut.

    Gradient with respect to the logits, with k = 2 residual: k (onehot - p) at h >= 2, k onehot at s_1, and -k p at
    the cut of a bootstrapped response.
    """
    score = reduce(scores.trajectory_score())
    at_cut = torch.where(targets.bootstrap, reduce(scores.final_value.double()) - targets.reference_final_value, 0.0)
    residual = score - targets.reference_score - at_cut - targets.reward / config.beta
    value = reduce(scores.initial_value.detach().double())
    return _residual_loss(score, residual, value, targets, config)


def tbrm(scores: TokenScores, targets: Targets, reduce: Reduce, *, config: ObjectiveConfig) -> ObjectiveOutput:
    """TBRM (arXiv 2505.15311): ReVal without V_ref(s_1), so its residual is not 0 at theta == ref, r == 0."""
    score = reduce(scores.trajectory_score())
    at_cut = torch.where(targets.bootstrap, reduce(scores.final_value.double()), 0.0)
    reference_logprob = targets.reference_score - targets.reference_initial_value
    residual = score - reference_logprob - at_cut - targets.reward / config.beta
    value = reduce(scores.initial_value.detach().double())
    return _residual_loss(score, residual, value, targets, config)


_OBJECTIVES = {"reval": reval, "tbrm": tbrm}


def make_objective(config: ObjectiveConfig) -> Objective:
    function = _OBJECTIVES[config.name]
    return lambda scores, targets, reduce: function(scores, targets, reduce, config=config)
