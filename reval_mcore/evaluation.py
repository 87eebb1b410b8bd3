"""Accuracy on held-out prompts: avg@n, unbiased pass@k, and greedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reval_mcore.collector import Answerer
from reval_mcore.config import EvaluationConfig
from reval_mcore.randomness import stream_key
from reval_mcore.ranks import Ranks
from reval_mcore.records import Prompt, VerdictReason
from reval_mcore.rollout.engine import SamplingParams
from reval_mcore.verifiers import count_reasons


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One evaluation. Figures come with what they were measured on."""

    accuracy: float  # avg@n: mean over prompts of the fraction of correct samples
    pass_at_k: dict[int, float]  # unbiased, arXiv 2107.03374
    greedy_accuracy: float | None  # None where evaluation.greedy is off
    num_prompts: int
    num_samples: int  # n, a prompt
    temperature: float
    top_p: float
    max_response_tokens: int
    verdicts: dict[str, int]  # of the sampled responses, by reason

    def metrics(self) -> dict[str, float]:
        greedy = {} if self.greedy_accuracy is None else {"greedy_accuracy": self.greedy_accuracy}
        passes = {f"pass_at_{k}": value for k, value in self.pass_at_k.items()}
        reasons = {f"verdict_{reason}": float(count) for reason, count in self.verdicts.items()}
        return {"accuracy": self.accuracy, **greedy, **passes, **reasons}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k)."""
    assert 0 < k <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of some of the prompts, in their order."""

    rewards: list[float]  # num_samples a prompt
    reasons: list[VerdictReason]  # likewise
    greedy_rewards: list[float]  # one a prompt; none where evaluation.greedy is off
    versions: list[int]  # of the weights that made any of it


@dataclass(frozen=True)
class Evaluation:
    """What is asked, and how it is counted.

    Every evaluation of a run draws the same random numbers, so that differences come from the weights.
    """

    held_out: Sequence[Prompt]
    config: EvaluationConfig
    seed: int
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]

    @property
    def prompts(self) -> Sequence[Prompt]:
        return self.held_out[: self.config.max_prompts]

    def answer(self, answerer: Answerer, prompts: Sequence[Prompt]) -> Answers:
        """By the engine's weights."""
        config = self.config
        sampling = SamplingParams(
            max_response_tokens=self.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        sampled = answerer.answer(
            prompts,
            config.num_samples,
            sampling,
            lambda prompt, index: stream_key(self.seed, "evaluation", prompt.prompt_id, index),
        )
        one_each = SamplingParams(self.max_response_tokens, self.stop_token_ids, temperature=0.0)
        greedy = answerer.answer(prompts, 1, one_each, lambda *_: 0) if config.greedy else []
        return Answers(
            rewards=[item.verdict.reward for item in sampled],
            reasons=[item.verdict.reason for item in sampled],
            greedy_rewards=[item.verdict.reward for item in greedy],
            versions=sorted({span.version for item in (*sampled, *greedy) for span in item.response.version_spans}),
        )

    def result(self, parts: Sequence[Answers]) -> EvaluationResult:
        """Of answers that make up all of the prompts."""
        config = self.config
        rewards = np.array([reward for part in parts for reward in part.rewards])
        rewards = rewards.reshape(len(self.prompts), config.num_samples)
        correct = rewards.sum(axis=1).astype(int).tolist()
        greedy = [reward for part in parts for reward in part.greedy_rewards]
        return EvaluationResult(
            accuracy=float(rewards.mean()),
            pass_at_k={
                k: float(np.mean([pass_at_k(config.num_samples, c, k) for c in correct])) for k in config.pass_at_k
            },
            greedy_accuracy=float(np.mean(greedy)) if config.greedy else None,
            num_prompts=len(self.prompts),
            num_samples=config.num_samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_response_tokens=self.max_response_tokens,
            verdicts={**count_reasons(reason for part in parts for reason in part.reasons)},
        )


def evaluate(evaluation: Evaluation, answerer: Answerer, ranks: Ranks) -> EvaluationResult:
    """Collective: each rank answers its part of the prompts."""
    own = ranks.part(evaluation.prompts)
    return evaluation.result(ranks.gather(evaluation.answer(answerer, own)))
