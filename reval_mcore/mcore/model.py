"""A megatron-core GPTModel from an HF directory."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import ModelConfig, ParallelConfig
from reval_mcore.layout import check_layout
from reval_mcore.mcore.fp32_head import use_fp32_logits
from reval_mcore.mcore.hf_directory import load_weights
from reval_mcore.mcore.hf_mapping import global_names, hf_names
from reval_mcore.mcore.local_layers import PackedAttention, RMSNorm
from reval_mcore.mcore.packing import MicroBatch
from reval_mcore.mcore.topology import Topology
from reval_mcore.mcore.weight_checkpoint import load_checkpoint_weights


def resolve_implementation(config: ModelConfig) -> str:
    """ "te" or "local". Raises ValueError where Transformer Engine is asked for and cannot run."""
    can_run = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()
    if config.implementation == "te" and not can_run:
        raise ValueError(
            'model.implementation = "te": Transformer Engine needs a GPU and pip install "reval_mcore[te]"; '
            'install it, or give "local" or "auto"'
        )
    return "te" if can_run and config.implementation != "local" else "local"


def fuses_weight_gradients(topology: Topology) -> bool:
    """Whether a weight's gradient GEMM adds to the gradient buffer itself.

    The kernel is Apex's; the output layer, which is megatron-core's own in every case, refuses the setting without it.
    """
    return topology.device.type == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_config(spec: ModelSpec, config: ModelConfig, topology: Topology) -> TransformerConfig:
    bf16 = config.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    parallel = topology.parallel
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.kv_channels,
        layernorm_epsilon=spec.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.family.qkv_bias,
        qk_layernorm=spec.family.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        variable_seq_lengths=True,  # packs differ in length, so pipeline stages send the shape first
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, even without experts
        batch_p2p_comm=True,
        deallocate_pipeline_outputs=True,
        **_recompute(parallel),
        # gradients become a sum divided by the count that the loss function returns: see Learner.update
        calculate_per_token_loss=True,
        attention_softmax_in_fp32=True,
        # weights are loaded, not drawn; a model on the CPU cannot be made by the GPU initialisation
        perform_initialization=False,
        use_cpu_initialization=topology.device.type == "cpu",
        gradient_accumulation_fusion=fuses_weight_gradients(topology),
        # there is no bias, dropout or masked softmax to fuse
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    match parallel.recompute_granularity:
        case "none":
            return {}
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        case "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _layer_spec(config: TransformerConfig, implementation: str) -> Any:
    """A layer spec, or a block spec with it; megatron-core takes either and types neither's parts."""
    if implementation == "te":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer: Any = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    norm: Any = RMSNorm  # the final norm belongs to the block, not to a layer
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)


def build_model(config: ModelConfig, spec: ModelSpec, topology: Topology) -> GPTModel:
    """The model of `config.hf_path` with its weights or those of `config.checkpoint`, in `config.precision`."""
    tp = topology.groups.tp
    check_layout(topology.parallel, spec, topology.world_size)
    transformer = transformer_config(spec, config, topology)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=_layer_spec(transformer, resolve_implementation(config)),
        vocab_size=spec.padded_vocab_size(tp.size()),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope.theta,  # pyright: ignore[reportArgumentType]  (annotated int, used as a number)
        rope_scaling=spec.rope.scaling_factor != 1.0,
        rope_scaling_factor=spec.rope.scaling_factor,
        pg_collection=topology.groups,
    )
    if config.has_checkpoint:
        load_checkpoint_weights(model, config.checkpoint, spec)
    else:
        load_weights(model, config.hf_path, spec, tp_size=tp.size(), tp_rank=tp.rank())
    _mark_shards(model, spec)
    if transformer.bf16:
        use_fp32_logits(model)
    return model.to(topology.device)


def _mark_shards(model: GPTModel, spec: ModelSpec) -> None:
    """Mark weights that differ between tensor-parallel ranks; megatron-core does so only where it initializes them.

    The gradient norm takes an unmarked parameter for a copy of rank 0's and counts it there alone.
    """
    for name, parameter in global_names(model):
        layout, _ = hf_names(name, spec)
        if layout != "replicated":
            parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]


def wrap_precision(model: GPTModel) -> torch.nn.Module:
    """bf16 weights and activations where the config says so; logits are fp32 in either case."""
    return Float16Module(model.config, model) if model.config.bf16 else model


def forward_logits(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Logits of this rank's vocabulary shard, [1, T, V / TP]; on earlier pipeline stages the hidden states."""
    return forward_packed(
        model, micro_batch.tokens, micro_batch.position_ids, micro_batch.cu_seqlens, micro_batch.max_seqlen
    )


def forward_packed(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """The same for sequences end to end: tokens and position_ids int64 [T], cu_seqlens int32."""
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    return model(
        input_ids=tokens[None],
        position_ids=position_ids[None],
        attention_mask=None,
        packed_seq_params=packed,
    )
