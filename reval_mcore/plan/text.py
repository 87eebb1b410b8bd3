"""A plan as aligned text."""

from __future__ import annotations

from collections.abc import Iterator

from reval_mcore.plan import GIB, Plan
from reval_mcore.plan.memory import GRANULARITIES
from reval_mcore.plan.traffic import TYPICAL_FRACTION

_GPUS_PER_NODE = 8
Row = tuple[str, str, str]  # name, value, remark


def render(plan: Plan) -> str:
    sections = {
        "model": _model(plan),
        "processes": _processes(plan),
        "memory of a GPU, on the rank that needs most": _gpu(plan),
        "memory of the host, for each process": _host(plan),
        "an iteration": _iteration(plan),
        "replay": _replay(plan),
        "the run": _run(plan),
    }
    lines = [f"plan of {plan.config_path}: by arithmetic, nothing is started or written", ""]
    for title, rows in sections.items():
        lines += [title, *(f"  {name:26s} {value:>14s}   {remark}".rstrip() for name, value, remark in rows), ""]
    lines += [f"WARNING: {warning}" for warning in plan.warnings] or ["nothing speaks against this plan"]
    return "\n".join(lines)


def _size(number: float) -> str:
    """With three digits: 1.78 GiB, 14.2 GiB, 105 MiB."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000.0 and len(units) > 1:
        value /= 1024.0
        units.pop(0)
    return f"{value:.{0 if value >= 100 or units[0] == 'B' else 1 if value >= 10 else 2}f} {units[0]}"


def _count(number: float) -> str:
    for limit, letter in ((1e9, " B"), (1e6, " M")):
        if number >= limit:
            return f"{number / limit:.2f}{letter}"
    return f"{number:,.0f}"


def _model(plan: Plan) -> Iterator[Row]:
    spec, world = plan.spec, plan.world
    path = plan.config.model.hf_path
    known = f"{path} is not there; its shape is from {plan.architecture}"
    yield "family", spec.model_type, known if plan.architecture.parent != path else str(path)
    yield "layers", str(spec.num_layers), f"hidden size {spec.hidden_size}, MLP {spec.ffn_hidden_size}"
    yield "attention heads", str(spec.num_attention_heads), f"{spec.num_query_groups} key-value heads"
    padded = spec.padded_vocab_size(world.tensor_model_parallel_size)
    tied = "embedding and output layer are one" if spec.tied_embeddings else "embedding and output layer are two"
    yield "vocabulary", f"{spec.vocab_size:,}", f"padded to {padded:,}; {tied}"
    yield "positions", f"{spec.max_position_embeddings:,}", ""
    yield "parameters", _count(plan.num_parameters), f"{plan.num_parameters:,}"
    stage = f", on pipeline stage {plan.gpu.stage}" if world.pipeline_model_parallel_size > 1 else ""
    yield "  on one rank", _count(plan.gpu.num_parameters), f"{plan.gpu.num_parameters:,}{stage}"


def _processes(plan: Plan) -> Iterator[Row]:
    world = plan.world
    yield "in all", str(world.num_processes), "one a GPU; --world-size plans for more"
    yield "tensor parallel", str(world.tensor_model_parallel_size), _sequence_parallel(plan)
    yield "pipeline stages", str(world.pipeline_model_parallel_size), ""
    yield "context parallel", str(world.context_parallel_size), ""
    yield "data parallel", str(world.data_parallel_size), ""


def _sequence_parallel(plan: Plan) -> str:
    return "with sequence parallelism" if plan.config.parallel.sequence_parallel else ""


def _gpu(plan: Plan) -> Iterator[Row]:
    gpu, config = plan.gpu, plan.config
    yield "weights", _size(gpu.weights_bytes), config.model.precision
    yield "gradients", _size(gpu.gradients_bytes), "fp32"
    num_shards = plan.world.data_parallel_size * plan.world.context_parallel_size
    yield "optimizer", _size(gpu.optimizer_bytes), f"Adam in fp32, one of {num_shards} shards"
    in_flight = gpu.num_micro_batches_in_flight
    what = "a micro-batch" if in_flight == 1 else f"{in_flight} micro-batches"
    tokens = f"{what} of {config.updates.max_tokens_per_micro_batch:,} tokens"
    yield "+ activations", _size(gpu.activations_bytes), f"{tokens}; {_attention(plan)}"
    yield "  + loss head", _size(gpu.head_bytes), "its largest moment, before the backward pass"
    yield "  or a layer's backward", _size(gpu.layer_bytes), "with what it computes again"
    yield "or the optimizer's step", _size(gpu.step_bytes), ""
    yield "or a checkpoint", _size(gpu.save_bytes), "the optimizer's state, gathered"
    by = ", ".join(f"{each} {_size(plan.gpu_by_granularity[each].training_bytes)}" for each in GRANULARITIES)
    yield "= training, at most", _size(gpu.training_bytes), f"by recomputation: {by}"
    yield "embedded engine", _size(gpu.engine_bytes), "a whole model"
    remark = f"{config.rollout.max_batch_size} sequences of full length, in place of activations"
    yield "+ generation", _size(gpu.generation_bytes), remark
    yield (
        "= at most",
        _size(gpu.peak_bytes),
        f"{gpu.peak_bytes / plan.gpu_memory_bytes:.0%} of {plan.gpu_memory_bytes / GIB:g} GiB",
    )
    yield "  not counted", "", "CUDA context, NCCL, fragmentation: some GiB"


def _attention(plan: Plan) -> str:
    return "the local attention pads" if plan.config.model.implementation == "local" else "flash attention"


def _host(plan: Plan) -> Iterator[Row]:
    host = plan.host
    yield "reference weights", _size(host.reference_bytes), "pinned"
    yield "current weights", _size(host.swap_bytes), "kept while those of the reference are on the GPU"
    yield "engine, at the start", _size(host.loading_bytes), "before it goes to the GPU"
    yield "while a checkpoint is made", _size(host.save_bytes), "each rank gathers the optimizer's state"
    if host.background_bytes:
        yield "while it is written", _size(host.background_bytes), "in the background"
    on_node = min(plan.world.num_processes, _GPUS_PER_NODE)
    yield "at most", _size(host.peak_bytes), f"{_size(on_node * host.peak_bytes)} for {on_node} processes on a node"


def _iteration(plan: Plan) -> Iterator[Row]:
    iteration, schedule, config = plan.iteration, plan.schedule, plan.config
    rollout = config.rollout
    yield (
        "fresh trajectories",
        f"{iteration.num_trajectories:,}",
        f"{rollout.num_prompts} prompts x {rollout.num_responses} responses",
    )
    yield "tokens, at most", _count(iteration.max_tokens), f"{iteration.max_length_tokens:,} each"
    yield "  typical", _count(iteration.typical_tokens), f"taken as {TYPICAL_FRACTION:g} of the most"
    yield "updates", str(config.updates.per_iteration), f"the smallest of {schedule.num_trajectories:,} trajectories"
    yield (
        "micro-batches a rank",
        f"{schedule.typical_num_micro_batches:,}",
        f"in an update, typical; at most {schedule.max_num_micro_batches:,}",
    )
    yield "pipeline bubble", f"{schedule.bubble:.1%}", "(p - 1) / (m + p - 1), typical"


def _replay(plan: Plan) -> Iterator[Row]:
    replay = plan.replay
    yield "trajectories", f"{replay.capacity:,}", f"those of the last {replay.num_iterations_held:g} iterations"
    yield "uses of a trajectory", f"{replay.uses_per_trajectory:.3g}", "expected; the replay ratio K x batch / fresh"
    yield "  never used", f"{replay.unused_fraction:.1%}", ""
    yield "on disk, at most", _size(replay.disk_bytes), "before compression, with what kept checkpoints need"
    yield "in memory, at most", _size(replay.memory_bytes), ""


def _run(plan: Plan) -> Iterator[Row]:
    run, config = plan.run, plan.config
    yield "iterations", f"{run.num_iterations:,}", f"{run.num_updates:,} updates"
    trajectories = run.num_iterations * plan.iteration.num_trajectories
    yield "trajectories", _count(trajectories), f"{_count(trajectories / config.rollout.num_responses)} prompts"
    first = f"the first after iteration {config.reference.reset_interval}" if run.num_resets else ""
    yield "reference resets", str(run.num_resets), first
    yield "checkpoints", str(run.num_checkpoints), f"{_size(plan.checkpoint.bytes_each)} each"
    yield "  on disk, at most", _size(plan.checkpoint.disk_bytes), f"{plan.checkpoint.num_kept} at a time"
