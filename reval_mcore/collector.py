"""Prompts -> engine -> verifier -> groups -> one shard. Inline, called by the trainer between updates.

A group is the N responses to one prompt; its reward statistics are taken here, once, and stored with each member. What
is reported of an iteration is taken from its trajectories, so that a shard which was there already reports the same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from reval_mcore.config import Config
from reval_mcore.prompts import prompts_for_iteration
from reval_mcore.randomness import generator, stream_key
from reval_mcore.ranks import Ranks
from reval_mcore.records import FinishReason, Prompt, Trajectory, VerdictReason
from reval_mcore.replay.shards import CorruptShardError, ShardWriter, read_trajectories
from reval_mcore.rollout.engine import GenerationRequest, GenerationResponse, RolloutEngine, SamplingParams
from reval_mcore.verifiers import VERIFIER_VERSION, Verdict, VerifierPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
        texts = self.decode([response.token_ids for response in responses])
        verdicts = self._verifier.verify([(text, cell[0].answer) for text, cell in zip(texts, cells, strict=True)])
        return [
            Answered(prompt, index, response, text, verdict)
            for (prompt, index), response, text, verdict in zip(cells, responses, texts, verdicts, strict=True)
        ]

    def decode(self, responses: Sequence[np.ndarray]) -> list[str]:
        """Text of responses (int32 [tokens] each), without special tokens."""
        if not responses:  # of which transformers 5 makes one empty text
            return []
        return self._tokenizer.batch_decode([tokens.tolist() for tokens in responses], skip_special_tokens=True)


@dataclass(frozen=True, slots=True)
class Collected:
    """What was collected for an iteration, by all ranks."""

    shards: tuple[str, ...]
    metrics: dict[str, float]
    samples: tuple[str, ...]  # a few trajectories as text


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is reported of a trajectory."""

    reward: float
    verdict: VerdictReason
    finish_reason: FinishReason
    num_response_tokens: int


