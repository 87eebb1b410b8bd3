"""megatron-core's distributed optimizer, its schedule, and the update step: skip, clip, step.

megatron-core 0.16.1 has faults that this module mends. Where the gradient buffer has padding between its buckets,
parameters behind it are saved shifted. And without Transformer Engine and Apex, where the inner optimizer is torch's
AdamW: a load template cannot be built before the first step, loading trips over Adam's `step` entry, and after loading
all parameters share ONE `step` tensor, so that each update adds the number of parameters to it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from reval_mcore.config import OptimizerConfig

# how the optimizer's state lies in a checkpoint: any layout can load it
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


@dataclass(frozen=True)
class StepResult:
    """One attempted optimizer step."""

    grad_norm: float  # global, before clipping
    clipped_grad_norm: float  # what the step was taken with
    learning_rate: float
    skipped: bool  # no step was taken: weights and Adam's state are as before


class Optimizer:
    """Adam over the distributed optimizer, with a learning rate schedule counted in updates."""

    def __init__(
        self,
        config: OptimizerConfig,
        model: DistributedDataParallel,
        *,
        total_updates: int,
        bf16: bool,
    ) -> None:
        self._config = config
        mcore = McoreOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        )
        # the standard overrides keep weight decay off norms and biases
        self._optimizer = get_megatron_optimizer(mcore, [model], config_overrides=get_standard_config_overrides(mcore))
        self._scheduler = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_updates,
            lr_decay_steps=max(total_updates, config.warmup_updates + 1),
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        for part in _parts(self._optimizer):
            part.get_parameter_state_dp_zero = functools.partial(_state_with_padding, part)  # pyright: ignore[reportAttributeAccessIssue]
        for inner in _torch_adam_parts(self._optimizer):
            _prefill_state(inner)
            inner._set_main_param_and_optimizer_states = functools.partial(_set_states_with_step, inner)

    @torch.no_grad()
    def step(self, *, has_gradient: bool) -> StepResult:
        """Take one step with the gradients in the buffers, unless they are not finite or nothing was in the loss."""
        # the step numbered n (from 1) is taken with the schedule's n-th rate: the first warm-up step is not a step of 0
        learning_rate = self._advance_schedule()
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not (has_gradient and math.isfinite(grad_norm)):
            return StepResult(grad_norm, grad_norm, learning_rate, skipped=True)
        limit = self._config.clip_grad
        if grad_norm > limit > 0.0:
            for part in _parts(self._optimizer):
                clip_grad_by_total_norm_fp32([*part.get_parameters()], limit, grad_norm)
        self._optimizer.step_with_ready_grads()
        clipped = min(grad_norm, limit) if limit > 0.0 else grad_norm
        return StepResult(grad_norm, clipped, learning_rate, skipped=False)

    def _advance_schedule(self) -> float:
        self._scheduler.step(increment=1)
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def name(self) -> str:
        """The class that steps: Transformer Engine's or Apex's fused one where megatron-core finds it, or torch's."""
        inner: Any = _parts(self._optimizer)[0]
        return f"{type(inner.optimizer).__module__}.{type(inner.optimizer).__qualname__}"

    def adam_steps(self) -> set[int]:
        """Distinct values of Adam's per-parameter step counters on this rank; one value, the number of steps taken."""
        return {
            int(state["step"])
            for inner in _torch_adam_parts(self._optimizer)
            for state in inner.optimizer.state.values()
        }

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_SHARDING),
            "schedule": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over Adam's state and the place in the schedule. Settings stay those of this configuration.

        megatron-core would take both from the checkpoint: a run made longer would go on at the old schedule's end.
        """
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for group in self._optimizer.param_groups
        ]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)
        for inner in _torch_adam_parts(self._optimizer):
            for entry in inner.optimizer.state.values():
                entry["step"] = entry["step"].clone()
        self._scheduler.num_steps = 0
        self._scheduler.step(increment=state["schedule"]["num_steps"])


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _torch_adam_parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    for part in _parts(optimizer):
        assert isinstance(part, DistributedOptimizer)
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part


def _prefill_state(inner: Any) -> None:
    """Adam's state as it is before the first step: sharded_state_dict asserts that every parameter has one."""
    for group in inner.optimizer.param_groups:
        for parameter in group["params"]:
            inner.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _state_with_padding(part: Any, **arguments: Any) -> dict[Any, Any] | None:
    """The whole of this part's state for a checkpoint, each value at its place in the gradient buffer.

    megatron-core leaves out the padding between buckets, and then cuts parameters out where they lie with it: those
    behind a padded bucket would be saved shifted, weights and moments, and loaded so.
    """
    state: Any = DistributedOptimizer.get_parameter_state_dp_zero(part, **arguments)
    if state is None:
        return None
    for number, buffer in enumerate(part.buffers):
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                tensors[name] = _with_padding(tensors[name], buffer)
    return state


def _with_padding(values: torch.Tensor, buffer: Any) -> torch.Tensor:
    """values [elements of all buckets, end to end] at their places in the buffer."""
    ends = list(itertools.accumulate(bucket.numel_unpadded for bucket in buffer.buckets))
    starts = [0, *ends[:-1]]
    if all(start == bucket.offset for start, bucket in zip(starts, buffer.buckets, strict=True)):
        return values  # no padding between them
    padded = values.new_zeros(buffer.numel)
    for start, end, bucket in zip(starts, ends, buffer.buckets, strict=True):
        padded[bucket.offset : bucket.offset + end - start] = values[start:end]
    return padded


def _set_states_with_step(inner: Any, model_parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    """megatron-core restores `step` with the parameter groups, yet asks for it among the tensors of each parameter."""
    group, order = inner.model_param_group_index_map[model_parameter]
    state = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][order]]
    DistributedOptimizer._set_main_param_and_optimizer_states(
        inner, model_parameter, {"step": state["step"], **tensors}
    )
