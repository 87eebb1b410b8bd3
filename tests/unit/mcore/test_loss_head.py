"""vocab_parallel_logsumexp on one rank against dense torch in fp64. Several ranks: tests/distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from reval_mcore.mcore.loss_head import vocab_parallel_logsumexp

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology

WIDTH = 128


def random_case(num_valid: int, *, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [3, 7, WIDTH] with one entry whose exponential overflows, and targets among the real columns."""
    generator = torch.Generator().manual_seed(num_valid)
    logits = 20.0 * torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64)
    logits[0, 0, 5] = 700.0
    logits[1, :, num_valid:] = 900.0  # padding must not even set the maximum
    targets = torch.randint(0, num_valid, (3, 7), generator=generator)
    targets[0, 1], targets[0, 2] = 0, num_valid - 1
    return logits.to(dtype), targets


def upstream(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients that arrive at the logsumexp and at the target logit."""
    generator = torch.Generator().manual_seed(17)
    first, second = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    if kind == "sparse":
        first = first * (torch.rand(3, 7, generator=generator) < 0.5)
        second = second * (torch.rand(3, 7, generator=generator) < 0.5)
    zero = torch.zeros_like(first)
    return {"no_logsumexp": (zero, second), "no_target": (first, zero), "none": (zero, zero)}.get(kind, (first, second))


@pytest.mark.parametrize("num_valid", [128, 101, 8])
@pytest.mark.parametrize("kind", ["dense", "sparse", "no_logsumexp", "no_target", "none"])
def test_values_and_gradients_equal_dense_fp64(topology: Topology, kind: str, num_valid: int) -> None:
    logits, targets = random_case(num_valid)
    g_logsumexp, g_target = upstream(kind)

    dense = logits.clone().requires_grad_()
    values = torch.logsumexp(dense[..., :num_valid], -1), dense.gather(-1, targets[..., None])[..., 0]
    torch.autograd.backward(values, (g_logsumexp, g_target))

    own = logits.clone().requires_grad_()
    found = vocab_parallel_logsumexp(own, targets, tp_group=topology.groups.tp, num_valid=num_valid)
    torch.autograd.backward(found, (g_logsumexp, g_target))

    assert own.grad is not None
    assert dense.grad is not None
    assert float((found[0] - values[0]).detach().abs().max()) < 1e-12
    assert torch.equal(found[1], values[1])
    assert float((own.grad - dense.grad).abs().max()) < 1e-13
    assert not own.grad[..., num_valid:].any()


def test_gradcheck_of_both_outputs(topology: Topology) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3])
    torch.autograd.gradcheck(
        lambda z: vocab_parallel_logsumexp(z, targets, tp_group=topology.groups.tp, num_valid=7), (logits,)
    )


@pytest.mark.parametrize("num_valid", [128, 101])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_are_unchanged_by_forward_and_backward(topology: Topology, dtype: torch.dtype, num_valid: int) -> None:
    logits, targets = random_case(num_valid, dtype=dtype)
    before = logits.clone()
    logsumexp, target = vocab_parallel_logsumexp(
        logits.requires_grad_(), targets, tp_group=topology.groups.tp, num_valid=num_valid
    )
    (logsumexp.sum() - target.sum()).backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_fp32_of_the_logits_as_given(topology: Topology, dtype: torch.dtype) -> None:
    logits, targets = random_case(101, dtype=dtype)
    exact = logits.double()[..., :101]
    logsumexp, target = vocab_parallel_logsumexp(
        logits.requires_grad_(), targets, tp_group=topology.groups.tp, num_valid=101
    )
    assert logsumexp.dtype == target.dtype == torch.float32
    assert torch.equal(target.double(), exact.gather(-1, targets[..., None])[..., 0])
    torch.testing.assert_close(logsumexp.double(), exact.logsumexp(-1), rtol=2e-7, atol=0.0)
    logsumexp.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
