"""Runs the real megatron-core 0.16.1 on a machine without CUDA, over gloo. Does nothing where CUDA is available.

megatron-core names CUDA in places that a CPU build of torch cannot answer: `torch.cuda.current_device()`, tensors made
with `device="cuda"`, streams, CUDA generator states, and comparisons such as `x.type() == "torch.cuda.FloatTensor"`.
Every loaded `megatron.*` module gets a proxy in place of its global name `torch`: its `cuda` is a CPU facade, and its
tensor factories read a CUDA device as the CPU and drop `pin_memory`. torch itself stays as it is but for three things
that could only raise on a CPU build (`Tensor.cuda`, `Module.cuda`) or that last for one call (`Tensor.type`).

It leans on private names of megatron-core, so that version is pinned and tests/unit/mcore/test_cpu_shim.py guards it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# imported at once, so that each of them gets the proxy
_MODULES = (
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "optimizer_param_scheduler",
    "distributed",
    "distributed.finalize_model_grads",
    "pipeline_parallel.schedules",
    "transformer.multi_token_prediction",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
)
_FACTORIES = (
    "zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "eye",
    "zeros_like", "ones_like", "empty_like", "full_like",
)  # fmt: skip
_CPU = torch.device("cpu")


class _Stream:
    """A stream on which everything is done as soon as it is asked for."""

    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None: ...


class _Event:
    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _FallThrough(types.ModuleType):
    """A module that answers from another one for every name that it does not have itself."""

    def __init__(self, name: str, real: types.ModuleType) -> None:
        super().__init__(name)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _cuda_facade() -> types.ModuleType:
    stream = _Stream()
    facade = _FallThrough("torch.cuda", torch.cuda)
    facade.__dict__.update(
        current_device=lambda: _CPU,
        set_device=lambda device: None,
        device_count=lambda: 1,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        Stream=lambda *args, **kwargs: stream,
        Event=lambda *args, **kwargs: _Event(),
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
        random=facade,
        memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        memory_reserved=lambda device=None: 0,
    )
    return facade


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


@functools.cache
def _proxy() -> types.ModuleType:
    proxy = _FallThrough("torch", torch)
    proxy.__dict__["cuda"] = _cuda_facade()
    proxy.__dict__.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    return proxy


def rescan() -> int:
    """Give the proxy to megatron modules that were imported since; returns how many. 0 where CUDA is available."""
    if torch.cuda.is_available():
        return 0
    late = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.") and module.__dict__.get("torch") is torch
    ]
    for module in late:
        module.__dict__["torch"] = _proxy()
    return len(late)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Within it, `Tensor.type()` names CUDA types, which is what megatron-core compares with."""
    real = torch.Tensor.type

    def as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = real(self, *args, **kwargs)
        is_cpu_name = isinstance(name, str) and not name.startswith("torch.cuda.")
        return name.replace("torch.", "torch.cuda.", 1) if is_cpu_name else name

    torch.Tensor.type = as_cuda
    try:
        yield
    finally:
        torch.Tensor.type = real


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


def _patch_type_comparisons() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    distributed = distrib_optimizer.DistributedOptimizer
    distributed.__init__ = _with_cuda_type_names(distributed.__init__)
    distributed._build_model_param_to_state_dict_param_map = _with_cuda_type_names(
        distributed._build_model_param_to_state_dict_param_map
    )
    half = optimizer.Float16OptimizerWithFloat16Params
    half.__init__ = _with_cuda_type_names(half.__init__)
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    for module in (clip_grads, optimizer, distrib_optimizer):
        if "clip_grad_by_total_norm_fp32" in module.__dict__:
            module.__dict__["clip_grad_by_total_norm_fp32"] = clip


def _patch_generator_state() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(device: object = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # on the CPU both states are one, which is what this warning is about
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


@functools.cache
def install() -> bool:
    """Make megatron-core usable on the CPU; call before it is imported elsewhere. Returns whether it did anything."""
    if torch.cuda.is_available():
        return False
    real_compile = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)
    # megatron binds jit_fuser = torch.compile while it is imported; compiling costs minutes and gains nothing here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _MODULES:
                importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = real_compile
    rescan()
    _patch_generator_state()
    _patch_type_comparisons()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    return True
