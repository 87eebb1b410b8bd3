"""What the ranks do in test_layouts.py: the same work under a layout; they write down, the tests judge."""

from __future__ import annotations

import json
import re
import unittest.mock
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import load_plain_tensors
from safetensors.torch import save_file

from reval_mcore.architecture import read_spec
from reval_mcore.config import Config, ParallelConfig
from reval_mcore.mcore import passes
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.loss_head import token_scores
from reval_mcore.mcore.model import build_model
from reval_mcore.mcore.packing import MicroBatch, pack, plan_ranks
from reval_mcore.mcore.passes import BackwardResult, Passes, wrap_model
from reval_mcore.mcore.topology import Topology, open_topology
from reval_mcore.mcore.weight_export import export_weights
from reval_mcore.objectives import make_objective, make_targets
from reval_mcore.records import Batch, Targets, TokenScores
from tests.builders import exported, main_gradient, make_batch, make_config, with_reference

# 14, no multiple of 4; under data parallelism of 2 the ranks have 6 and 8 of them
LENGTHS = (200, 200, 198, 190, 150, 120, 61, 40, 23, 9, 5, 4, 3, 3)
MAX_TOKENS = 420
NOT_COUNTED = 5  # every fifth row is masked out of the loss: the ranks have 4 and 8 that count


def layout_config(hf_path: Path, parallel: Mapping[str, Any], **sections: Mapping[str, Any]) -> Config:
    base: dict[str, Mapping[str, Any]] = {
        "parallel": parallel,
        "reward": {"truncation": "bootstrap"},
        "optimizer": {"lr": 1e-4, "eps": 1e-3, "schedule": "linear"},
        "updates": {"max_tokens_per_micro_batch": MAX_TOKENS},
        "prompts": {"max_tokens": 100},
        "rollout": {"max_response_tokens": 100},
    }
    return make_config(hf_path, **(base | sections))


