"""What the tests are made of: tiny Qwen2 models, random batches, configurations, and dense references.

The references share no code with the package: `transformers` and torch's own log_softmax, one trajectory at a time.
Shape legend: B trajectories, T tokens of a batch, L tokens of one trajectory, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reval_mcore.config import Config, parse
from reval_mcore.objectives import make_objective, make_targets
from reval_mcore.records import Batch, Objective, ReferenceScores, Scores, UpdateStats

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

    from reval_mcore.mcore.learner import Learner

VOCABULARY = 101  # odd, so that every layout has padding
# gradients as the loss gives them, weights that stay: the step is far below what changes an fp32 weight
FROZEN = {"lr": 1e-30, "clip_grad": 0.0}

# ---------------------------------------------------------------- models


# what sets each family apart; "llama" has Llama 3's scaling of the rotary embedding
FAMILY_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"sliding_window": None, "head_dim": 16},
}


def save_model(
    family: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> Path:
    """A small model in HF format under `directory`. Nothing is at a value that a mistake could leave untouched."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.25,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    config = AutoConfig.for_model(family, **(sizes | dict(FAMILY_FIELDS[family]) | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size="40KB")
    return directory


def save_qwen2(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    return save_model("qwen2", directory, seed=seed, dtype=dtype, **fields)


def save_like(model: Path, directory: Path, *, seed: int) -> Path:
    """A Qwen2 of the shape of another, with random weights that make a distribution far from uniform; no tokenizer."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shape = {name: config[name] for name in _SHAPE}
    return save_qwen2(directory, seed=seed, initializer_range=0.15, rms_norm_eps=config["rms_norm_eps"], **shape)


_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_parameters",
)


def load_hf(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same directory in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def edit_config(directory: Path, **fields: Any) -> None:
    """Set fields of config.json; None takes one out."""
    path = directory / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8")


def source_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a directory."""
    from safetensors.torch import load_file

    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


# ---------------------------------------------------------------- configurations


def make_config(hf_path: Path, **sections: Mapping[str, Any]) -> Config:
    """A whole configuration; `optimizer={"lr": 1e-3}` and the like are laid over the base."""
    base: dict[str, dict[str, Any]] = {
        "run": {"directory": "unused", "num_iterations": 10},
        "model": {"hf_path": str(hf_path), "implementation": "local", "precision": "fp32"},
        "prompts": {"train": "a", "held_out": "b", "max_tokens": 40},
        "rollout": {"num_prompts": 4, "num_responses": 4, "max_response_tokens": 40},
        "reward": {"shaping": "raw", "truncation": "mask"},
        "objective": {"beta": 0.5},
        "replay": {"capacity": 100},
        "updates": {"per_iteration": 2, "batch_size": 16, "max_tokens_per_micro_batch": 100},
        "optimizer": {"lr": 1e-3},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | dict(values)
    return parse(base, "test")


# ---------------------------------------------------------------- batches


def make_batch(
    size: int,
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    max_prompt: int = 12,
    max_response: int = 24,
    holes: bool = True,
    unjudged: bool = False,
    lengths: Sequence[int] = (),
) -> Batch:
    """Random ragged trajectories; with `holes`, loss masks as of several turns; with `unjudged`, rows of no verdict.

    With `lengths`, one for each, the trajectories have those, in a random order.
    """
    rng = np.random.default_rng(seed)
    if lengths:
        totals = rng.permutation(lengths)
        prompts = rng.integers(np.maximum(1, totals - max_response), np.minimum(max_prompt, totals - 1) + 1)
        responses = totals - prompts
    else:
        prompts, responses = rng.integers(1, max_prompt + 1, size), rng.integers(1, max_response + 1, size)
    masks = []
    for prompt, response in zip(prompts, responses, strict=True):
        mask = np.ones(response, bool)
        if holes:
            mask = rng.random(response) < 0.7
            mask[rng.integers(response)] = True  # at least one token is the policy's
        masks.append(np.concatenate([np.zeros(prompt, bool), mask]))
    num_tokens = int((prompts + responses).sum())
    has_verdict = np.ones(size, bool)
    if unjudged:
        has_verdict = rng.random(size) < 0.6
        has_verdict[0], has_verdict[1:2] = True, False
    unscored = np.zeros(size)
    return Batch(
        rows=np.arange(size),
        tokens=rng.integers(0, vocabulary, num_tokens).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(prompts + responses)]),
        prompt_lengths=prompts,
        loss_mask=np.concatenate(masks),
        rollout_logprobs=np.zeros(num_tokens, np.float32),
        policy_version=np.zeros(size, np.int64),
        reward=rng.integers(0, 2, size).astype(np.float32),
        group_reward_mean=rng.random(size, np.float32),
        group_reward_std=rng.random(size, np.float32),
        has_verdict=has_verdict,
        finish_reason=np.where(has_verdict, "stop", "length"),
        reference=ReferenceScores(unscored, unscored, unscored, np.full(size, -1)),
        relative_probability=np.ones(size),
    )


