"""What processes of test_families.py do: every family in turn, under one layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reval_mcore.architecture import read_spec
from reval_mcore.config import ParallelConfig
from reval_mcore.conversion.sources import find_checkpoint
from reval_mcore.conversion.to_hf import convert_to_hf
from reval_mcore.mcore import hf_directory
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.topology import Topology, open_topology
from reval_mcore.mcore.weight_files import TensorFile
from reval_mcore.objectives import make_objective, make_targets
from reval_mcore.records import Batch, Scores
from tests.builders import (
    dense_batch_scores,
    edit_config,
    make_batch,
    make_config,
    same_tensors,
    score_gap,
    scored,
    source_tensors,
)

_BUCKET_BYTES = 1 << 14  # of models of 100 KiB


def check(models: Mapping[str, str], parallel: Mapping[str, Any]) -> None:
    """From HF, and from a converted checkpoint: scores of transformers in fp64; exports that equal the source."""
    batch = make_batch(5, max_prompt=30, max_response=60, seed=4)
    with open_topology(ParallelConfig(**parallel)) as topology:
        for name, path in models.items():
            directory = Path(path)
            expected, source = dense_batch_scores(directory, batch), source_tensors(directory)
            for kind, model in (("HF", {}), ("checkpoint", {"checkpoint": f"{directory}_mcore"})):
                learner = _learner(directory, model, parallel, topology)
                _check_scores(learner, batch, expected, f"{name} from {kind}")
                _check_exports(learner, source, f"{name} from {kind}")


def _learner(directory: Path, model: Mapping[str, Any], parallel: Mapping[str, Any], topology: Topology) -> Learner:
    buckets = {"weight_bucket_bytes": _BUCKET_BYTES}
    return Learner(make_config(directory, model=dict(model), parallel=dict(parallel), rollout=buckets), topology)


def _check_scores(learner: Learner, batch: Batch, expected: Scores, what: str) -> None:
    # a log-probability is a logit less a logsumexp; a trajectory's score is the sum of up to 60 of them
    found = learner.score(batch)
    assert abs(found.logprobs - expected.logprobs).max() < 1e-4, what
    assert abs(found.initial_value - expected.initial_value).max() < 1e-4, what
    assert score_gap(found, expected) < 1e-3, what


def _check_exports(learner: Learner, source: Mapping[str, torch.Tensor], what: str) -> None:
    """The first rank alone, the last alone, all: who does not ask gets nothing."""
    ranks = range(learner.topology.world_size)
    for asking in ([ranks[0]], [ranks[-1]], ranks):
        wanted = learner.topology.rank in asking
        exported = {name: tensor.clone() for name, tensor in learner.export_weights(wanted=wanted)}
        assert same_tensors(exported, source) if wanted else not exported, what


def read_slices(model: str, parallel: Mapping[str, Any]) -> None:
    """No rank reads more of an HF directory than it holds."""
    num_read = 0

    class Counted(TensorFile):
        def __getitem__(self, index: Any) -> torch.Tensor:
            nonlocal num_read
            rows = super().__getitem__(index)
            num_read += rows.numel()
            return rows

    config = make_config(Path(model), parallel=dict(parallel))
    with open_topology(config.parallel) as topology:
        files = hf_directory.WeightFiles.__getitem__
        hf_directory.WeightFiles.__getitem__ = lambda self, name: Counted(self._open(self.file_of(name)), name)
        learner = Learner(config, topology)
        hf_directory.WeightFiles.__getitem__ = files
        assert 0 < num_read <= learner.num_parameters
        assert num_read > 0.5 * learner.num_parameters  # less is padding of the vocabulary


def train_and_export(model: str, directory: str, parallel: Mapping[str, Any]) -> None:
    """Two updates, a checkpoint, its conversion: transformers has the trainer's log-probabilities."""
    source, run = Path(model), Path(directory)
    config = make_config(source, parallel=dict(parallel), optimizer={"lr": 1e-3})
    with open_topology(config.parallel) as topology:
        learner = Learner(config, topology)
        for seed in (1, 2):
            batch = scored(learner, make_batch(8, seed=seed))
            learner.update(batch, make_targets(batch, config.reward), make_objective(config.objective))
        if topology.rank == 0:
            (run / "weights").mkdir(parents=True)
        dist.barrier()
        pending = learner.save(run / "weights")
        pending.finish()
        batch = make_batch(5, max_prompt=30, max_response=60, seed=4)
        found = learner.score(batch)
        if topology.rank == 0:
            convert_to_hf(find_checkpoint(run, source), run / "hf", max_shard_bytes=20_000)
            convert_to_hf(find_checkpoint(run, source), run / "reference", which="reference")
            expected = dense_batch_scores(run / "hf", batch)
            before = dense_batch_scores(source, batch)
            assert abs(found.logprobs - expected.logprobs).max() < 1e-4
            assert abs(found.logprobs - before.logprobs).max() > 1e-2, "two updates that changed nothing"
            assert same_tensors(source_tensors(run / "reference"), source_tensors(source))
            assert read_spec(run / "hf") == read_spec(source)
            edit_config(run / "hf", rope_parameters=None)  # as transformers 4 would see it
            assert read_spec(run / "hf") == read_spec(source)
        dist.barrier()
