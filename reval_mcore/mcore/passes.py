"""Passes over a batch: forward only, or forward and backward, under any layout.

Every rank is given the whole batch and gets whole results. In between, a data-parallel rank takes its micro-batches, a
context-parallel rank its positions, the last pipeline stage has the logits; per-trajectory sums are completed before
anything is squared, and gradients are those of a sum of losses that the caller has divided by the global count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from reval_mcore.architecture import ModelSpec
from reval_mcore.mcore.loss_head import context_parallel_sum, token_scores
from reval_mcore.mcore.model import forward_logits, wrap_precision
from reval_mcore.mcore.packing import Cut, MicroBatch, pack
from reval_mcore.mcore.topology import Topology
from reval_mcore.records import Batch, Objective, Scores, Targets, TokenScores

Details = dict[str, torch.Tensor]  # [B] each, of a micro-batch; "logprob" is [T]
# (loss to differentiate, count, details kept for the caller), as megatron-core's schedules want it
LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, Details]]
_SCORES = ("trajectory_score", "initial_value", "final_value")


def wrap_model(
    model: GPTModel, topology: Topology, *, use_distributed_optimizer: bool = True
) -> DistributedDataParallel:
    """The model with its gradient buffers: gradients in fp32 (of bf16 weights too), summed over ranks."""
    parallel = topology.parallel
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=model.config.bf16,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather and use_distributed_optimizer,
        ),
        wrap_precision(model),
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = ddp.no_sync
    return ddp


@dataclass(frozen=True)
class BackwardResult:
    """Per-trajectory results of a backward pass, in the order of the batch."""

    loss: np.ndarray  # float64 [B]
    residual: np.ndarray  # float64 [B]
    metrics: Mapping[str, np.ndarray]  # float64 [B] each


class Passes:
    """Runs micro-batches through a model."""

    def __init__(
        self, ddp: DistributedDataParallel, spec: ModelSpec, topology: Topology, *, max_tokens_per_micro_batch: int
    ) -> None:
        self._ddp = ddp
        self._spec = spec
        self._topology = topology
        self._max_tokens = max_tokens_per_micro_batch
        groups = topology.groups
        self._cut = Cut(
            context_parallel_size=groups.cp.size(),
            context_parallel_rank=groups.cp.rank(),
            sequence_parallel_size=groups.tp.size() if topology.parallel.sequence_parallel else 1,
        )
        self._reduce = context_parallel_sum(groups.cp)
        self._forward_backward = get_forward_backward_func()

    # ------------------------------------------------------------ what is asked for

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Trajectory scores, values and log-probabilities with the current weights; collective."""

        def keep(logits: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Details]:
            tokens = self._token_scores(logits, micro_batch)
            details = {
                "trajectory_score": self._reduce(tokens.trajectory_score()),
                "initial_value": self._reduce(tokens.initial_value),
                "final_value": self._reduce(tokens.final_value),
                "logprob": tokens.logprob,
            }
            return logits.new_zeros(()), self._no_count(), details

        columns = {name: np.zeros(len(batch)) for name in _SCORES}
        logprobs = np.zeros(len(batch.tokens), np.float32)
        for micro_batch, details in self._run(batch, keep, forward_only=True):
            logprob = details.pop("logprob")
            if self._speaks:
                _scatter_logprobs(logprobs, micro_batch, logprob)
            self._collect(columns, micro_batch, details)
        return Scores(**self._share(columns), logprobs=self._sum_over_ranks(logprobs))

    def backward(self, batch: Batch, targets: Targets, objective: Objective, *, num_passes: int = 1) -> BackwardResult:
        """Put the gradient of the mean loss over the trajectories of non-zero weight into the buffers; collective.

        In one pass, or in two with the same gradient: the first only scores, the second differentiates what the loss
        is to first order in the scores.
        """
        self._ddp.zero_grad_buffer()
        total = normalizer(targets)
        if num_passes == 2:
            return self._backward_in_two(batch, targets, objective, total)
        device = self._topology.device

        def loss(logits: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Details]:
            tokens = self._token_scores(logits, micro_batch)
            output = objective(tokens, select(targets, micro_batch.members, device), self._reduce)
            details = {"loss": output.loss.detach(), "residual": output.residual, **output.metrics}
            return output.loss.sum() / total, self._no_count(), details

        columns: dict[str, np.ndarray] = {}
        for micro_batch, details in self._run(batch, loss, forward_only=False):
            self._collect(columns, micro_batch, details, size=len(batch))
        shared = self._share(columns, size=len(batch))
        return BackwardResult(shared.pop("loss"), shared.pop("residual"), shared)

    def _backward_in_two(self, batch: Batch, targets: Targets, objective: Objective, total: float) -> BackwardResult:
        result, by_score, by_final_value = linearize(self.score(batch), targets, objective)
        device = self._topology.device

        def loss(logits: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Details]:
            tokens = self._token_scores(logits, micro_batch)
            rows = torch.from_numpy(micro_batch.members)
            # linear, so each context-parallel rank differentiates its own part of the sums, and nothing is reduced
            value = by_score[rows].to(device) * tokens.trajectory_score()
            value = value + by_final_value[rows].to(device) * tokens.final_value
            return value.sum() / total, self._no_count(), {}

        self._run(batch, loss, forward_only=False)
        return result

    # ------------------------------------------------------------ one pass

    def _run(self, batch: Batch, loss: LossFunction, *, forward_only: bool) -> Sequence[tuple[MicroBatch, Details]]:
        """megatron-core's schedule over the micro-batches of this rank; each with what `loss` returned for it.

        Empty on all pipeline stages but the last.
        """
        micro_batches = pack(
            batch,
            max_tokens=self._max_tokens,
            device=self._topology.device,
            cut=self._cut,
            data_parallel_size=self._topology.groups.dp.size(),
            data_parallel_rank=self._topology.groups.dp.rank(),
        )

        def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            micro_batch = next(data)
            return forward_logits(model, micro_batch), lambda output: loss(output[0], micro_batch)

        details = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self._ddp],
            num_microbatches=len(micro_batches),
            seq_length=self._max_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if not self._topology.is_last_stage:
            return []
        return list(zip(micro_batches, details, strict=True))

    def _token_scores(self, logits: torch.Tensor, micro_batch: MicroBatch) -> TokenScores:
        return token_scores(logits, micro_batch, tp_group=self._topology.groups.tp, num_valid=self._spec.vocab_size)

    def _no_count(self) -> torch.Tensor:
        """megatron-core divides gradients by the sum of these where it is not 0; the loss is divided already."""
        return torch.zeros((), dtype=torch.int, device=self._topology.device)

    # ------------------------------------------------------------ results, from the ranks that have them to all

    @property
    def _speaks(self) -> bool:
        """Of the ranks that hold the same results, one adds them in."""
        return self._topology.is_last_stage and self._topology.groups.tp.rank() == 0

    def _collect(
        self, columns: dict[str, np.ndarray], micro_batch: MicroBatch, details: Details, *, size: int = 0
    ) -> None:
        """Put the rows of a micro-batch in their places, on the first of its context-parallel ranks."""
        for name, values in details.items():
            column = columns.setdefault(name, np.zeros(size))
            if self._speaks and self._cut.context_parallel_rank == 0:
                column[micro_batch.members] = _numpy(values)

    def _share(self, columns: dict[str, np.ndarray], *, size: int = 0) -> dict[str, np.ndarray]:
        names = self._first(sorted(columns))
        found = [columns.get(name, np.zeros(size)) for name in names]
        return dict(zip(names, self._sum_over_ranks(np.stack(found)), strict=True)) if found else {}

    def _first(self, names: list[str]) -> list[str]:
        """The names that the last pipeline stage has."""
        if self._topology.groups.pp.size() == 1:
            return names
        group = self._topology.groups.pp
        box = [names]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, group.size() - 1), group=group)
        return box[0]

    def _sum_over_ranks(self, values: np.ndarray) -> np.ndarray:
        """Exact: in every place one rank has a value, and the others 0."""
        if self._topology.world_size == 1:
            return values
        shared = torch.from_numpy(values).to(self._topology.device)
        dist.all_reduce(shared)
        return _numpy(shared)