def with_reference(batch: Batch, scores: Scores, version: int = 0) -> Batch:
    """The batch with these scores stored as the reference's."""
    stored = ReferenceScores(
        scores.trajectory_score, scores.initial_value, scores.final_value, np.full(len(batch), version)
    )
    return replace(batch, reference=stored)


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some trajectories of a batch, in this order."""
    slots = np.concatenate([np.arange(batch.cu_seqlens[row], batch.cu_seqlens[row + 1]) for row in rows])
    reference = batch.reference
    chosen = list(rows)
    return Batch(
        rows=batch.rows[chosen],
        tokens=batch.tokens[slots],
        cu_seqlens=np.concatenate([[0], np.cumsum(batch.lengths[chosen])]),
        prompt_lengths=batch.prompt_lengths[chosen],
        loss_mask=batch.loss_mask[slots],
        rollout_logprobs=batch.rollout_logprobs[slots],
        policy_version=batch.policy_version[chosen],
        reward=batch.reward[chosen],
        group_reward_mean=batch.group_reward_mean[chosen],
        group_reward_std=batch.group_reward_std[chosen],
        has_verdict=batch.has_verdict[chosen],
        finish_reason=batch.finish_reason[chosen],
        reference=ReferenceScores(
            reference.trajectory_score[chosen],
            reference.initial_value[chosen],
            reference.final_value[chosen],
            reference.reference_version[chosen],
        ),
        relative_probability=batch.relative_probability[chosen],
    )


def sequences(batch: Batch) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Of each trajectory its tokens int64 [L], and the positions whose next token is in the loss, by a plain loop."""
    for row in range(len(batch)):
        start, end = int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])
        tokens = torch.tensor([int(token) for token in batch.tokens[start:end]])
        yield tokens, [t for t in range(end - start - 1) if batch.loss_mask[start + t + 1]]


# ---------------------------------------------------------------- dense references


@dataclass
class DenseScores:
    """One trajectory, from its logits [L, V] by log_softmax: differentiable, in the logits' dtype."""

    trajectory_score: torch.Tensor  # V(s_1) + sum of log pi, as the paper writes it
    initial_value: torch.Tensor
    final_value: torch.Tensor
    logprobs: torch.Tensor  # of the tokens in the loss


def dense_scores(logits: torch.Tensor, tokens: torch.Tensor, positions: list[int]) -> DenseScores:
    at = torch.tensor(positions)
    logprobs = logits.log_softmax(-1)[at, tokens[at + 1]]
    initial_value = logits[positions[0]].logsumexp(-1)
    return DenseScores(initial_value + logprobs.sum(), initial_value, logits[-1].logsumexp(-1), logprobs)


