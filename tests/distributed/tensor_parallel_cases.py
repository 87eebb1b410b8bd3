"""What the two ranks do in test_tensor_parallel.py: they act and write down; the tests judge."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from reval_mcore.config import Config, ParallelConfig
from reval_mcore.mcore.hf_mapping import global_names
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.loss_head import vocab_parallel_logsumexp
from reval_mcore.mcore.topology import Topology, open_topology
from reval_mcore.objectives import make_objective, make_targets
from reval_mcore.records import Batch, Scores, UpdateStats
from tests.builders import (
    exported,
    learner_weights,
    main_gradient,
    make_batch,
    make_config,
    same_tensors,
    with_reference,
)

SEEDS, NEXT_SEED = (3, 4, 5), 6  # of the batches of three updates and of one more


def run_config(hf_path: Path) -> Config:
    return make_config(hf_path, reward={"truncation": "bootstrap"}, optimizer={"lr": 1e-4, "eps": 1e-3})


def run_update(learner: Learner, seed: int, config: Config) -> UpdateStats:
    batch = make_batch(10, seed=seed, unjudged=True)
    batch = with_reference(batch, learner.score_reference(batch), learner.reference_version)
    return learner.update(batch, make_targets(batch, config.reward), make_objective(config.objective))


# ---------------------------------------------------------------- the loss head


def logsumexp(num_valid: list[int]) -> None:
    """Each rank checks its own columns; the padded ones are at the end, and may be all that rank 1 holds."""
    with open_topology(ParallelConfig(tensor_model_parallel_size=2)) as topology:
        for valid in num_valid:
            _check_logsumexp(valid, topology)


def _check_logsumexp(valid: int, topology: Topology) -> None:
    width = 64
    generator = torch.Generator().manual_seed(valid)
    whole = 20.0 * torch.randn(5, 9, 2 * width, generator=generator, dtype=torch.float64)
    whole[0, 0, 5] = 700.0
    whole[1, :, valid:] = 900.0
    targets = torch.randint(0, valid, (5, 9), generator=generator)
    targets[0, 1], targets[0, 2] = 0, valid - 1
    upstream = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    upstream *= torch.rand(2, 5, 9, generator=generator) < 0.7

    dense = whole.clone().requires_grad_()
    values = torch.logsumexp(dense[..., :valid], -1), dense.gather(-1, targets[..., None])[..., 0]
    torch.autograd.backward(values, tuple(upstream))
    assert dense.grad is not None

    own = slice(topology.rank * width, (topology.rank + 1) * width)
    shard = whole[..., own].contiguous()
    before = shard.clone()
    shard.requires_grad_()
    found = vocab_parallel_logsumexp(shard, targets, tp_group=topology.groups.tp, num_valid=valid)
    torch.autograd.backward(found, tuple(upstream))
    assert shard.grad is not None
    value_gap = max(float((f - v).detach().abs().max()) for f, v in zip(found, values, strict=True))
    gradient_gap = float((shard.grad - dense.grad[..., own]).abs().max())
    print(f"{valid} of {2 * width}: value gap {value_gap:.1e}, gradient gap {gradient_gap:.1e}")
    assert value_gap < 1e-12
    assert gradient_gap < 1e-13
    assert torch.equal(shard.detach(), before)
    assert not shard.grad[..., max(valid - topology.rank * width, 0) :].any()


# ---------------------------------------------------------------- the learner


def live(hf_path: str, directory: str) -> None:
    """A whole life under as many tensor-parallel ranks as there are."""
    with open_topology(ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))) as topology:
        notes = _live(Path(hf_path), Path(directory), topology)
        loaded = [(name, module) for name, module in sys.modules.items() if name.startswith("megatron.")]
        notes["bare_modules"] = [name for name, module in loaded if vars(module).get("torch") is torch]
        (Path(directory) / f"rank{topology.rank}.json").write_text(json.dumps(notes), encoding="utf-8")


def _live(hf_path: Path, directory: Path, topology: Topology) -> dict[str, object]:
    config = run_config(hf_path)
    learner = Learner(config, topology)
    batch = make_batch(20)
    first = learner.score(batch)
    _save_scores(directory / "scores.npz", first, topology)
    _save_weights(directory / "exported.safetensors", learner, topology)

    notes: dict[str, object] = {"calibrated": _is_calibrated(learner, batch, config)}
    stats = [run_update(learner, seed, config) for seed in SEEDS]
    notes["grad_norm"] = [each.metrics["grad_norm"] for each in stats]
    notes["loss"] = [each.metrics["loss"] for each in stats]
    notes["residual"] = [each.residual.tolist() for each in stats]
    notes["padding_is_zero"] = _padding_is_zero(learner, topology)
    notes["reference_reproduced"] = bool((learner.score_reference(batch).logprobs == first.logprobs).all())
    _save_weights(directory / "updated.safetensors", learner, topology)

    written = directory / "checkpoint"
    if topology.rank == 0:
        written.mkdir()
    dist.barrier()
    pending = learner.save(written, in_background=True)
    run_update(Learner(config, topology), NEXT_SEED, config)  # collectives of training go on meanwhile
    while not pending.is_done():
        time.sleep(0.01)
    pending.finish()
    resumed = Learner(config, topology)
    resumed.load(written)
    for each in (learner, resumed):
        run_update(each, NEXT_SEED, config)
    notes["resume_is_exact"] = same_tensors(learner_weights(resumed), learner_weights(learner))
    notes["adam_steps"] = sorted(resumed._optimizer.adam_steps())
    _save_weights(directory / "continued.safetensors", learner, topology)

    learner.reset_reference(1)
    scored = with_reference(batch, learner.score_reference(batch), 1)
    last = learner.update(scored, make_targets(scored, config.reward), make_objective(config.objective))
    notes["reset_identity"] = bool((last.residual == -batch.reward / config.objective.beta).all())
    return notes


def continue_from(hf_path: str, checkpoint: str, directory: str) -> None:
    """Load what another layout wrote, and take the next update."""
    with open_topology(ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))) as topology:
        config = run_config(Path(hf_path))
        learner = Learner(config, topology)
        learner.load(Path(checkpoint))
        _save_weights(Path(directory) / "loaded.safetensors", learner, topology)
        _save_scores(Path(directory) / "loaded_reference.npz", learner.score_reference(make_batch(20)), topology)
        run_update(learner, NEXT_SEED, config)
        _save_weights(Path(directory) / "resharded.safetensors", learner, topology)
        print(sorted(learner._optimizer.adam_steps()))


def _is_calibrated(learner: Learner, batch: Batch, config: Config) -> bool:
    """Without reward at the reference, residuals are 0.0 and the update leaves every weight as it is."""
    before = learner_weights(learner)
    plain = replace(batch, reward=np.zeros(len(batch), np.float32))
    plain = with_reference(plain, learner.score_reference(plain))
    stats = learner.update(plain, make_targets(plain, config.reward), make_objective(config.objective))
    assert stats.metrics["grad_norm"] == 0.0
    return not stats.residual.any() and same_tensors(before, learner_weights(learner))


def _padding_is_zero(learner: Learner, topology: Topology) -> bool:
    """This rank's rows beyond the vocabulary, in weights and in the last gradients."""
    found = []
    for name, parameter in global_names(learner.model):
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            first_row = topology.rank * len(parameter)
            padding = slice(max(learner.spec.vocab_size - first_row, 0), None)
            found += [bool(parameter[padding].any()), bool(main_gradient(parameter)[padding].any())]
    return not any(found)


def _save_scores(path: Path, scores: Scores, topology: Topology) -> None:
    if topology.rank == 0:
        np.savez(
            path,
            trajectory_score=scores.trajectory_score,
            initial_value=scores.initial_value,
            final_value=scores.final_value,
            logprobs=scores.logprobs,
        )


def _save_weights(path: Path, learner: Learner, topology: Topology) -> None:
    weights = exported(learner)  # collective
    if topology.rank == 0:
        save_file(weights, path)
