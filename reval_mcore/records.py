"""What flows through the house: prompt -> trajectory -> batch -> token scores -> objective output.

Shape legend: B trajectories, T tokens (packed: prompt and response of all trajectories end to end), V vocabulary.
Everything up to `Batch` is numpy, so that verifier workers and replay tools start without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
VerdictReason = Literal["correct", "wrong", "no_answer", "timeout", "error", "unverified"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with a verifiable answer."""

    prompt_id: str  # unique in its file; names the prompt in trajectories, leases and random streams
    text: str  # as rendered by the template, just before tokenization
    token_ids: tuple[int, ...]
    answer: str  # ground truth for the verifier
    source: str = ""  # data source, as the prompt file names it


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One prompt and one response: the row of a replay shard. Immutable once written."""

    trajectory_id: (
        str  # a function of (iteration or block, prompt_id, sample_index): a re-done block adds nothing twice
    )
    prompt_id: str
    group_id: str  # the responses to one prompt of one block share it, and share a shard
    sample_index: int  # place in the group
    prompt_tokens: np.ndarray  # int32 [prompt length]
    response_tokens: np.ndarray  # int32 [response length], the stop token included
    loss_mask: np.ndarray  # bool [response length]: tokens that the policy chose (False: tool or environment output)
    rollout_logprobs: np.ndarray  # float32 [response length]: the engine's, at temperature 1, never in the residual
    version_spans: tuple[VersionSpan, ...]
    reward: float  # raw, from the verifier; 0.0 where `verdict` is "unverified"
    group_reward_mean: float  # over the group's members that have a verdict
    group_reward_std: float  # population standard deviation over the same members
    group_size: int  # number of those members
    finish_reason: FinishReason
    verdict: VerdictReason
    verifier_version: str
    answer: str  # what the verifier took for the answer ("" where there was none)
    temperature: float
    top_p: float
    top_k: int  # 0: off
    collected_at: float  # seconds since the epoch; for people, never for logic

    @property
    def policy_version(self) -> int:
        """Version that sampled the first response token."""
        return self.version_spans[0].version


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """What the reference contributes to a residual: one number a trajectory, and two for logging and bootstrapping."""

    trajectory_score: np.ndarray  # float64 [B]: F_ref, see objectives.py
    initial_value: np.ndarray  # float64 [B]: V_ref(s_1), logsumexp at the last prompt token
    final_value: np.ndarray  # float64 [B]: V_ref after the last response token
    reference_version: np.ndarray  # int64 [B]: the reference that made them; -1: not scored yet


class Rewards(Protocol):
    """What the shaping of rewards goes by: of a batch, or of rows whose tokens are not in memory."""

    @property
    def reward(self) -> np.ndarray: ...  # float32 [B], raw
    @property
    def group_reward_mean(self) -> np.ndarray: ...  # float32 [B]
    @property
    def group_reward_std(self) -> np.ndarray: ...  # float32 [B]
    @property
    def has_verdict(self) -> np.ndarray: ...  # bool [B]: the reward means something


@dataclass(frozen=True, slots=True)
class RowRewards:
    """The same of rows of the replay buffer, without their tokens."""

    reward: np.ndarray  # float32 [B], raw
    group_reward_mean: np.ndarray  # float32 [B]
    group_reward_std: np.ndarray  # float32 [B]
    has_verdict: np.ndarray  # bool [B]


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories for one scoring pass or one update, ragged: row b owns tokens[cu_seqlens[b]:cu_seqlens[b + 1]]."""

    rows: np.ndarray  # int64 [B]: admission numbers in the replay buffer
    tokens: np.ndarray  # int32 [T]: prompt then response of each trajectory
    cu_seqlens: np.ndarray  # int64 [B + 1]
    prompt_lengths: np.ndarray  # int64 [B]
    loss_mask: np.ndarray  # bool [T]: False on prompts
    rollout_logprobs: np.ndarray  # float32 [T]: 0 on prompts
    policy_version: np.ndarray  # int64 [B]: version that sampled the first response token
    reward: np.ndarray  # float32 [B], raw
    group_reward_mean: np.ndarray  # float32 [B]
    group_reward_std: np.ndarray  # float32 [B]
    has_verdict: np.ndarray  # bool [B]: the reward means something
    finish_reason: np.ndarray  # str [B]
    reference: ReferenceScores
    relative_probability: np.ndarray  # float64 [B]: of the draw, over a uniform one's; 1 where none was by priority

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: prompt plus response tokens."""
        return np.diff(self.cu_seqlens)


@dataclass(frozen=True, slots=True)
class Scores:
    """A forward pass over a batch, per trajectory in float64 and per token in float32. Same order as the batch."""

    trajectory_score: np.ndarray  # float64 [B]: F
    initial_value: np.ndarray  # float64 [B]: V(s_1)
    final_value: np.ndarray  # float64 [B]: V after the last response token
    logprobs: np.ndarray  # float32 [T]: of each token given those before it; 0 on prompts


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the loss head gives an objective for one micro-batch. Position t predicts token t + 1 of its trajectory.

    Under context parallelism each rank holds its own positions, in the order of their trajectories, and 0 for what
    another rank holds; sums over them, and the three values a trajectory, are partial until `reduce`d.
    """

    logprob: torch.Tensor  # float32 [T]: log-probability of the next token, 0 where it is not in the loss
    in_loss: torch.Tensor  # bool [T]: the next token is a response token under the loss mask
    is_first: torch.Tensor  # bool [T]: ... and the first such token of its trajectory
    segment_ids: torch.Tensor  # int64 [T]: trajectory of each position, ascending; B for padding at the end
    first_logit: torch.Tensor  # float32 [B]: raw logit of the first response token, logit(s_1, a_1)
    initial_value: torch.Tensor  # float32 [B]: V(s_1) = logsumexp at s_1
    final_value: torch.Tensor  # float32 [B]: logsumexp after the last response token

    def trajectory_score(self) -> torch.Tensor:
        """F(tau), float64 [B]: the first response token's raw logit plus the log-probabilities of the others.

        The learner's scoring pass and the objectives both call this, so F_ref and F_theta are the same formula. Sums
        are float64: over 5,000 tokens an fp32 running sum is off by 0.05 nats, a bf16 one by thousands. A segmented
        sum and no index_add, whose order is not fixed on a GPU.
        """
        import torch

        later = self.logprob.double().masked_fill(~self.in_loss | self.is_first, 0.0)
        lengths = torch.bincount(self.segment_ids, minlength=len(self.first_logit) + 1)  # the last: padding
        return self.first_logit.double() + torch.segment_reduce(later, "sum", lengths=lengths)[:-1]


