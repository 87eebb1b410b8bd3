"""What flows: trajectories, tokens and micro-batches of an iteration, the replay buffer, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import Config
from reval_mcore.layout import data_parallel_size
from reval_mcore.plan.memory import element_bytes
from reval_mcore.plan.parameters import num_model_parameters

# Responses are as long as the policy makes them, and no setting says how long that is.
TYPICAL_FRACTION = 0.5  # of the longest prompt and response

TOKEN_BYTES_ON_DISK = 8  # int32 id and fp32 log-probability, before compression; prompts have the id alone
TOKEN_BYTES_IN_MEMORY = 9  # and the loss mask as a byte


@dataclass(frozen=True)
class Iteration:
    num_trajectories: int  # fresh
    max_length_tokens: int  # of a trajectory
    max_tokens: int
    typical_tokens: int


@dataclass(frozen=True)
class Schedule:
    """The passes of an update, those of the smallest update of an iteration."""

    num_trajectories: int
    max_tokens_per_micro_batch: int
    typical_num_micro_batches: int  # on each data-parallel rank
    max_num_micro_batches: int  # where all trajectories are of full length
    num_stages: int

    @property
    def bubble(self) -> float:
        """Share of an update's time that a pipeline stage waits, at the typical number of micro-batches."""
        return (self.num_stages - 1) / (self.typical_num_micro_batches + self.num_stages - 1)


@dataclass(frozen=True)
class Replay:
    capacity: int
    num_iterations_held: float
    uses_per_trajectory: float  # expected, once the buffer is full: trajectories trained on by each fresh one
    unused_fraction: float  # of trajectories, that leave the buffer without having been in an update
    disk_bytes: int  # at most, before compression; with shards that only an old checkpoint still needs
    memory_bytes: int  # at most


@dataclass(frozen=True)
class Run:
    num_iterations: int
    num_updates: int
    num_resets: int
    num_checkpoints: int


@dataclass(frozen=True)
class Checkpoint:
    bytes_each: int
    num_kept: int  # at most, the one being written counted

    @property
    def disk_bytes(self) -> int:
        return self.bytes_each * self.num_kept


def plan_iteration(config: Config) -> Iteration:
    number = config.rollout.num_prompts * config.rollout.num_responses
    longest = config.prompts.max_tokens + config.rollout.max_response_tokens
    return Iteration(
        num_trajectories=number,
        max_length_tokens=longest,
        max_tokens=number * longest,
        typical_tokens=round(number * longest * TYPICAL_FRACTION),
    )


def plan_schedule(config: Config, iteration: Iteration, world_size: int) -> Schedule:
    updates = config.updates
    sizes = set()
    if config.replay.first_update == "fresh":
        sizes.add(iteration.num_trajectories)
    if updates.per_iteration > len(sizes):
        sizes.add(updates.batch_size)
    smallest, limit = min(sizes), updates.max_tokens_per_micro_batch
    num_ranks = data_parallel_size(config.parallel, world_size)
    longest = iteration.max_length_tokens
    typical, most = (smallest / (limit // length) for length in (math.ceil(longest * TYPICAL_FRACTION), longest))
    return Schedule(
        num_trajectories=smallest,
        max_tokens_per_micro_batch=limit,
        typical_num_micro_batches=math.ceil(math.ceil(typical) / num_ranks),
        max_num_micro_batches=math.ceil(math.ceil(most) / num_ranks),
        num_stages=config.parallel.pipeline_model_parallel_size,
    )


def plan_replay(config: Config, iteration: Iteration) -> Replay:
    replay, updates, fresh = config.replay, config.updates, iteration.num_trajectories
    num_fresh_updates = 1 if replay.first_update == "fresh" else 0
    num_sampled = updates.per_iteration - num_fresh_updates
    held = replay.capacity / fresh
    missed = (1.0 - updates.batch_size / replay.capacity) ** (num_sampled * held)
    num_rows = replay.capacity + fresh  # a shard goes when its last row has gone
    if config.checkpoint.interval != "never":
        num_rows += config.checkpoint.keep * config.checkpoint.interval * fresh
    num_rows = min(num_rows, config.run.num_iterations * fresh)
    longest = iteration.max_length_tokens
    return Replay(
        capacity=replay.capacity,
        num_iterations_held=held,
        uses_per_trajectory=num_fresh_updates + num_sampled * updates.batch_size / fresh,
        unused_fraction=0.0 if num_fresh_updates else missed,
        disk_bytes=num_rows * longest * TOKEN_BYTES_ON_DISK,
        memory_bytes=replay.capacity * longest * TOKEN_BYTES_IN_MEMORY,
    )


def plan_run(config: Config) -> Run:
    number, interval = config.run.num_iterations, config.checkpoint.interval
    num_checkpoints = (
        0 if interval == "never" else math.ceil(number / interval)
    )  # there is one after the last iteration
    reset_interval = config.reference.reset_interval
    return Run(
        num_iterations=number,
        num_updates=number * config.updates.per_iteration,
        num_resets=0 if reset_interval == "never" else number // reset_interval,
        num_checkpoints=num_checkpoints,
    )


def plan_checkpoint(config: Config, spec: ModelSpec, run: Run) -> Checkpoint:
    """Policy, reference, and the optimizer's three fp32 tensors: a master weight is written of an fp32 weight, too."""
    padded = spec.padded_vocab_size(config.parallel.tensor_model_parallel_size)
    per_parameter = 2 * element_bytes(config) + 12
    return Checkpoint(
        bytes_each=per_parameter * num_model_parameters(spec, vocab_size=padded),
        num_kept=min(config.checkpoint.keep + 1, run.num_checkpoints),
    )
