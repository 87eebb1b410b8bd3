"""Settings that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from reval_mcore.config.problems import Problem
from reval_mcore.config.tree import (
    EvaluationConfig,
    LaunchConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptsConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    UpdatesConfig,
)


def _check_group_shaping(reward: RewardConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    if rollout.num_responses == 1 and reward.shaping.startswith("group_"):
        batch = reward.shaping.replace("group_", "batch_")
        yield Problem(
            "reward.shaping",
            reward.shaping,
            f"a group of one response (rollout.num_responses = 1) has no statistics, all rewards would be 0; "
            f'use "{batch}", or at least 2 responses',
        )


def _check_capacity(replay: ReplayConfig, rollout: RolloutConfig, updates: UpdatesConfig) -> Iterator[Problem]:
    fresh = rollout.num_prompts * rollout.num_responses
    if replay.capacity < fresh:
        yield Problem(
            "replay.capacity",
            replay.capacity,
            f"smaller than one iteration's {fresh} trajectories (rollout.num_prompts x num_responses); raise it",
        )
    if updates.batch_size > replay.capacity:
        yield Problem(
            "updates.batch_size",
            updates.batch_size,
            f"sampled without replacement from a buffer of replay.capacity = {replay.capacity}; lower it",
        )
    if replay.min_size > replay.capacity:
        yield Problem(
            "replay.min_size",
            replay.min_size,
            f"never reached with replay.capacity = {replay.capacity}; lower it",
        )


def _check_importance(replay: ReplayConfig) -> Iterator[Problem]:
    if replay.importance_exponent > 0.0 and replay.sampler == "uniform":
        yield Problem(
            "replay.importance_exponent",
            replay.importance_exponent,
            'corrects for priorities, and replay.sampler = "uniform" has none; set it to 0, or sampler = "prioritized"',
        )


def _check_micro_batch(prompts: PromptsConfig, rollout: RolloutConfig, updates: UpdatesConfig) -> Iterator[Problem]:
    longest = prompts.max_tokens + rollout.max_response_tokens
    if updates.max_tokens_per_micro_batch < longest:
        yield Problem(
            "updates.max_tokens_per_micro_batch",
            updates.max_tokens_per_micro_batch,
            f"a trajectory may have {longest} tokens (prompts.max_tokens + rollout.max_response_tokens) and is "
            f"never cut; give at least {longest}",
        )


def _check_schedule(optimizer: OptimizerConfig, run: RunConfig, updates: UpdatesConfig) -> Iterator[Problem]:
    total = run.num_iterations * updates.per_iteration
    if optimizer.warmup_updates > total:
        yield Problem(
            "optimizer.warmup_updates",
            optimizer.warmup_updates,
            f"longer than the whole run of {total} updates (run.num_iterations x updates.per_iteration); lower it",
        )
    if optimizer.min_lr > optimizer.lr:
        yield Problem("optimizer.min_lr", optimizer.min_lr, f"larger than optimizer.lr = {optimizer.lr:g}; lower it")
    for index, value in enumerate(optimizer.betas):
        if not 0.0 <= value < 1.0:
            yield Problem(f"optimizer.betas.{index}", value, "out of range; give a value in [0, 1)")


def _check_pass_at_k(evaluation: EvaluationConfig) -> Iterator[Problem]:
    for k in evaluation.pass_at_k:
        if k > evaluation.num_samples:
            yield Problem(
                "evaluation.pass_at_k",
                list(evaluation.pass_at_k),
                f"pass@{k} needs at least {k} samples a prompt; raise evaluation.num_samples "
                f"(now {evaluation.num_samples}) or drop {k}",
            )


def _check_held_out(prompts: PromptsConfig) -> Iterator[Problem]:
    if prompts.train == prompts.held_out:
        yield Problem(
            "prompts.held_out", prompts.held_out, "the same file as prompts.train; give prompts never trained on"
        )


def _check_system_prompt(prompts: PromptsConfig) -> Iterator[Problem]:
    if prompts.system_prompt and prompts.template == "none":
        yield Problem(
            "prompts.system_prompt",
            prompts.system_prompt,
            'nothing renders it with prompts.template = "none"; use "chat", or leave it out',
        )


def _check_servers(rollout: RolloutConfig) -> Iterator[Problem]:
    if rollout.engine != "sglang" and rollout.servers:
        yield Problem(
            "rollout.servers",
            list(rollout.servers),
            f'nobody asks them with rollout.engine = "{rollout.engine}"; use "sglang", or leave them out',
        )
    if rollout.mode == "asynchronous" and rollout.engine != "sglang":
        yield Problem("rollout.mode", rollout.mode, 'collectors work on servers; use rollout.engine = "sglang"')
    if rollout.mode == "asynchronous" and rollout.weight_sync != "disk":
        yield Problem(
            "rollout.weight_sync",
            rollout.weight_sync,
            'servers that generate take new weights between requests only from files; use "disk" with '
            'rollout.mode = "asynchronous"',
        )
    for url in rollout.servers:
        if not url.startswith(("http://", "https://")):
            yield Problem("rollout.servers", url, "is no URL; write it as http://HOST:PORT")
    for url in sorted({url for url in rollout.servers if rollout.servers.count(url) > 1}):
        yield Problem("rollout.servers", url, "is there twice; name each server once")


def _check_parallel(parallel: ParallelConfig) -> Iterator[Problem]:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield Problem(
            "parallel.sequence_parallel",
            True,
            "cuts tokens over tensor-parallel ranks, and there is one; set false, or tensor_model_parallel_size >= 2",
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem("parallel.overlap_param_gather", True, "needs overlap_grad_reduce = true; set both, or neither")


def _check_launch(launch: LaunchConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    number = launch.num_rollout_nodes
    if number and rollout.engine != "sglang":
        yield Problem(
            "launch.num_rollout_nodes",
            number,
            f'they would run SGLang servers, and rollout.engine = "{rollout.engine}"; use "sglang", or give 0',
        )
    if number and rollout.servers:
        yield Problem(
            "rollout.servers",
            list(rollout.servers),
            "launched servers tell where they are; leave this out, or launch none",
        )
    if number and launch.min_rollout_nodes > number:
        yield Problem(
            "launch.min_rollout_nodes",
            launch.min_rollout_nodes,
            f"more than there are (launch.num_rollout_nodes = {number}); lower it",
        )
    if launch.stop_before_s >= 60 * launch.time_limit_minutes:
        yield Problem(
            "launch.stop_before_s",
            launch.stop_before_s,
            f"no less than the whole job (launch.time_limit_minutes = {launch.time_limit_minutes}); lower it",
        )


# each with the sections that it takes; it runs where all of them are right by themselves
CHECKS: Sequence[tuple[Callable[..., Iterator[Problem]], tuple[str, ...]]] = (
    (_check_group_shaping, ("reward", "rollout")),
    (_check_capacity, ("replay", "rollout", "updates")),
    (_check_importance, ("replay",)),
    (_check_micro_batch, ("prompts", "rollout", "updates")),
    (_check_schedule, ("optimizer", "run", "updates")),
    (_check_pass_at_k, ("evaluation",)),
    (_check_servers, ("rollout",)),
    (_check_parallel, ("parallel",)),
    (_check_launch, ("launch", "rollout")),
    (_check_held_out, ("prompts",)),
    (_check_system_prompt, ("prompts",)),
)
