"""The CPU shim: what it patches, what it leaves alone, and that it is nothing where CUDA is available."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from reval_mcore.mcore import cpu_shim

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is available")


def bare_modules() -> list[str]:
    """Loaded megatron modules whose global `torch` is torch itself."""
    loaded = [(name, module) for name, module in sys.modules.items() if name.startswith("megatron.")]
    return [name for name, module in loaded if vars(module).get("torch") is torch]


def test_install_says_so_and_may_be_called_again() -> None:
    assert cpu_shim.install() is True
    before = torch.Tensor.cuda, torch.nn.Module.cuda, sys.modules["megatron.core.optimizer"].__dict__["torch"]
    assert cpu_shim.install() is True
    assert before == (torch.Tensor.cuda, torch.nn.Module.cuda, sys.modules["megatron.core.optimizer"].__dict__["torch"])


def test_no_loaded_megatron_module_keeps_the_bare_torch(topology: Topology) -> None:
    assert len([name for name in sys.modules if name.startswith("megatron.core")]) > 100
    assert bare_modules() == []
    assert cpu_shim.rescan() == 0


def test_a_module_that_is_imported_late_is_found_by_rescan() -> None:
    late = importlib.import_module("megatron.core.resharding")
    vars(late)["torch"] = torch
    assert "megatron.core.resharding" in bare_modules()
    assert cpu_shim.rescan() > 0
    assert bare_modules() == []


def test_torch_itself_is_untouched() -> None:
    """What was Python in torch still is torch's own; what was C still is."""
    assert torch.Tensor.type is torch._C.TensorBase.type
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.synchronize.__module__ == "torch.cuda"
    assert torch.cuda.Stream.__module__ == "torch.cuda.streams"
    assert torch.compile.__module__ == "torch"
    assert torch.compile.__name__ == "compile"
    for name in cpu_shim._FACTORIES:
        assert not hasattr(getattr(torch, name), "__wrapped__"), name
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0), "current"])
def test_factories_inside_megatron_land_on_the_cpu(device: Any) -> None:
    seen: Any = sys.modules["megatron.core.pipeline_parallel.schedules"].__dict__["torch"]
    if device == "current":
        device = seen.cuda.current_device()
    made = [
        seen.zeros(3, device=device),
        seen.ones(3, dtype=torch.int, device=device),
        seen.empty(3, device=device, pin_memory=True),
        seen.full((3,), 2.0, device=device),
        seen.tensor([1.0, 2.0, 3.0], device=device),
        seen.arange(3, device=device),
        seen.rand(3, device=device),
        seen.randn(3, device=device),
        seen.eye(3, device=device),
        *(getattr(seen, f"{name}_like")(torch.zeros(3), device=device) for name in ("zeros", "ones", "empty")),
        seen.full_like(torch.zeros(3), 2.0, device=device),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert seen.zeros(3, device="meta").device.type == "meta"
    assert seen.float32 is torch.float32
    assert seen.nn is torch.nn


def test_type_names_are_cuda_ones_within_the_patched_calls_only() -> None:
    with cpu_shim._cuda_type_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises(ValueError, match="inside"), cpu_shim._cuda_type_names():
        raise ValueError("inside")
    assert torch.Tensor.type is torch._C.TensorBase.type


_WITH_CUDA = """
import logging, sys, torch

def snapshot():
    filters = logging.getLogger("megatron.core.tensor_parallel.random").filters
    tensor, module = torch.Tensor, torch.nn.Module
    return torch.compile, torch.zeros, tensor.cuda, tensor.type, module.cuda, dict(vars(torch.cuda)), list(filters)

torch.cuda.is_available = lambda: True
before = snapshot()
from reval_mcore.mcore import cpu_shim
assert cpu_shim.install() is False
assert cpu_shim.rescan() == 0
assert snapshot() == before
print([name for name in sys.modules if name.startswith("megatron")])
"""


def test_where_cuda_is_available_nothing_is_imported_or_patched() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WITH_CUDA],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (found.returncode, found.stdout.strip()) == (0, "[]"), found.stderr