def normalizer(targets: Targets) -> float:
    """Trajectories that count, over all ranks: each is given the whole batch."""
    return max(float(targets.weight.count_nonzero()), 1.0)


def linearize(
    scores: Scores, targets: Targets, objective: Objective
) -> tuple[BackwardResult, torch.Tensor, torch.Tensor]:
    """The objective at these scores, and its derivatives by trajectory_score and final_value, float64 [B] each."""
    size = len(scores.trajectory_score)
    score, final_value = (
        torch.from_numpy(column.copy()).requires_grad_() for column in (scores.trajectory_score, scores.final_value)
    )
    tokens = TokenScores(  # one position a trajectory: its first logit is the whole score
        logprob=torch.zeros(size, dtype=torch.float64),
        in_loss=torch.ones(size, dtype=torch.bool),
        is_first=torch.ones(size, dtype=torch.bool),
        segment_ids=torch.arange(size),
        first_logit=score,
        initial_value=torch.from_numpy(scores.initial_value),
        final_value=final_value,
    )
    with torch.enable_grad():
        output = objective(tokens, targets, lambda value: value)
        gradients = torch.autograd.grad(output.loss.sum(), (score, final_value), allow_unused=True)
    by_score, by_final_value = (torch.zeros(size) if each is None else each for each in gradients)
    metrics = {name: _numpy(value) for name, value in output.metrics.items()}
    return BackwardResult(_numpy(output.loss), _numpy(output.residual), metrics), by_score, by_final_value


def select(targets: Targets, members: np.ndarray, device: torch.device) -> Targets:
    """The rows of a micro-batch, on the device."""
    rows = torch.from_numpy(members)
    return Targets(
        reward=targets.reward[rows].to(device),
        weight=targets.weight[rows].to(device),
        bootstrap=targets.bootstrap[rows].to(device),
        reference_score=targets.reference_score[rows].to(device),
        reference_initial_value=targets.reference_initial_value[rows].to(device),
        reference_final_value=targets.reference_final_value[rows].to(device),
    )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _scatter_logprobs(out: np.ndarray, micro_batch: MicroBatch, logprob: torch.Tensor) -> None:
    """logprob [T] belongs to the token that each position predicts: the one after it."""
    predicts = _numpy(micro_batch.in_loss)
    out[micro_batch.token_slots[predicts] + 1] = _numpy(logprob)[predicts]