class Collector:
    """Fills one block of the prompt order an iteration, each rank its part of the prompts, in a shard of its own."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        answerer: Answerer,
        writer: ShardWriter,
        stop_token_ids: tuple[int, ...],
        ranks: Ranks,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._answerer = answerer
        self._writer = writer
        self._ranks = ranks
        rollout = config.rollout
        self._left_behind: dict[int, Path] = {}  # shards, by iteration
        self._sampling = SamplingParams(
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=stop_token_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )

    def collect(self, iteration: int) -> Collected:
        """Generate, judge and write the trajectories of one iteration; a function of (seed, iteration, weights).

        Collective: all ranks get what all have collected.
        """
        shards, trajectories = self._own_part(iteration)
        size = self._config.rollout.num_responses
        samples = as_text(self._answerer, self._prompts, trajectories[::size][: self._config.logging.num_text_samples])
        outcomes = outcomes_of(trajectories)
        parts = self._ranks.gather((shards, outcomes, samples))
        return Collected(
            shards=tuple(shard for part, _, _ in parts for shard in part),
            metrics=response_metrics([outcome for _, part, _ in parts for outcome in part]),
            samples=tuple(text for _, _, part in parts for text in part)[: self._config.logging.num_text_samples],
        )

    def state(self) -> dict[str, Any]:
        """Nothing: what is collected is a function of the iteration."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to go back to."""

    def _own_part(self, iteration: int) -> tuple[list[str], list[Trajectory]]:
        """(shard, if there is something to put in one; trajectories)."""
        if iteration in self._left_behind:
            path = self._left_behind.pop(iteration)
            return [path.name], read_trajectories(path)
        trajectories = self._generate(iteration)
        return [self._writer.write(trajectories)] if trajectories else [], trajectories

    def take_over(self, directory: Path, shards: Sequence[str]) -> list[str]:
        """Use these shards for the iterations that they are of, instead of generating again; returns those of use.

        They are what an earlier attempt at this run wrote after its last checkpoint. Of use is a shard that can be read
        and holds just the trajectories of one iteration.
        """
        for name in shards:
            try:
                trajectories = read_trajectories(directory / name)
            except CorruptShardError as error:
                logger.warning("replay shard %s of an earlier attempt is made again: %s", name, error)
                continue
            number = trajectories[0].trajectory_id.partition("-")[0]
            if number.isdecimal() and [t.trajectory_id for t in trajectories] == self._trajectory_ids(int(number)):
                self._left_behind.setdefault(int(number), directory / name)
        return [path.name for path in self._left_behind.values()]

    def _block(self, iteration: int) -> list[Prompt]:
        """This rank's prompts: all responses to one are in one shard."""
        config = self._config
        block = prompts_for_iteration(iteration, config.rollout.num_prompts, len(self._prompts), config.run.seed)
        return [self._prompts[i] for i in self._ranks.part(block.tolist())]

    def _trajectory_ids(self, iteration: int) -> list[str]:
        groups = [_group_id(iteration, prompt) for prompt in self._block(iteration)]
        return [f"{group}-{index}" for group in groups for index in range(self._config.rollout.num_responses)]

    def _generate(self, iteration: int) -> list[Trajectory]:
        config, seed = self._config, self._config.run.seed
        answered = self._answerer.answer(
            self._block(iteration),
            config.rollout.num_responses,
            self._sampling,
            lambda prompt, index: stream_key(seed, "rollout", iteration, prompt.prompt_id, index),
        )
        judged = [self._judge(item) for item in answered]
        if config.verifier.permute_rewards:
            judged = self._permuted(judged, iteration)
        size = config.rollout.num_responses
        trajectories: list[Trajectory] = []
        for start in range(0, len(answered), size):
            group = slice(start, start + size)
            trajectories += self._group(answered[group], judged[group], iteration)
        return trajectories

    def _permuted(self, judged: Sequence[Verdict | None], iteration: int) -> list[Verdict | None]:
        """The verdicts of all ranks, dealt out at random among the responses that have one: should teach nothing."""
        parts = self._ranks.gather(list(judged))
        whole = [verdict for part in parts for verdict in part]
        places = [place for place, verdict in enumerate(whole) if verdict is not None]
        order = generator(self._config.run.seed, "permute_rewards", iteration).permutation(len(places))
        dealt = list(whole)
        for place, source in zip(places, order.tolist(), strict=True):
            dealt[place] = whole[places[source]]
        start = sum(len(part) for part in parts[: self._ranks.rank])
        return dealt[start : start + len(judged)]

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
        group_id = _group_id(iteration, member.prompt)
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


def outcomes_of(trajectories: Sequence[Trajectory]) -> list[Outcome]:
    return [Outcome(t.reward, t.verdict, t.finish_reason, len(t.response_tokens)) for t in trajectories]


def as_text(answerer: Answerer, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory]) -> tuple[str, ...]:
    """For people: prompt, response, verdict."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    chosen = [by_id[trajectory.prompt_id] for trajectory in trajectories]
    texts = answerer.decode([trajectory.response_tokens for trajectory in trajectories])
    return tuple(
        f"{prompt.text}{text}\n[{trajectory.verdict}; truth {prompt.answer}]"
        for prompt, text, trajectory in zip(chosen, texts, trajectories, strict=True)
    )


def _group_id(iteration: int, prompt: Prompt) -> str:
    return f"{iteration:06d}-{prompt.prompt_id}"


def response_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    lengths = np.array([outcome.num_response_tokens for outcome in outcomes])
    rewards = np.array([outcome.reward for outcome in outcomes], np.float32)  # as a shard holds them
    reasons = Counter(outcome.verdict for outcome in outcomes)
    metrics = {
        "accuracy": reasons["correct"] / len(outcomes),
        "reward_mean": float(rewards.mean(dtype=np.float64)),
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([outcome.finish_reason == "length" for outcome in outcomes])),
        "num_trajectories": float(len(outcomes)),
        "num_response_tokens": float(lengths.sum()),
    }
    return metrics | {f"verdict_{reason}": float(reasons[reason]) for reason in get_args(VerdictReason)}
