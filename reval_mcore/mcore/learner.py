"""The learner: a megatron-core model with its optimizer and its reference, behind five verbs.

score, score_reference, update, reset_reference, export_weights. Every rank of a run calls them together, with the same
batch, and gets the same results, whatever the parallel layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from reval_mcore.architecture import read_spec
from reval_mcore.config import Config
from reval_mcore.mcore import checkpoint
from reval_mcore.mcore.model import build_model, resolve_implementation
from reval_mcore.mcore.optimizer import Optimizer
from reval_mcore.mcore.passes import Passes, normalizer, wrap_model
from reval_mcore.mcore.reference import WeightCopies
from reval_mcore.mcore.topology import Topology
from reval_mcore.mcore.weight_export import export_weights
from reval_mcore.records import Batch, Objective, Scores, Targets, UpdateStats


class Learner:
    def __init__(self, config: Config, topology: Topology) -> None:
        self.topology = topology
        self._config = config
        self.spec = read_spec(Path(config.model.hf_path))
        self.num_updates = 0  # optimizer steps taken
        self.reference_version = 0  # policy version that the reference is a copy of
        self._reference_is_policy = True  # no step since the reference was taken
        self._num_passes = config.updates.passes
        self._bucket_bytes = config.rollout.weight_bucket_bytes
        self._model = build_model(config.model, self.spec, topology)
        self._ddp = wrap_model(self._model, topology)
        self._passes = Passes(
            self._ddp, self.spec, topology, max_tokens_per_micro_batch=config.updates.max_tokens_per_micro_batch
        )
        self._optimizer = Optimizer(
            config.optimizer,
            self._ddp,
            total_updates=config.run.num_iterations * config.updates.per_iteration,
            bf16=config.model.precision == "bf16",
        )
        self._copies = WeightCopies(dict(self._model.named_parameters()))
        self._copies.backup("reference")

    @property
    def model(self) -> GPTModel:
        return self._model

    @property
    def num_parameters(self) -> int:
        """On this rank."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def kernels(self) -> dict[str, str]:
        """What computes here, of what may be installed: for the log."""
        return {
            "layers": {"te": "Transformer Engine", "local": "torch"}[resolve_implementation(self._config.model)],
            "weight gradients": "fused" if self._model.config.gradient_accumulation_fusion else "added by torch",
            "Adam": self._optimizer.name,
        }

    # ------------------------------------------------------------ forward only

    def score(self, batch: Batch) -> Scores:
        """Score a batch with the current weights. Every later residual uses the same kernels and formulas."""
        return self._passes.score(batch)

    def score_reference(self, batch: Batch) -> Scores:
        """Score a batch with the reference weights. Costs no swap while policy and reference are the same."""
        if self._reference_is_policy:
            return self.score(batch)
        self._sync_weights()
        with self._copies.swapped_in("reference"):
            return self.score(batch)

    def _sync_weights(self) -> None:
        """Wait for updated weights of other ranks; under overlap_param_gather they come with the next forward pass."""
        if self.topology.parallel.overlap_param_gather:
            self._ddp.start_param_sync(force_sync=True)

    # ------------------------------------------------------------ training

    def update(self, batch: Batch, targets: Targets, objective: Objective) -> UpdateStats:
        """One optimizer update on the mean of the objective over the trajectories of non-zero weight.

        The batch's reference scores must be of the current reference. Skipped where no trajectory counts (Adam would
        go on by its momentum) or the gradient is not finite.
        """
        versions = batch.reference.reference_version
        assert (versions == self.reference_version).all(), "reference scores of another reference"
        result = self._passes.backward(batch, targets, objective, num_passes=self._num_passes)
        step = self._optimizer.step(has_gradient=bool(targets.weight.any()))
        if not step.skipped:
            self.num_updates += 1
            self._reference_is_policy = False
        weight = targets.weight.numpy()
        total = normalizer(targets)
        metrics = {
            "loss": float(result.loss.sum() / total),
            "grad_norm": step.grad_norm,
            "clipped_grad_norm": step.clipped_grad_norm,
            "learning_rate": step.learning_rate,
            "masked_fraction": float((weight == 0.0).mean()),
        }
        metrics |= {name: float((values * weight).sum() / total) for name, values in result.metrics.items()}
        return UpdateStats(residual=result.residual, metrics=metrics, skipped=step.skipped)

    def reset_reference(self, policy_version: int) -> None:
        """reference <- policy, now named `policy_version`. Every residual is -r / beta; stored scores are stale."""
        self._sync_weights()
        self._copies.backup("reference")
        self.reference_version = policy_version
        self._reference_is_policy = True

    # ------------------------------------------------------------ weights out, state in and out

    def export_weights(self, *, wanted: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, whole tensor) in the parameters' dtype, on the ranks that want them; collective.

        Every rank iterates to the end, also one that gets nothing. See `weight_export.export_weights`.
        """
        self._sync_weights()
        return export_weights(
            self._model, self.spec, self.topology.groups, bucket_bytes=self._bucket_bytes, wanted=wanted
        )

    def save(self, directory: Path, *, in_background: bool = False) -> checkpoint.PendingSave:
        """Write policy, optimizer and reference, as they are now, as one megatron-core distributed checkpoint.

        Collective. It is complete when the caller has called `finish` of what is returned.
        """
        self._sync_weights()
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