def ragged_batch(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> Batch:
    """Lengths from 3 to 200, holes in the loss masks, some rows without a verdict."""
    batch = make_batch(len(lengths), seed=seed, max_prompt=100, max_response=100, unjudged=True, lengths=lengths)
    return replace(batch, group_reward_mean=batch.group_reward_mean.round(2))


def targets_of(batch: Batch, config: Config) -> Targets:
    """As of the batch, with some rows that do not count."""
    targets = make_targets(batch, config.reward)
    counts = (torch.from_numpy(batch.rows) + 1) % NOT_COUNTED != 0
    return replace(targets, weight=targets.weight * counts)


def work(hf_path: str, directory: str, parallel: Mapping[str, Any]) -> None:
    out = Path(directory)
    with open_topology(ParallelConfig(**parallel)) as topology:
        config = layout_config(Path(hf_path), parallel)
        _numbers_in_fp64(config, topology, out)
        _three_updates(config, topology, out)


# ---------------------------------------------------------------- fp64


@dataclass(frozen=True)
class _Double:
    """A model in fp64 and passes over it; no optimizer, which megatron-core has for fp32 alone."""

    config: Config
    model: torch.nn.Module
    runner: Passes
    topology: Topology

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole, under HF names, by the way of the weights."""
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(main_gradient(parameter))
            spec, groups = read_spec(Path(self.config.model.hf_path)), self.topology.groups
            found = {
                name: value.clone() for name, value in export_weights(self.model, spec, groups, bucket_bytes=1 << 12)
            }
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        return found

    def backward(self, batch: Batch, num_passes: int) -> BackwardResult:
        targets = targets_of(batch, self.config)
        return self.runner.backward(batch, targets, make_objective(self.config.objective), num_passes=num_passes)


def _make_double(config: Config, topology: Topology) -> _Double:
    spec = read_spec(Path(config.model.hf_path))
    model = build_model(config.model, spec, topology).double()
    model.config.pipeline_dtype = model.config.params_dtype = torch.float64
    ddp = wrap_model(model, topology, use_distributed_optimizer=False)
    runner = Passes(ddp, spec, topology, max_tokens_per_micro_batch=MAX_TOKENS)
    return _Double(config, model, runner, topology)


def _numbers_in_fp64(config: Config, topology: Topology, out: Path) -> None:
    double = _make_double(config, topology)
    batch = ragged_batch()
    first = double.runner.score(batch)
    # a reference that is near the policy and not it
    noise = np.random.default_rng(1).normal(size=(3, len(batch)))
    near = replace(
        first,
        trajectory_score=first.trajectory_score + noise[0],
        initial_value=first.initial_value + noise[1],
        final_value=first.final_value + noise[2],
    )
    scored = with_reference(batch, near)
    results = {}
    for num_passes in (1, 2):
        result = double.backward(scored, num_passes)
        gradients = double.gradients()
        results[f"loss_{num_passes}"], results[f"residual_{num_passes}"] = result.loss, result.residual
        results |= {f"{name}_{num_passes}": values for name, values in result.metrics.items()}
        if topology.rank == 0:
            save_file(gradients, out / f"gradients_{num_passes}.safetensors")
    at_reference = replace(with_reference(batch, first), reward=np.zeros_like(batch.reward))
    calibrated = double.backward(at_reference, 1)
    gradients = double.gradients()
    notes = {
        "calibration_residual": float(np.abs(calibrated.residual).max()),
        "calibration_gradient": max(float(value.abs().max()) for value in gradients.values()),
    }
    if topology.rank == 0:
        np.savez(out / "fp64.npz", **asdict(first), **results)
        (out / "notes.json").write_text(json.dumps(notes), encoding="utf-8")


# ---------------------------------------------------------------- fp32, with the optimizer


LONE = 3  # the seed of a batch of one trajectory: other data-parallel ranks have a micro-batch of padding


def update(learner: Learner, config: Config, seed: int) -> dict[str, Any]:
    batch = ragged_batch(seed, LENGTHS[9:10] if seed == LONE else LENGTHS)
    batch = with_reference(batch, learner.score_reference(batch), learner.reference_version)
    stats = learner.update(batch, targets_of(batch, config), make_objective(config.objective))
    return {"metrics": dict(stats.metrics), "residual": stats.residual.tolist()}


def _three_updates(config: Config, topology: Topology, out: Path) -> None:
    learner = Learner(config, topology)
    learning = [update(learner, config, seed) for seed in (1, 2, 3)]
    scores = learner.score_reference(ragged_batch())
    weights = exported(learner)
    reports: list[Any] = [None] * topology.world_size
    dist.all_gather_object(reports, {"learning": learning, "adam_steps": sorted(learner._optimizer.adam_steps())})
    if topology.rank == 0:
        save_file(weights, out / "weights.safetensors")
        np.savez(out / "fp32.npz", **asdict(scores))
        (out / "updates.json").write_text(json.dumps(reports), encoding="utf-8")


# ---------------------------------------------------------------- bf16


def score(hf_path: str, directory: str, parallel: Mapping[str, Any], precision: str) -> None:
    """Scores in a precision, and the loss of a batch before and after some updates on it."""
    config = layout_config(Path(hf_path), parallel, model={"precision": precision})
    with open_topology(config.parallel) as topology:
        learner = Learner(config, topology)
        scores = learner.score(ragged_batch())
        losses = [update(learner, config, 1)["metrics"]["loss"] for _ in range(8)]
        if topology.rank == 0:
            losses_by_name = {"loss_before": losses[0], "loss_after": losses[-1]}
            np.savez(Path(directory) / "scores.npz", **asdict(scores), **losses_by_name)


# ---------------------------------------------------------------- mutations


def mutated(hf_path: str, directory: str, parallel: Mapping[str, Any], mutation: str) -> None:
    """The fp64 numbers of a program with one fault."""
    config = layout_config(Path(hf_path), parallel)
    with open_topology(config.parallel) as topology, unittest.mock.patch.multiple(passes, **MUTATIONS[mutation]):
        _numbers_in_fp64(config, topology, Path(directory))


def _shifted_after_cutting(batch: Batch, **arguments: Any) -> list[MicroBatch]:
    """Each rank takes the next token that it holds itself for the next token."""
    wrong = []
    for micro_batch in pack(batch, **arguments):
        slots = micro_batch.token_slots
        in_response = torch.from_numpy((slots >= 0) & batch.loss_mask[slots])
        in_loss = in_response.roll(-1) & (micro_batch.segment_ids == micro_batch.segment_ids.roll(-1))
        wrong.append(replace(micro_batch, targets=micro_batch.tokens.roll(-1), in_loss=in_loss))
    return wrong


def _local_normalizer(targets: Targets) -> float:
    """Each data-parallel rank takes the mean over its own trajectories, and the gradient is the mean over ranks."""
    num_ranks = dist.get_world_size()
    own = plan_ranks(ragged_batch().lengths, MAX_TOKENS, num_ranks)[dist.get_rank()]
    return num_ranks * float(targets.weight[np.concatenate(own)].sum())


def _unmasked(
    logits: torch.Tensor, micro_batch: MicroBatch, *, tp_group: dist.ProcessGroup, num_valid: int
) -> TokenScores:
    return token_scores(logits, micro_batch, tp_group=tp_group, num_valid=num_valid + 1)


MUTATIONS: Mapping[str, Mapping[str, Any]] = {
    "no_context_parallel_sum": {"context_parallel_sum": lambda group: lambda value: value},
    "labels_shifted_after_cutting": {"pack": _shifted_after_cutting},
    "local_normalizer": {"normalizer": _local_normalizer},
    "padded_columns_unmasked": {"token_scores": _unmasked},
}


# ---------------------------------------------------------------- checkpoints


def go_on(hf_path: str, directory: str, parallel: Mapping[str, Any], checkpoint: str) -> None:
    """Load a checkpoint, or make three updates with a reset; save; and make three more."""
    out, config = Path(directory), layout_config(Path(hf_path), parallel)
    with open_topology(config.parallel) as topology:
        learner = Learner(config, topology)
        if checkpoint:
            learner.load(Path(checkpoint))
        else:
            for seed in (1, 2):
                update(learner, config, seed)
            learner.reset_reference(2)
            update(learner, config, 3)
        notes = {
            "num_updates": learner.num_updates,
            "reference_version": learner.reference_version,
            "adam_steps": sorted(learner._optimizer.adam_steps()),
        }
        saved = exported(learner)
        if topology.rank == 0:
            (out / "checkpoint").mkdir()
        dist.barrier()
        learner.save(out / "checkpoint").finish()
        for seed in (4, 5, 6):
            update(learner, config, seed)
        notes["adam_steps_after"] = sorted(learner._optimizer.adam_steps())
        weights = exported(learner)
        if topology.rank == 0:
            save_file(saved, out / "saved.safetensors")
            save_file(weights, out / "weights.safetensors")
            (out / "notes.json").write_text(json.dumps(notes), encoding="utf-8")


def compare(hf_path: str, directory: str, checkpoints: list[str]) -> None:
    """Whether checkpoints of several layouts hold the same tensors, bit for bit, under the same names."""
    num_rows = read_spec(Path(hf_path)).vocab_size
    with open_topology():
        first, *others = (tensors_of(Path(path) / "checkpoint", num_rows) for path in checkpoints)
    kinds = {re.sub(r"\.?(reference|decoder|embedding|output_layer)\..*", "", name) for name in first}
    assert kinds >= {"", "optimizer.state.param", "optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"}, kinds
    assert any(name.startswith("reference.") for name in first)
    for path, other in zip(checkpoints[1:], others, strict=True):
        assert set(other) == set(first), (path, set(other) ^ set(first))
        different = [name for name in first if not torch.equal(first[name], other[name])]
        assert not different, (path, different)


def tensors_of(weights: Path, num_rows: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint; of the vocabulary the real rows, since layouts differ in how many they add."""
    tensors = {}
    for name, value in load_plain_tensors(str(weights)).items():
        if isinstance(value, torch.Tensor):
            is_padded = name.endswith(("word_embeddings.weight", "output_layer.weight"))
            assert not (is_padded and value[num_rows:].any()), name
            tensors[name] = value[:num_rows] if is_padded else value
    return tensors
