"""The learner's verbs against transformers and dense losses, and the identities of the algorithm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from reval_mcore import architecture
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.packing import pack
from reval_mcore.mcore.passes import Passes
from reval_mcore.objectives import shape_rewards
from reval_mcore.records import Scores
from tests.builders import (
    FROZEN,
    VOCABULARY,
    dense_batch_scores,
    dense_loss,
    exported,
    hf_gradients,
    hf_logits,
    learner_gradients,
    load_hf,
    main_gradient,
    make_batch,
    make_config,
    max_gap,
    same_tensors,
    score_gap,
    scored,
    source_tensors,
    take,
    train,
    update,
    with_reference,
)

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology

# ---------------------------------------------------------------- scores and gradients


def test_scores_of_packed_ragged_batches_equal_transformers(hf_path: Path, topology: Topology) -> None:
    batch = make_batch(20)
    scores = Learner(make_config(hf_path), topology).score(batch)
    expected = dense_batch_scores(hf_path, batch)
    assert scores.trajectory_score.dtype == np.float64
    assert max_gap(scores.logprobs, expected.logprobs) < 1e-4
    assert score_gap(scores, expected) < 2e-4
    assert not scores.logprobs[~batch.loss_mask].any()
    assert scores.logprobs[batch.loss_mask].all()


def test_scores_of_a_packed_batch_equal_those_of_each_trajectory_alone(untied: Path, topology: Topology) -> None:
    batch = make_batch(15)
    learner = Learner(make_config(untied), topology)
    together = learner.score(batch)
    for row in range(len(batch)):
        alone = learner.score(take(batch, [row]))
        slots = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        assert max_gap(together.logprobs[slots], alone.logprobs) < 1e-5
        assert abs(together.trajectory_score[row] - alone.trajectory_score[0]) < 5e-5
        assert abs(together.initial_value[row] - alone.initial_value[0]) < 1e-5
        assert abs(together.final_value[row] - alone.final_value[0]) < 1e-5


@pytest.mark.parametrize("truncation", ["mask", "bootstrap"])
@pytest.mark.parametrize("name", ["reval", "tbrm"])
def test_parameter_gradients_of_an_update_equal_transformers_in_fp64(
    name: Any, truncation: str, hf_path: Path, topology: Topology
) -> None:
    """Packed in micro-batches, with several turns and rows without verdict, against one trajectory at a time."""
    config = make_config(
        hf_path, objective={"name": name, "beta": 0.1}, reward={"truncation": truncation}, optimizer=FROZEN
    )
    batch = make_batch(12, unjudged=True)
    other = np.random.default_rng(1).normal(size=(3, len(batch)))  # a reference that is not this model
    own = dense_batch_scores(hf_path, batch)
    batch = with_reference(
        batch,
        Scores(own.trajectory_score + other[0], own.initial_value + other[1], own.final_value + other[2], own.logprobs),
    )
    learner = Learner(config, topology)
    assert len(pack(batch, max_tokens=100, device=topology.device)) > 2
    stats = update(learner, batch, config)

    model = load_hf(hf_path, torch.float64)
    loss, residual = dense_loss(
        hf_logits(model, batch),
        batch,
        shape_rewards(batch, config.reward),
        beta=config.objective.beta,
        bootstrap=truncation == "bootstrap",
        tbrm=name == "tbrm",
    )
    expected = hf_gradients(model, loss)
    found = learner_gradients(learner)
    assert set(found) == set(expected) == set(source_tensors(hf_path))
    for key, gradient in expected.items():
        gap = float((found[key] - gradient).abs().max() / gradient.abs().max())
        assert gap < 1e-4, f"{key}: {gap}"
    norm = float(torch.cat([gradient.flatten() for gradient in expected.values()]).norm())
    assert stats.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert stats.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert max_gap(stats.residual, residual.detach().numpy()) < 2e-4
    assert not stats.skipped


def test_gradients_of_a_packed_update_equal_those_of_one_trajectory_a_micro_batch(
    untied: Path, topology: Topology
) -> None:
    batch = make_batch(10, max_prompt=20, max_response=30)
    batch = with_reference(batch, dense_batch_scores(untied, batch))
    gradients = []
    for max_tokens in (400, 80):
        config = make_config(untied, optimizer=FROZEN, updates={"max_tokens_per_micro_batch": max_tokens})
        learner = Learner(config, topology)
        update(learner, batch, config)
        gradients.append(learner_gradients(learner))
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).abs().max()) < 1e-5 * float(gradient.abs().max()), name


def test_rows_without_verdict_leave_loss_normaliser_and_gradient(untied: Path, topology: Topology) -> None:
    """Under "mask", a batch and its judged rows alone give the same update."""
    config = make_config(untied, optimizer=FROZEN)
    batch = with_reference(make_batch(12, unjudged=True), dense_batch_scores(untied, make_batch(12, unjudged=True)))
    judged = take(batch, np.flatnonzero(batch.has_verdict).tolist())
    learners = [Learner(config, topology) for _ in range(2)]
    stats = [update(learner, part, config) for learner, part in zip(learners, (batch, judged), strict=True)]
    assert stats[0].metrics["loss"] == pytest.approx(stats[1].metrics["loss"], rel=1e-5)
    assert stats[0].metrics["log_ratio"] == pytest.approx(stats[1].metrics["log_ratio"], abs=1e-5)
    assert stats[0].metrics["masked_fraction"] == pytest.approx(1.0 - len(judged) / len(batch))
    whole, part = learner_gradients(learners[0]), learner_gradients(learners[1])
    for name, gradient in whole.items():
        assert float((gradient - part[name]).abs().max()) < 1e-5 * float(gradient.abs().max()), name


# ---------------------------------------------------------------- vocabulary padding


@pytest.mark.parametrize("multiple", [1, 128, 512])
def test_padding_the_vocabulary_changes_nothing(
    multiple: int, hf_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "VOCABULARY_MULTIPLE", multiple)
    config = make_config(hf_path)
    learner = Learner(config, topology)
    table = learner.model.embedding.word_embeddings.weight
    assert len(table) == {1: VOCABULARY, 128: 128, 512: 512}[multiple]
    batch = make_batch(16)
    assert score_gap(learner.score(batch), dense_batch_scores(hf_path, batch)) < 2e-4
    batch = scored(learner, batch)
    for _ in range(3):
        update(learner, batch, config)
        for name, parameter in learner.model.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                gradient = main_gradient(parameter)
                assert gradient[:VOCABULARY].any()
                assert not gradient[VOCABULARY:].any()
                assert not parameter[VOCABULARY:].any()


def test_unmasked_padding_would_be_noticed(untied: Path, topology: Topology) -> None:
    learner = Learner(make_config(untied), topology)
    batch = make_batch(8)
    expected = dense_batch_scores(untied, batch)
    spec = replace(learner.spec, vocab_size=128)
    passes = Passes(learner._ddp, spec, topology, max_tokens_per_micro_batch=100)
    assert score_gap(learner.score(batch), expected) < 2e-4
    assert score_gap(passes.score(batch), expected) > 1e-2


# ---------------------------------------------------------------- weights out


def test_export_follows_the_updates(hf_path: Path, topology: Topology, tmp_path: Path) -> None:
    """Exported weights, loaded into transformers, give the learner's scores of after the updates."""
    from safetensors.torch import save_file

    config = make_config(hf_path)
    learner = Learner(config, topology)
    source = source_tensors(hf_path)
    assert same_tensors(exported(learner), source)
    train(learner, config, 3)
    weights = exported(learner)
    assert set(weights) == set(source)
    assert not any(torch.equal(weights[name], source[name]) for name in source)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((hf_path / "config.json").read_bytes())
    batch = make_batch(10)
    assert score_gap(learner.score(batch), dense_batch_scores(tmp_path, batch)) < 2e-4
