"""How many parameters there are, and how many a rank holds, as megatron-core's GPTModel makes them."""

from __future__ import annotations

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import ParallelConfig


def query_size(spec: ModelSpec) -> int:
    return spec.num_attention_heads * spec.kv_channels


def key_size(spec: ModelSpec) -> int:
    return spec.num_query_groups * spec.kv_channels


def num_layer_parameters(spec: ModelSpec, tensor_model_parallel_size: int) -> int:
    """Of one layer on one tensor-parallel rank; norms are whole on each."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    query, qkv = query_size(spec), query_size(spec) + 2 * key_size(spec)
    cut = hidden * (qkv + query + 3 * ffn) + (qkv if spec.family.qkv_bias else 0)
    whole = 2 * hidden + (2 * spec.kv_channels if spec.family.qk_layernorm else 0)
    return cut // tensor_model_parallel_size + whole


def num_stage_parameters(spec: ModelSpec, parallel: ParallelConfig, stage: int) -> int:
    """Of one tensor-parallel rank of a pipeline stage.

    The vocabulary is padded. Where the embedding is tied to the output layer and they lie on different stages, the last
    stage has a copy of its own, with gradients and optimizer state.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    table = spec.padded_vocab_size(tp) // tp * spec.hidden_size
    is_first, is_last = stage == 0, stage == pp - 1
    has_output_layer = is_last and not (spec.tied_embeddings and is_first)
    layers = spec.num_layers // pp * num_layer_parameters(spec, tp)
    return layers + table * (is_first + has_output_layer) + spec.hidden_size * is_last


def num_bucket_parameters(spec: ModelSpec, parallel: ParallelConfig, stage: int, *, data_parallel_size: int) -> int:
    """At most, of the largest bucket of gradients: what is reduced, and gathered for a checkpoint, at a time.

    megatron-core makes several where their reduction overlaps the backward pass, and on the first stage only.
    """
    number = num_stage_parameters(spec, parallel, stage)
    if not parallel.overlap_grad_reduce or stage > 0:
        return number
    tp = parallel.tensor_model_parallel_size
    largest_parameter = spec.hidden_size * max(spec.padded_vocab_size(tp), 2 * spec.ffn_hidden_size) // tp
    return min(number, max(40_000_000, 1_000_000 * data_parallel_size) + largest_parameter)


def num_model_parameters(spec: ModelSpec, *, vocab_size: int | None = None) -> int:
    """Of the whole model as Hugging Face has it, a tied table counted once; or with another number of rows in it."""
    num_tables = 1 if spec.tied_embeddings else 2
    tables = num_tables * (vocab_size or spec.vocab_size) * spec.hidden_size
    return spec.num_layers * num_layer_parameters(spec, 1) + tables + spec.hidden_size
