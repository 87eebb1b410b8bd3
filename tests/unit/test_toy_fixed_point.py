"""An enumerated language model: 4 tokens, length 3, free logits per prefix, exact expectation over reference data.

The optimum of max E[r] - beta KL(pi || pi_ref) is known in closed form: pi* = pi_ref exp(r / beta) / Z with log Z =
log E_ref exp(r / beta), and log Z is also by how much V(s_1) rises. ReVal must reach both from data of the reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from reval_mcore.config import ObjectiveConfig
from reval_mcore.objectives import make_objective
from reval_mcore.records import Batch, ReferenceScores, Targets, TokenScores

if TYPE_CHECKING:
    from reval_mcore.mcore.packing import MicroBatch
    from reval_mcore.mcore.topology import Topology

V, H, BETA = 4, 3, 0.2
SEQUENCES = list(itertools.product(range(V), repeat=H))
PREFIXES = {
    prefix: row
    for row, prefix in enumerate(p for length in range(H) for p in itertools.product(range(V), repeat=length))
}


@dataclass(frozen=True)
class Toy:
    """Everything by enumeration over the 64 sequences; no code of the package."""

    reference: torch.Tensor  # float64 [prefixes, V]: logits
    probability: torch.Tensor  # float64 [64], of each sequence under the reference
    reward: torch.Tensor  # float64 [64]

    @property
    def log_partition(self) -> float:
        """log E_ref exp(r / beta)."""
        return float((self.probability * (self.reward / BETA).exp()).sum().log())

    @property
    def optimal_accuracy(self) -> float:
        tilted = self.probability * (self.reward / BETA).exp()
        return float(tilted[self.reward > 0].sum() / tilted.sum())


def make_toy() -> Toy:
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64) + 10.0
    reward = torch.tensor([float(sum(sequence) >= 7) for sequence in SEQUENCES], dtype=torch.float64)
    return Toy(reference, sequence_logprobs(reference).exp(), reward)


def sequence_logprobs(table: torch.Tensor) -> torch.Tensor:
    """float64 [64], by walking each sequence down the table."""
    rows = table.log_softmax(-1)
    return torch.stack([sum((rows[PREFIXES[s[:h]], s[h]] for h in range(H)), torch.zeros(())) for s in SEQUENCES])


def accuracy(table: torch.Tensor, toy: Toy) -> float:
    return float((sequence_logprobs(table.detach()).exp() * (toy.reward > 0)).sum())


def value_gap(table: torch.Tensor, toy: Toy) -> float:
    return float(table.detach()[0].logsumexp(-1) - toy.reference[0].logsumexp(-1))


def enumerated_batch() -> Batch:
    """All 64 sequences after a one-token prompt."""
    size, length = len(SEQUENCES), H + 1
    unscored = np.zeros(size)
    return Batch(
        rows=np.arange(size),
        tokens=np.array([(0, *sequence) for sequence in SEQUENCES], np.int32).reshape(-1),
        cu_seqlens=np.arange(size + 1) * length,
        prompt_lengths=np.ones(size, np.int64),
        loss_mask=np.tile([False, True, True, True], size),
        rollout_logprobs=np.zeros(size * length, np.float32),
        policy_version=np.zeros(size, np.int64),
        reward=np.zeros(size, np.float32),
        group_reward_mean=np.zeros(size, np.float32),
        group_reward_std=np.zeros(size, np.float32),
        has_verdict=np.ones(size, bool),
        finish_reason=np.full(size, "stop"),
        reference=ReferenceScores(unscored, unscored, unscored, np.zeros(size, np.int64)),
        relative_probability=np.ones(size),
    )


def make_loss(
    toy: Toy, reward: torch.Tensor, topology: Topology, edit: Callable[[TokenScores], TokenScores] = lambda s: s
) -> Callable[[torch.Tensor], torch.Tensor]:
    """E_ref[objective] of a logit table, through the real packing, loss head and `reval`."""
    from reval_mcore.mcore.loss_head import token_scores
    from reval_mcore.mcore.packing import build_micro_batch

    micro_batch: MicroBatch = build_micro_batch(enumerated_batch(), np.arange(len(SEQUENCES)), torch.device("cpu"))
    # the state at each position; the one after the last token does not matter
    states = torch.tensor([PREFIXES.get(sequence[:h], 0) for sequence in SEQUENCES for h in range(H + 1)])
    objective = make_objective(ObjectiveConfig(beta=BETA))

    def score(table: torch.Tensor) -> TokenScores:
        return token_scores(table[states], micro_batch, tp_group=topology.groups.tp, num_valid=V)

    anchor = score(toy.reference)
    targets = Targets(
        reward=reward,
        weight=torch.ones_like(reward),
        bootstrap=torch.zeros(len(SEQUENCES), dtype=torch.bool),
        reference_score=anchor.trajectory_score(),
        reference_initial_value=anchor.initial_value,
        reference_final_value=anchor.final_value,
    )
    return lambda table: (toy.probability * objective(edit(score(table)), targets, lambda value: value).loss).sum()


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=400,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def without_value_gradient(scores: TokenScores) -> TokenScores:
    """The published Eq. 4: V(s_1) counts, its gradient does not."""
    value = scores.initial_value
    return replace(scores, first_logit=scores.first_logit - value + value.detach())


@pytest.mark.parametrize("centred", [False, True])
def test_reval_reaches_the_kl_optimal_policy_and_value_from_reference_data(topology: Topology, centred: bool) -> None:
    toy = make_toy()
    mean = float((toy.probability * toy.reward).sum()) if centred else 0.0
    table = minimise(make_loss(toy, toy.reward - mean, topology), toy.reference)
    assert accuracy(table, toy) == pytest.approx(toy.optimal_accuracy, abs=1e-5)
    assert value_gap(table, toy) == pytest.approx(toy.log_partition - mean / BETA, abs=1e-4)
    tilted = toy.probability * (toy.reward / BETA).exp()
    np.testing.assert_allclose(sequence_logprobs(table).exp(), tilted / tilted.sum(), atol=1e-5)


def test_without_the_gradient_of_v_the_fixed_point_is_another_one(topology: Topology) -> None:
    toy = make_toy()
    loss = make_loss(toy, toy.reward, topology, without_value_gradient)
    table = toy.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        loss(table).backward()
        optimizer.step()
    (at_rest,) = torch.autograd.grad(loss(table), table)
    (moved_on,) = torch.autograd.grad(make_loss(toy, toy.reward, topology)(table), table)
    assert float(at_rest.abs().max()) < 1e-3  # a fixed point of its own ...
    assert float(moved_on.abs().max()) > 0.1  # ... which the whole gradient leaves
    assert accuracy(table, toy) < toy.optimal_accuracy - 0.1
    assert abs(value_gap(table, toy) - toy.log_partition) > 1.0
