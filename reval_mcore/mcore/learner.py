"""The learner: a megatron-core model with its optimizer and its reference, behind five verbs.

score, score_reference, update, reset_reference, export_weights. Gradients follow megatron-core's per-token convention:
the loss function returns (sum of losses, count, details), gradients are summed over micro-batches and ranks, and the
summed count divides them at the end. Our count is the number of trajectories that are in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from reval_mcore.config import Config
from reval_mcore.mcore import checkpoint, hf_mapping
from reval_mcore.mcore.loss_head import token_scores
from reval_mcore.mcore.model import build_model, forward_logits, wrap_precision
from reval_mcore.mcore.optimizer import Optimizer
from reval_mcore.mcore.packing import MicroBatch, pack
from reval_mcore.mcore.reference import WeightCopies
from reval_mcore.mcore.topology import Topology
from reval_mcore.records import Batch, Objective, Scores, Targets, TokenScores, UpdateStats

Details = dict[str, torch.Tensor]
# (loss to differentiate, int count, details kept for the caller), as megatron-core's schedules want it
LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, Details]]


class Learner:
    def __init__(self, config: Config, topology: Topology) -> None:
        self.topology = topology
        self.spec = hf_mapping.read_spec(Path(config.model.hf_path))
        self.num_updates = 0  # optimizer steps taken
        self.reference_version = 0  # policy version that the reference is a copy of
        self._reference_is_policy = True  # no step since the reference was taken
        self._max_tokens = config.updates.max_tokens_per_micro_batch
        self._model = build_model(config.model, self.spec, topology)
        precise = wrap_precision(self._model)
        self._ddp = DistributedDataParallel(
            self._model.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            precise,
        )
        self._model.config.finalize_model_grads_func = finalize_model_grads
        self._optimizer = Optimizer(
            config.optimizer,
            self._ddp,
            total_updates=config.run.num_iterations * config.updates.per_iteration,
            bf16=config.model.precision == "bf16",
        )
        self._forward_backward = get_forward_backward_func()
        self._copies = WeightCopies(dict(self._model.named_parameters()))
        self._copies.backup("reference")

    @property
    def model(self) -> GPTModel:
        return self._model

    @property
    def num_parameters(self) -> int:
        """On this rank."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    # ------------------------------------------------------------ forward only

    def score(self, batch: Batch) -> Scores:
        """Score a batch with the current weights. Every later residual uses the same kernels and formulas."""
        size = len(batch)
        scores = Scores(
            trajectory_score=np.zeros(size),
            initial_value=np.zeros(size),
            final_value=np.zeros(size),
            logprobs=np.zeros(len(batch.tokens), np.float32),
        )

        def keep(logits: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Details]:
            tokens = self._token_scores(logits, micro_batch)
            details = {
                "trajectory_score": tokens.trajectory_score(),
                "initial_value": tokens.initial_value,
                "final_value": tokens.final_value,
                "logprob": tokens.logprob,
            }
            return logits.new_zeros(()), self._count(0), details

        micro_batches = pack(batch, max_tokens=self._max_tokens, device=self.topology.device)
        with torch.no_grad():
            for micro_batch, details in self._run(micro_batches, keep, forward_only=True):
                members = micro_batch.members
                scores.trajectory_score[members] = _numpy(details["trajectory_score"])
                scores.initial_value[members] = _numpy(details["initial_value"])
                scores.final_value[members] = _numpy(details["final_value"])
                _scatter_logprobs(scores.logprobs, micro_batch, details["logprob"])
        return scores

    def score_reference(self, batch: Batch) -> Scores:
        """Score a batch with the reference weights. Costs no swap while policy and reference are the same."""
        if self._reference_is_policy:
            return self.score(batch)
        with self._copies.swapped_in("reference"):
            return self.score(batch)

    # ------------------------------------------------------------ training

    def update(self, batch: Batch, targets: Targets, objective: Objective) -> UpdateStats:
        """One optimizer update on the mean of the objective over the trajectories of non-zero weight.

        The batch's reference scores must be of the current reference. Skipped where no trajectory counts (Adam would
        go on by its momentum) or the gradient is not finite.
        """
        versions = batch.reference.reference_version
        assert (versions == self.reference_version).all(), "reference scores of another reference"
        device = self.topology.device

        def loss(logits: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Details]:
            tokens = self._token_scores(logits, micro_batch)
            count = int(targets.weight[micro_batch.members].sum())
            output = objective(tokens, _select(targets, micro_batch.members, device), _identity)
            details = {"loss": output.loss.detach(), "residual": output.residual}
            return output.loss.sum(), self._count(count), details | output.metrics

        self._ddp.zero_grad_buffer()
        columns: dict[str, np.ndarray] = {}
        micro_batches = pack(batch, max_tokens=self._max_tokens, device=device)
        for micro_batch, details in self._run(micro_batches, loss, forward_only=False):
            for name, values in details.items():
                columns.setdefault(name, np.zeros(len(batch)))[micro_batch.members] = _numpy(values)
        step = self._optimizer.step(has_gradient=bool(targets.weight.any()))
        if not step.skipped:
            self.num_updates += 1
            self._reference_is_policy = False
        weight = targets.weight.numpy()
        total = max(weight.sum(), 1.0)
        metrics = {
            "loss": float(columns.pop("loss").sum() / total),
            "grad_norm": step.grad_norm,
            "clipped_grad_norm": step.clipped_grad_norm,
            "learning_rate": step.learning_rate,
            "masked_fraction": float(1.0 - weight.mean()),
        }
        residual = columns.pop("residual")
        metrics |= {name: float((values * weight).sum() / total) for name, values in columns.items()}
        return UpdateStats(residual=residual, metrics=metrics, skipped=step.skipped)

    def reset_reference(self, policy_version: int) -> None:
        """reference <- policy, now named `policy_version`. Every residual is -r / beta; stored scores are stale."""
        self._copies.backup("reference")
        self.reference_version = policy_version
        self._reference_is_policy = True

    # ------------------------------------------------------------ weights out, state in and out

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, whole tensor), one at a time, in the parameters' dtype; collective over tensor-parallel ranks."""
        return hf_mapping.export_weights(self._model, self.spec, self.topology.groups.tp)

    def save(self, directory: Path, *, in_background: bool = False) -> checkpoint.PendingSave:
        """Write policy, optimizer and reference, as they are now, as one megatron-core distributed checkpoint.

        Collective. It is complete when the caller has called `finish` of what is returned.
        """
        return checkpoint.PendingSave(directory, self._sharded_state(is_loading=False), in_background=in_background)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, under this layout; collective."""
        state = checkpoint.load(directory, self._sharded_state(is_loading=True))
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, tensor in self._copies["reference"].items():
            tensor.copy_(state["reference"][name])
        counters = state["counters"]
        self.num_updates = counters["num_updates"]
        self.reference_version = counters["reference_version"]
        self._reference_is_policy = counters["reference_is_policy"]

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        model_state = self._model.sharded_state_dict()
        return {
            "model": model_state,
            "reference": checkpoint.with_tensors(
                self._model.sharded_state_dict(), self._copies["reference"], prefix="reference."
            ),
            "optimizer": self._optimizer.sharded_state_dict(model_state, is_loading=is_loading),
            "counters": {
                "num_updates": self.num_updates,
                "reference_version": self.reference_version,
                "reference_is_policy": self._reference_is_policy,
            },
        }

    # ------------------------------------------------------------ one pass over micro-batches

    def _run(
        self, micro_batches: Sequence[MicroBatch], loss: LossFunction, *, forward_only: bool
    ) -> Iterator[tuple[MicroBatch, Details]]:
        """megatron-core's schedule over the micro-batches; yields each with the details that `loss` returned."""

        def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            micro_batch = next(data)
            logits = forward_logits(model, micro_batch)
            return logits, lambda output: loss(output[0], micro_batch)

        details = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self._ddp],
            num_microbatches=len(micro_batches),
            seq_length=self._max_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return zip(micro_batches, details, strict=True)

    def _token_scores(self, logits: torch.Tensor, micro_batch: MicroBatch) -> TokenScores:
        return token_scores(logits, micro_batch, tp_group=self.topology.groups.tp, num_valid=self.spec.vocab_size)

    def _count(self, number: int) -> torch.Tensor:
        return torch.tensor(number, dtype=torch.int, device=self.topology.device)


def _identity(value: torch.Tensor) -> torch.Tensor:
    """Reduction over context-parallel ranks where there is one."""
    return value


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _scatter_logprobs(out: np.ndarray, micro_batch: MicroBatch, logprob: torch.Tensor) -> None:
    """logprob [T] belongs to the token that each position predicts: the one after it."""
    predicts = _numpy(micro_batch.in_loss)
    out[micro_batch.token_slots[predicts] + 1] = _numpy(logprob)[predicts]


def _select(targets: Targets, members: np.ndarray, device: torch.device) -> Targets:
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
