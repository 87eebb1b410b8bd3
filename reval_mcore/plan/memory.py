"""Memory of the largest rank, by part: counted from what the code allocates, before anything is allocated.

Shares of a token are in bytes on one rank; e is the size of an element of weights and activations, 2 in bf16. The layer
formulas are those of megatron-core 0.16.1 with the transformer_config of mcore/model.py (no fused kernels but attention
and norms), checked against the tensors that autograd keeps on a CPU. Not counted: the CUDA context, NCCL's buffers and
fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import Config, ParallelConfig
from reval_mcore.layout import data_parallel_size
from reval_mcore.plan.parameters import (
    key_size,
    num_bucket_parameters,
    num_model_parameters,
    num_stage_parameters,
    query_size,
)

Granularity = Literal["none", "selective", "full"]
GRANULARITIES: tuple[Granularity, ...] = ("none", "selective", "full")


def element_bytes(config: Config) -> int:
    return 2 if config.model.precision == "bf16" else 4


def optimizer_bytes_per_parameter(config: Config) -> int:
    """Adam's two fp32 moments, and the fp32 master weight of a bf16 one (an fp32 weight is its own)."""
    return 12 if config.model.precision == "bf16" else 8


def num_optimizer_shards(parallel: ParallelConfig, world_size: int) -> int:
    """Context-parallel ranks share the optimizer's state as data-parallel ones do."""
    return data_parallel_size(parallel, world_size) * parallel.context_parallel_size


# ---------------------------------------------------------------- activations


def layer_bytes_per_token(
    spec: ModelSpec, parallel: ParallelConfig, e: int, granularity: Granularity, *, padded_attention: bool = False
) -> float:
    """What one layer keeps for its backward pass.

    With flash attention, which keeps no scores, "selective" has nothing to forget but the logsumexp, and keeps a view
    of the whole query-key-value product for it. `padded_attention` is the local core attention: it keeps padded copies,
    of at most twice the tokens, and its output twice more; what it gathers under context parallelism is not counted.
    """
    tp = parallel.tensor_model_parallel_size
    hidden = spec.hidden_size / (tp if parallel.sequence_parallel else 1)
    if granularity == "full":
        return e * hidden
    query, key, ffn, heads = (
        n / tp for n in (query_size(spec), key_size(spec), spec.ffn_hidden_size, spec.num_attention_heads)
    )
    norms = 2 * (2 * e * hidden + 4 * hidden / spec.hidden_size)  # input, output, fp32 reciprocal of the norm
    rope = 4 * e * spec.kv_channels  # cosines and sines, for queries and for keys
    attention = e * (2 * query + 2 * key)  # queries, keys, values, output (which the projection's input is, too)
    if granularity == "selective":
        attention += e * (query + key)
    else:
        attention += 4 * heads
        if padded_attention:
            attention = 2 * attention + 2 * e * query
    if spec.family.qk_layernorm:
        attention += e * (query + 2 * key) + 4 * (heads + spec.num_query_groups / tp)
    mlp = 5 * e * ffn  # gate and up together, silu(gate), up + offset, their product
    return norms + rope + attention + mlp


def head_bytes_per_token(spec: ModelSpec, parallel: ParallelConfig) -> float:
    """The largest moment of the loss head, its forward pass: fp32 logits, less their maximum, and the exponentials
    (saved, as probabilities). A rank with padded columns masks them in a copy of the logits."""
    tp = parallel.tensor_model_parallel_size
    padded = spec.padded_vocab_size(tp)
    return (16 if padded > spec.vocab_size else 12) * padded / tp


def _mlp_backward_bytes_per_token(spec: ModelSpec, parallel: ParallelConfig, e: int) -> float:
    return 2 * e * spec.ffn_hidden_size / parallel.tensor_model_parallel_size


# ---------------------------------------------------------------- a GPU


@dataclass(frozen=True)
class GpuMemory:
    """Of one rank, in bytes. What is always there, and what one of the phases adds."""

    stage: int
    num_parameters: int
    num_bucket_parameters: int
    num_micro_batches_in_flight: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    engine_bytes: int  # weights of the embedded engine
    activations_bytes: int  # kept between forward and backward pass
    head_bytes: int  # 0 on all stages but the last
    layer_bytes: int  # backward pass of a layer, with what it computes again
    step_bytes: int  # the optimizer step's largest temporary
    save_bytes: int  # a checkpoint: a bucket of one of the optimizer's three tensors, gathered over ranks
    generation_bytes: int  # the embedded engine at work: its cache, or the prompts' pass through an MLP

    @property
    def resident_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.engine_bytes

    @property
    def pass_bytes(self) -> int:
        """The head's largest moment comes before the first layer's backward pass."""
        return self.activations_bytes + max(self.head_bytes, self.layer_bytes)

    @property
    def training_bytes(self) -> int:
        """The most that training takes, without an engine."""
        phases = max(self.pass_bytes, self.step_bytes, self.save_bytes)
        return self.resident_bytes - self.engine_bytes + phases

    @property
    def peak_bytes(self) -> int:
        return max(self.training_bytes + self.engine_bytes, self.resident_bytes + self.generation_bytes)