@dataclass(frozen=True, slots=True)
class Targets:
    """Per-trajectory numbers of a micro-batch that do not come from the model: rewards as shaped, reference scores."""

    reward: torch.Tensor  # float64 [B], shaped
    weight: torch.Tensor  # float64 [B]: 0 is masked out; the others have mean 1, and are 1 without importance weights
    bootstrap: torch.Tensor  # bool [B]: cut before the end, keeps -(V_theta - V_ref) at the cut
    reference_score: torch.Tensor  # float64 [B]: F_ref
    reference_initial_value: torch.Tensor  # float64 [B]
    reference_final_value: torch.Tensor  # float64 [B]


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Losses per trajectory, not yet divided by anything; the learner sums them and divides by the global weight."""

    loss: torch.Tensor  # float64 [B], with gradient
    residual: torch.Tensor  # float64 [B], detached
    metrics: dict[str, torch.Tensor]  # float64 [B] each, detached


# sums a [B] tensor over context-parallel ranks and forwards the gradient; the identity without context parallelism
Reduce = Callable[["torch.Tensor"], "torch.Tensor"]
Objective = Callable[[TokenScores, Targets, Reduce], ObjectiveOutput]


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """One optimizer update: per-trajectory results in the order of the batch, and scalars for the log."""

    residual: np.ndarray  # float64 [B]
    metrics: Mapping[str, float]
    skipped: bool  # not finite, or nothing in the loss: weights and Adam's state are as before
