"""The plan of a run, by arithmetic: what `reval train CONFIG --dry-run` prints.

Reads the configuration and the model's config.json, nothing else: no torch, no GPU, no weights, no prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reval_mcore.architecture import ModelSpec, read_config_json, read_spec
from reval_mcore.config import Config
from reval_mcore.layout import check_layout, data_parallel_size
from reval_mcore.plan.memory import (
    GRANULARITIES,
    GpuMemory,
    Granularity,
    HostMemory,
    gpu_memory,
    host_memory,
    num_optimizer_shards,
)
from reval_mcore.plan.parameters import num_model_parameters
from reval_mcore.plan.traffic import (
    Checkpoint,
    Iteration,
    Replay,
    Run,
    Schedule,
    plan_checkpoint,
    plan_iteration,
    plan_replay,
    plan_run,
    plan_schedule,
)

GIB = 1 << 30
_MAX_BUBBLE = 0.3


@dataclass(frozen=True)
class World:
    """Processes of a run, one a GPU."""

    num_processes: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    data_parallel_size: int


@dataclass(frozen=True)
class Plan:
    config: Config
    config_path: Path
    spec: ModelSpec
    architecture: Path  # the file that the spec is from
    gpu_memory_bytes: int  # what a GPU has
    world: World
    num_parameters: int  # of the whole model, without padding
    gpu: GpuMemory
    gpu_by_granularity: dict[Granularity, GpuMemory]
    host: HostMemory
    iteration: Iteration
    schedule: Schedule
    replay: Replay
    run: Run
    checkpoint: Checkpoint

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(_warnings(self))


def make_plan(
    config: Config, config_path: Path, *, world_size: int | None = None, gpu_memory_gib: float = 80.0
) -> Plan:
    """The plan on `world_size` processes; by default on those that one copy of the model takes.

    Raises ConfigError where the model cannot have this layout, ValueError where nothing says what the model is.
    """
    if world_size is None:
        world_size = config.parallel.model_parallel_size
    if world_size < 1:
        raise ValueError(f"--world-size = {world_size}: no number of processes; give one >= 1")
    if gpu_memory_gib <= 0:
        raise ValueError(f"--gpu-memory-gib = {gpu_memory_gib:g}: no size of a GPU; give one > 0")
    spec, architecture = find_architecture(config, config_path)
    check_layout(config.parallel, spec, world_size)
    stages: dict[Granularity, list[GpuMemory]] = {
        each: list(gpu_memory(config, spec, world_size, each)) for each in GRANULARITIES
    }
    gpus: dict[Granularity, GpuMemory] = {
        each: max(of, key=lambda stage: stage.training_bytes) for each, of in stages.items()
    }
    num_shards = num_optimizer_shards(config.parallel, world_size)
    hosts = [host_memory(config, stage, num_shards) for stage in stages["none"]]
    iteration, run = plan_iteration(config), plan_run(config)
    return Plan(
        config=config,
        config_path=config_path,
        spec=spec,
        architecture=architecture,
        gpu_memory_bytes=round(gpu_memory_gib * GIB),
        world=_world(config, world_size),
        num_parameters=num_model_parameters(spec),
        gpu=gpus[config.parallel.recompute_granularity],
        gpu_by_granularity=gpus,
        host=max(hosts, key=lambda host: host.peak_bytes),
        iteration=iteration,
        schedule=plan_schedule(config, iteration, world_size),
        replay=plan_replay(config, iteration),
        run=run,
        checkpoint=plan_checkpoint(config, spec, run),
    )


def find_architecture(config: Config, config_path: Path) -> tuple[ModelSpec, Path]:
    """The spec, and the file it is from: config.json in model.hf_path, or, where there is no such directory,
    architectures/NAME.json beside the configuration, so that a run can be planned before its model is fetched."""
    hf_path = config.model.hf_path
    beside = config_path.parent / "architectures" / f"{hf_path.name}.json"
    if not hf_path.exists() and beside.is_file():
        return read_config_json(beside), beside
    try:
        return read_spec(hf_path), hf_path / "config.json"
    except ValueError as error:
        if hf_path.exists():
            raise
        raise ValueError(f"{error}; or put its config.json, which is all that a plan needs, at {beside}") from None


def _world(config: Config, world_size: int) -> World:
    parallel = config.parallel
    return World(
        num_processes=world_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        data_parallel_size=data_parallel_size(parallel, world_size),
    )


def _warnings(plan: Plan) -> Iterator[str]:
    """What is certain to be wrong, or to be other than was meant."""
    yield from _memory_warnings(plan)
    schedule, stages = plan.schedule, plan.world.pipeline_model_parallel_size
    number = schedule.typical_num_micro_batches
    of_update = f"{number} micro-batches a rank in an update of {schedule.num_trajectories} trajectories"
    remedy = "lower updates.max_tokens_per_micro_batch, give larger updates, or fewer stages"
    if number < stages:
        yield f"{of_update}, fewer than the {stages} pipeline stages: some stages always wait; {remedy}"
    elif schedule.bubble > _MAX_BUBBLE:
        yield f"{of_update}: {stages} pipeline stages wait {schedule.bubble:.0%} of the time; {remedy}"
    longest, positions = plan.iteration.max_length_tokens, plan.spec.max_position_embeddings
    if longest > positions:
        yield (
            f"prompts.max_tokens + rollout.max_response_tokens = {longest}: more than the model's {positions} "
            "positions; training refuses this, lower one"
        )
    if plan.config.updates.per_iteration > 1 and plan.replay.num_iterations_held < 2:
        yield (
            f"replay.capacity = {plan.replay.capacity}: holds {plan.replay.num_iterations_held:.1f} iterations, so "
            "that updates repeat what is fresh and hardly replay; raise it"
        )
    interval = plan.config.reference.reset_interval
    if interval != "never" and interval > plan.run.num_iterations:
        yield f"reference.reset_interval = {interval}: the run ends before, after {plan.run.num_iterations} iterations"


def _memory_warnings(plan: Plan) -> Iterator[str]:
    gpu, limit = plan.gpu, plan.gpu_memory_bytes
    if gpu.peak_bytes <= limit:
        return
    needs = f"a GPU needs {gpu.peak_bytes / GIB:.1f} GiB and has {limit / GIB:g}: "
    if gpu.training_bytes > limit:
        yield needs + (
            f"training alone takes {gpu.training_bytes / GIB:.1f}; lower updates.max_tokens_per_micro_batch, set "
            "parallel.recompute_granularity, or cut the model over more processes"
        )
    elif gpu.training_bytes + gpu.engine_bytes > limit:
        yield needs + (
            f"training takes {gpu.training_bytes / GIB:.1f}, and the embedded engine's weights do not fit beside it; "
            "lower updates.max_tokens_per_micro_batch, or cut the model over more processes"
        )
    else:
        yield needs + "generation is what is too much; lower rollout.max_batch_size"