def dense_loss(
    logits: Sequence[torch.Tensor],
    batch: Batch,
    rewards: np.ndarray,
    *,
    beta: float,
    loss_scale: str = "residual",
    bootstrap: bool = False,
    tbrm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss over the trajectories that count, residuals [B]) by the paper's formula."""
    residuals, counted = [], []
    for row, (row_logits, (tokens, positions)) in enumerate(zip(logits, sequences(batch), strict=True)):
        scores = dense_scores(row_logits, tokens, positions)
        reference = batch.reference.trajectory_score[row] - (batch.reference.initial_value[row] if tbrm else 0.0)
        residual = scores.trajectory_score - reference
        if batch.has_verdict[row]:
            residual = residual - rewards[row] / beta
        elif bootstrap:
            residual = residual - (scores.final_value - (0.0 if tbrm else batch.reference.final_value[row]))
        residuals.append(residual)
        counted.append(bool(batch.has_verdict[row]) or bootstrap)
    residual = torch.stack(residuals)
    scaled = residual * beta if loss_scale == "beta_residual" else residual
    return scaled.square()[torch.tensor(counted)].mean(), residual


def hf_logits(model: Qwen2ForCausalLM, batch: Batch) -> list[torch.Tensor]:
    """[L, V] of each trajectory, run alone."""
    return [model(tokens[None]).logits[0] for tokens, _ in sequences(batch)]


def dense_batch_scores(directory: Path, batch: Batch) -> Scores:
    """transformers in fp64, one trajectory at a time."""
    trajectory, initial, final = [], [], []
    logprobs = np.zeros(len(batch.tokens))
    with torch.no_grad():
        logits = hf_logits(load_hf(directory, torch.float64), batch)
    for row, (z, (tokens, positions)) in enumerate(zip(logits, sequences(batch), strict=True)):
        scores = dense_scores(z, tokens, positions)
        trajectory.append(float(scores.trajectory_score))
        initial.append(float(scores.initial_value))
        final.append(float(scores.final_value))
        logprobs[[int(batch.cu_seqlens[row]) + t + 1 for t in positions]] = scores.logprobs.numpy()
    return Scores(np.array(trajectory), np.array(initial), np.array(final), logprobs)


def hf_gradients(model: Qwen2ForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# ---------------------------------------------------------------- driving a learner


def scored(learner: Learner, batch: Batch) -> Batch:
    """The batch with fresh scores of the learner's reference."""
    return with_reference(batch, learner.score_reference(batch), learner.reference_version)


def update(learner: Learner, batch: Batch, config: Config, objective: Objective | None = None) -> UpdateStats:
    """One update with the configuration's rewards, and its objective unless another is given."""
    return learner.update(batch, make_targets(batch, config.reward), objective or make_objective(config.objective))


def train(learner: Learner, config: Config, num_updates: int, *, seed: int = 50) -> None:
    """Updates on batches of their own, so that the policy leaves the reference."""
    for number in range(num_updates):
        update(learner, scored(learner, make_batch(8, seed=seed + number)), config)


def max_gap(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())


def score_gap(left: Scores, right: Scores) -> float:
    """Largest absolute difference of any score."""
    return max(
        max_gap(left.trajectory_score, right.trajectory_score),
        max_gap(left.initial_value, right.initial_value),
        max_gap(left.final_value, right.final_value),
        max_gap(left.logprobs, right.logprobs),
    )


# ---------------------------------------------------------------- looking into a learner


def main_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """megatron-core's fp32 gradient of a parameter: a view of its buffer."""
    gradient = parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(gradient, torch.Tensor)
    return gradient


def learner_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Gradients of the last update under HF names, on the host. With clip_grad = 0 they are as the loss gave them."""
    from reval_mcore.mcore.hf_mapping import from_shards, global_names, hf_names

    found: dict[str, torch.Tensor] = {}
    for name, parameter in global_names(learner.model):
        layout, targets = hf_names(name, learner.spec)
        gradient = main_gradient(parameter).detach().cpu().clone()
        found.update(zip(targets, from_shards(layout, [gradient], learner.spec), strict=True))
    return found


def learner_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters, under their own names."""
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def exported(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in learner.export_weights()}


def same_tensors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """The same names, and bit for bit the same values."""
    return set(left) == set(right) and all(torch.equal(value, right[name]) for name, value in left.items())


def max_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference over tensors of the same names."""
    assert set(left) == set(right), set(left) ^ set(right)
    return max(float((value.double() - right[name].double()).abs().max()) for name, value in left.items())
