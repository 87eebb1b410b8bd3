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
from reval_mcore.records import Prompt
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


def evaluate(
    answerer: Answerer,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    ranks: Ranks,
    *,
    seed: int,
    max_response_tokens: int,
    stop_token_ids: tuple[int, ...],
) -> EvaluationResult:
    """Every evaluation of a run draws the same random numbers, so that differences come from the weights.

    Collective: each rank answers its part of the prompts.
    """
    prompts = prompts[: config.max_prompts]
    sampling = SamplingParams(
        max_response_tokens=max_response_tokens,
        stop_token_ids=stop_token_ids,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    own = ranks.part(prompts)
    answered = answerer.answer(
        own,
        config.num_samples,
        sampling,
        lambda prompt, index: stream_key(seed, "evaluation", prompt.prompt_id, index),
    )
    verdicts = [verdict for part in ranks.gather([item.verdict for item in answered]) for verdict in part]
    rewards = np.array([verdict.reward for verdict in verdicts]).reshape(len(prompts), config.num_samples)
    correct = rewards.sum(axis=1).astype(int).tolist()
    greedy = None
    if config.greedy:
        one_each = SamplingParams(max_response_tokens, stop_token_ids, temperature=0.0)
        parts = ranks.gather([item.verdict.reward for item in answerer.answer(own, 1, one_each, lambda *_: 0)])
        greedy = float(np.mean([reward for part in parts for reward in part]))
    return EvaluationResult(
        accuracy=float(rewards.mean()),
        pass_at_k={k: float(np.mean([pass_at_k(config.num_samples, c, k) for c in correct])) for k in config.pass_at_k},
        greedy_accuracy=greedy,
        num_prompts=len(prompts),
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_response_tokens=max_response_tokens,
        verdicts={**count_reasons(verdicts)},
    )
