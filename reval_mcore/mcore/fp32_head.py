"""The output layer of a bf16 model with fp32 logits: bf16 in, products added up in fp32, nothing rounded to bf16.

A bf16 logit is off by up to 4e-2 (facts on the loss head: 8 bits of mantissa at 16), and a trajectory squares a sum of
thousands of them. The GEMM costs the same. Backward rounds the logits' gradient to bf16 for its two GEMMs, 1.5e-3
relative, which is what a bf16 activation costs anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class _Fp32Product(torch.autograd.Function):
    """hidden [..., H] and weight [V, H], both bf16 -> hidden @ weight.T, fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            flat = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return flat.view(*hidden.shape[:-1], -1)
        return hidden.float() @ weight.float().t()  # the CPU has no such GEMM; the same products, added up in fp32

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        return gradient @ weight, gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)


def _forward_impl(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup,
    **_: Any,
) -> torch.Tensor:
    """In the place of ColumnParallelLinear's, with the same communication."""
    assert bias is None
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    product = _Fp32Product.apply(input, weight)
    assert isinstance(product, torch.Tensor)
    return product


def use_fp32_logits(model: GPTModel) -> None:
    """On the last pipeline stage; elsewhere there is nothing to do."""
    if model.post_process:
        model.output_layer._forward_impl = _forward_impl