def gpu_memory(config: Config, spec: ModelSpec, world_size: int, granularity: Granularity) -> Iterator[GpuMemory]:
    """Of a rank of each pipeline stage, at full micro-batches. One process holds one engine, with a whole model."""
    parallel, e = config.parallel, element_bytes(config)
    pp, cp = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    tokens = -(-config.updates.max_tokens_per_micro_batch // cp)
    num_shards = num_optimizer_shards(parallel, world_size)
    padded_attention = config.model.implementation == "local"
    kept = layer_bytes_per_token(spec, parallel, e, granularity, padded_attention=padded_attention)
    whole = layer_bytes_per_token(spec, parallel, e, "none", padded_attention=padded_attention)
    again = whole if granularity == "full" else 0
    for stage in range(pp):
        is_last = stage == pp - 1
        number = num_stage_parameters(spec, parallel, stage)
        bucket = num_bucket_parameters(
            spec, parallel, stage, data_parallel_size=data_parallel_size(parallel, world_size)
        )
        in_flight = pp - stage  # of the 1F1B schedule, where there are that many
        layers = spec.num_layers // pp * kept * in_flight
        final_norm = layer_bytes_per_token(spec, parallel, e, "full") * 2 if is_last else 0
        yield GpuMemory(
            stage=stage,
            num_parameters=number,
            num_bucket_parameters=bucket,
            num_micro_batches_in_flight=in_flight,
            weights_bytes=e * number,
            gradients_bytes=4 * number,
            optimizer_bytes=optimizer_bytes_per_parameter(config) * number // num_shards,
            engine_bytes=e * num_model_parameters(spec),
            activations_bytes=round(tokens * (layers + final_norm)),
            head_bytes=round(tokens * head_bytes_per_token(spec, parallel)) if is_last else 0,
            layer_bytes=round(tokens * (again + _mlp_backward_bytes_per_token(spec, parallel, e))),
            step_bytes=4 * number // num_shards,
            save_bytes=4 * bucket + 4 * bucket // num_shards if config.checkpoint.interval != "never" else 0,
            generation_bytes=_generation_bytes(config, spec, e),
        )


def _generation_bytes(config: Config, spec: ModelSpec, e: int) -> int:
    """At prompts and responses of full length: the key-value cache and the sampler's numbers, or the first pass."""
    rollout = config.rollout
    longest = config.prompts.max_tokens + rollout.max_response_tokens
    cache = longest * spec.num_layers * 2 * key_size(spec) * e
    sampling = 24 * spec.vocab_size  # logits in fp32, and in fp64 for the draw: them, probabilities, their sums
    first_pass = config.prompts.max_tokens * 3 * spec.ffn_hidden_size * e
    return rollout.max_batch_size * max(cache + sampling, first_pass)


# ---------------------------------------------------------------- the host


@dataclass(frozen=True)
class HostMemory:
    """Of the process that needs most, in bytes."""

    reference_bytes: int
    swap_bytes: int  # the current weights, while those of the reference are on the GPU; kept for the next time
    loading_bytes: int  # the embedded engine's weights, until they are on the GPU
    save_bytes: int  # while a checkpoint is made
    background_bytes: int  # while it is written, where that is in the background

    @property
    def peak_bytes(self) -> int:
        """Loading comes before the first swap."""
        running = self.swap_bytes + max(self.save_bytes, self.background_bytes)
        return self.reference_bytes + max(running, self.loading_bytes)


def host_memory(config: Config, gpu: GpuMemory, num_shards: int) -> HostMemory:
    """For a checkpoint every rank has the optimizer's three fp32 tensors whole on its host, gathered bucket by bucket.

    While it gathers there are beside them, of a bucket, its own shards, and of one tensor the shards received, their
    concatenation, and that of the tensor before; while it writes, a clone of each part, and the weights.
    """
    state, bucket = 12 * gpu.num_parameters, 12 * gpu.num_bucket_parameters
    saves = config.checkpoint.interval != "never"
    return HostMemory(
        reference_bytes=gpu.weights_bytes,
        swap_bytes=gpu.weights_bytes,
        loading_bytes=gpu.engine_bytes,
        save_bytes=state + max(bucket + bucket // num_shards, state + gpu.weights_bytes) if saves else 0,
        background_bytes=state + 2 * gpu.weights_bytes if saves and config.checkpoint.async_save else 0,
    )
