"""From vocabulary-sharded logits to what an objective needs: log-probabilities, logsumexp values, the first logit.

The logits are Q-values, so logsumexp over the vocabulary is the soft value V(s) of the state before the next token.
Shape legend: B trajectories, T packed tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from reval_mcore.mcore.packing import MicroBatch
from reval_mcore.records import Reduce, TokenScores


class _VocabParallelLogsumexp(torch.autograd.Function):
    """logsumexp and target logit per token in two all-reduces: a MAX, then one SUM of the stacked pair.

    megatron-core's vocab_parallel_cross_entropy gives their difference only, leaves padded columns in, and overwrites
    fp32 logits. Backward: d logits = p * g_logsumexp + onehot * g_target, exact, with p kept from the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        tp_group: dist.ProcessGroup,
        num_valid: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = logits.shape[-1]
        first_column = tp_group.rank() * width
        values = logits if logits.dtype == torch.float64 else logits.float()
        num_real = min(max(num_valid - first_column, 0), width)
        if num_real < width:
            values = values.clone() if values is logits else values
            values[..., num_real:] = float("-inf")
        # a rank may hold padding only: its maximum is -inf, and the finite one of another rank wins
        maximum = values.amax(-1)
        _all_reduce(maximum, dist.ReduceOp.MAX, tp_group)
        exponentials = torch.exp(values - maximum[..., None])
        is_own = (targets >= first_column) & (targets < first_column + width)
        column = torch.where(is_own, targets - first_column, 0)
        own_logit = values.gather(-1, column[..., None])[..., 0]
        pair = torch.stack([exponentials.sum(-1), torch.where(is_own, own_logit, 0.0)])
        _all_reduce(pair, dist.ReduceOp.SUM, tp_group)
        total, target_logit = pair.unbind()
        ctx.save_for_backward(exponentials.div_(total[..., None]), column, is_own)
        ctx.dtype = logits.dtype
        return maximum + total.log(), target_logit

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        g_logsumexp, g_target = gradients
        probabilities, column, is_own = ctx.saved_tensors
        gradient = probabilities * g_logsumexp[..., None]
        gradient.scatter_add_(-1, column[..., None], (g_target * is_own)[..., None])
        return gradient.to(ctx.dtype), None, None, None


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)


def vocab_parallel_logsumexp(
    logits: torch.Tensor, targets: torch.Tensor, *, tp_group: dist.ProcessGroup, num_valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logsumexp [...], logit of the target [...]) over the whole vocabulary; differentiable in both.

    logits [..., V / TP], this rank's columns, left unchanged; targets [...] int64, global ids. Columns at or beyond
    `num_valid` are padding and take no part: a zero row there would anchor the logsumexp at an absolute level and be
    trained. fp32 throughout (fp64 for fp64 logits).
    """
    logsumexp, target_logit = _VocabParallelLogsumexp.apply(logits, targets, tp_group, num_valid)  # pyright: ignore[reportGeneralTypeIssues]
    return logsumexp, target_logit


def token_scores(
    logits: torch.Tensor, micro_batch: MicroBatch, *, tp_group: dist.ProcessGroup, num_valid: int
) -> TokenScores:
    """What an objective needs of one micro-batch, as far as this context-parallel rank holds it. logits [T, V / TP]."""
    logsumexp, target_logit = vocab_parallel_logsumexp(
        logits, micro_batch.targets, tp_group=tp_group, num_valid=num_valid
    )
    return TokenScores(
        logprob=torch.where(micro_batch.in_loss, target_logit - logsumexp, 0.0),
        in_loss=micro_batch.in_loss,
        is_first=micro_batch.is_first,
        segment_ids=micro_batch.segment_ids,
        first_logit=_at(target_logit, micro_batch.first_position),
        initial_value=_at(logsumexp, micro_batch.first_position),
        final_value=_at(logsumexp, micro_batch.last_position),
    )


def _at(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """values [T] at positions [B]; 0 where another rank holds the position (-1)."""
    return torch.where(positions >= 0, values[positions], 0.0)


class _SumOverRanks(torch.autograd.Function):
    """Forward: the sum over ranks. Backward: the gradient as it is, since each rank differentiates its own part."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def context_parallel_sum(group: dist.ProcessGroup) -> Reduce:
    """Turns partial sums [B] of context-parallel ranks into whole ones, on each of them."""
    if group.size() == 1:
        return lambda value: value
    return lambda value: _SumOverRanks.apply(value, group)  # pyright: ignore[reportReturnType]
