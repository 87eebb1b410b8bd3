"""Prompts -> engine -> verifier -> groups -> one shard. Inline, called by the trainer between updates.

A group is the N responses to one prompt; its reward statistics are taken here, once, and stored with each member.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from reval_mcore.config import Config
from reval_mcore.prompts import prompts_for_iteration
from reval_mcore.randomness import generator, stream_key
from reval_mcore.records import Prompt, Trajectory
from reval_mcore.replay.shards import ShardWriter
from reval_mcore.rollout.engine import GenerationRequest, GenerationResponse, RolloutEngine, SamplingParams
from reval_mcore.verifiers import VERIFIER_VERSION, Verdict, VerifierPool, count_reasons

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Answered:
    """One response with its text and verdict."""

    prompt: Prompt
    sample_index: int
    response: GenerationResponse
    text: str
    verdict: Verdict


class Answerer:
    """Generates responses to prompts and has them judged: what collection and evaluation have in common."""

    def __init__(self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, verifier: VerifierPool) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._verifier = verifier

    def answer(
        self,
        prompts: Sequence[Prompt],
        num_responses: int,
        sampling: SamplingParams,
        seed: Callable[[Prompt, int], int],
    ) -> list[Answered]:
        """`num_responses` to each prompt, group after group. `seed(prompt, sample_index)` names a random stream."""
        cells = [(prompt, index) for prompt in prompts for index in range(num_responses)]
        requests = [GenerationRequest(prompt.token_ids, seed(prompt, index)) for prompt, index in cells]
        responses = self._engine.generate(requests, sampling)
        texts = self._tokenizer.batch_decode(
            [response.token_ids.tolist() for response in responses], skip_special_tokens=True
        )
        verdicts = self._verifier.verify([(text, cell[0].answer) for text, cell in zip(texts, cells, strict=True)])
        return [
            Answered(prompt, index, response, text, verdict)
            for (prompt, index), response, text, verdict in zip(cells, responses, texts, verdicts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Collected:
    """What one block of collection wrote."""

    shard: str
    metrics: dict[str, float]
    samples: tuple[str, ...]  # a few trajectories as text


class Collector:
    """Fills one block of the prompt order an iteration."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        answerer: Answerer,
        writer: ShardWriter,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._answerer = answerer
        self._writer = writer
        rollout = config.rollout
        self._sampling = SamplingParams(
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=stop_token_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )

    def collect(self, iteration: int) -> Collected:
        """Generate, judge and write the trajectories of one iteration; a function of (seed, iteration, weights)."""
        config, seed = self._config, self._config.run.seed
        block = prompts_for_iteration(iteration, config.rollout.num_prompts, len(self._prompts), seed)
        answered = self._answerer.answer(
            [self._prompts[i] for i in block.tolist()],
            config.rollout.num_responses,
            self._sampling,
            lambda prompt, index: stream_key(seed, "rollout", iteration, prompt.prompt_id, index),
        )
        judged = [self._judge(item) for item in answered]
        if config.verifier.permute_rewards:
            judged = _permuted(judged, seed, iteration)
        size = config.rollout.num_responses
        trajectories: list[Trajectory] = []
        for start in range(0, len(answered), size):
            group = slice(start, start + size)
            trajectories += self._group(answered[group], judged[group], iteration)
        shard = self._writer.write(trajectories)
        metrics = _response_metrics(answered) | {"reward_mean": float(np.mean([t.reward for t in trajectories]))}
        samples = tuple(_as_text(item) for item in answered[::size][: config.logging.num_text_samples])
        return Collected(shard, metrics, samples)

    def _group(self, members: Sequence[Answered], judged: Sequence[Verdict | None], iteration: int) -> list[Trajectory]:
        rewards = np.array([verdict.reward for verdict in judged if verdict is not None])
        return [
            self._trajectory(
                member,
                verdict,
                iteration=iteration,
                mean=float(rewards.mean()) if len(rewards) else 0.0,
                std=float(rewards.std()) if len(rewards) else 0.0,
                group_size=len(rewards),
            )
            for member, verdict in zip(members, judged, strict=True)
        ]

    def _judge(self, member: Answered) -> Verdict | None:
        """The verdict that counts, None where there is none: an unfinished response is judged only to be given 0."""
        match member.response.finish_reason:
            case "stop":
                return member.verdict
            case "length" if self._config.reward.truncation == "zero_reward":
                return replace(member.verdict, reward=0.0)
            case _:
                return None

    def _trajectory(
        self, member: Answered, verdict: Verdict | None, *, iteration: int, mean: float, std: float, group_size: int
    ) -> Trajectory:
        group_id = f"{iteration:06d}-{member.prompt.prompt_id}"
        response = member.response
        return Trajectory(
            trajectory_id=f"{group_id}-{member.sample_index}",
            prompt_id=member.prompt.prompt_id,
            group_id=group_id,
            sample_index=member.sample_index,
            prompt_tokens=np.array(member.prompt.token_ids, np.int32),
            response_tokens=response.token_ids,
            loss_mask=np.ones(len(response.token_ids), bool),
            rollout_logprobs=response.logprobs,
            version_spans=response.version_spans,
            reward=verdict.reward if verdict is not None else 0.0,
            group_reward_mean=mean,
            group_reward_std=std,
            group_size=group_size,
            finish_reason=response.finish_reason,
            verdict=verdict.reason if verdict is not None else "unverified",
            verifier_version=VERIFIER_VERSION,
            answer=verdict.answer if verdict is not None else "",
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
            collected_at=time.time(),
        )


def _permuted(judged: Sequence[Verdict | None], seed: int, iteration: int) -> list[Verdict | None]:
    """The same verdicts, dealt out at random among the responses that have one: a control that should learn nothing."""
    places = [place for place, verdict in enumerate(judged) if verdict is not None]
    order = generator(seed, "permute_rewards", iteration).permutation(len(places))
    dealt = list(judged)
    for place, source in zip(places, order.tolist(), strict=True):
        dealt[place] = judged[places[source]]
    return dealt


def _response_metrics(answered: Sequence[Answered]) -> dict[str, float]:
    lengths = np.array([len(item.response.token_ids) for item in answered])
    metrics = {
        "accuracy": float(np.mean([item.verdict.reward for item in answered])),
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([item.response.finish_reason == "length" for item in answered])),
        "num_trajectories": float(len(answered)),
        "num_response_tokens": float(lengths.sum()),
    }
    reasons = count_reasons(item.verdict for item in answered)
    return metrics | {f"verdict_{reason}": float(count) for reason, count in reasons.items()}


def _as_text(item: Answered) -> str:
    return f"{item.prompt.text}{item.text}\n[{item.verdict.reason}; truth {item.prompt.answer}]"
