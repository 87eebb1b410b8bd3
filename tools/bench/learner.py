"""Speed and memory of the learner on one device: scoring, updates, and scoring under a swapped-in reference.

    python -m tools.bench.learner --shape 0.5b --precision bf16 --out result.json

The model has random weights, so only shapes matter. Each figure is the median of `--repeats` runs after one warm-up;
the ratios compare figures of this one run. Sequences are of uneven lengths, packed as in training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from reval_mcore.config import Config, parse
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.topology import open_topology
from reval_mcore.objectives import make_objective, make_targets
from reval_mcore.records import Batch, ReferenceScores

# layers, hidden, ffn, heads, groups, vocabulary, tied embeddings; as the Qwen2.5 models of that size have them
SHAPES = {
    "tiny": (2, 64, 192, 4, 2, 512, True),
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
}


def save_random_model(shape: str, directory: Path) -> None:
    layers, hidden, ffn, heads, groups, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.bfloat16().save_pretrained(directory)


def random_batch(num_trajectories: int, prompt_tokens: int, response_tokens: int, vocabulary: int) -> Batch:
    """Prompts of `prompt_tokens`; responses between a tenth and all of `response_tokens`."""
    rng = np.random.default_rng(0)
    responses = rng.integers(response_tokens // 10 + 1, response_tokens + 1, num_trajectories)
    lengths = responses + prompt_tokens
    total = int(lengths.sum())
    zeros = np.zeros(num_trajectories)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(
        rows=np.arange(num_trajectories),
        tokens=rng.integers(0, vocabulary, total).astype(np.int32),
        cu_seqlens=starts,
        prompt_lengths=np.full(num_trajectories, prompt_tokens),
        loss_mask=np.arange(total) - np.repeat(starts[:-1], lengths) >= prompt_tokens,
        rollout_logprobs=np.zeros(total, np.float32),
        policy_version=np.zeros(num_trajectories, np.int64),
        reward=rng.integers(0, 2, num_trajectories).astype(np.float32),
        group_reward_mean=np.full(num_trajectories, 0.5, np.float32),
        group_reward_std=np.full(num_trajectories, 0.5, np.float32),
        has_verdict=np.ones(num_trajectories, bool),
        finish_reason=np.full(num_trajectories, "stop"),
        reference=ReferenceScores(zeros, zeros, zeros, np.full(num_trajectories, -1)),
        relative_probability=np.ones(num_trajectories),
    )


def make_config(directory: Path, options: argparse.Namespace) -> Config:
    raw = {
        "run": {"directory": str(directory), "num_iterations": 100},
        "model": {"hf_path": str(directory), "precision": options.precision},
        "prompts": {"train": "none", "held_out": "nor", "max_tokens": options.prompt_tokens},
        "rollout": {"num_prompts": 1, "num_responses": 2, "max_response_tokens": options.response_tokens},
        "objective": {"beta": 0.02},
        "replay": {"capacity": options.trajectories},
        "updates": {
            "per_iteration": 1,
            "batch_size": options.trajectories,
            "max_tokens_per_micro_batch": options.micro_batch_tokens,
        },
        "optimizer": {"lr": 1e-6},
    }
    return parse(raw, "command line")


def median_s(action: Callable[[], object], repeats: int) -> float:
    def timed() -> float:
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(repeats))


def measure(options: argparse.Namespace) -> dict[str, object]:
    on_cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as directory, open_topology() as topology:
        save_random_model(options.shape, Path(directory))
        config = make_config(Path(directory), options)
        learner = Learner(config, topology)
        batch = random_batch(
            options.trajectories, options.prompt_tokens, options.response_tokens, learner.spec.vocab_size
        )
        scores = learner.score_reference(batch)
        batch = replace(
            batch,
            reference=ReferenceScores(
                scores.trajectory_score, scores.initial_value, scores.final_value, np.zeros(len(batch), np.int64)
            ),
        )
        targets, objective = make_targets(batch, config.reward), make_objective(config.objective)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        update_s = median_s(lambda: learner.update(batch, targets, objective), options.repeats)
        peak = {"peak_device_memory_bytes": torch.cuda.max_memory_allocated()} if on_cuda else {}
        score_s = median_s(lambda: learner.score(batch), options.repeats)
        reference_s = median_s(lambda: learner.score_reference(batch), options.repeats)
        num_tokens = len(batch.tokens)
        return {
            "shape": options.shape,
            "precision": options.precision,
            "num_parameters": learner.num_parameters,
            "num_trajectories": len(batch),
            "num_tokens": num_tokens,
            "max_tokens_per_micro_batch": options.micro_batch_tokens,
            "update_s": update_s,
            "score_s": score_s,
            "score_reference_s": reference_s,
            "update_tokens_per_s": num_tokens / update_s,
            "score_tokens_per_s": num_tokens / score_s,
            "score_over_update": score_s / update_s,
            "reference_swap_over_score": (reference_s - score_s) / score_s,
            # 6 FLOP a parameter and token for an update; attention's own products are left out
            "update_model_tflops": 6 * learner.num_parameters * num_tokens / update_s / 1e12,
            **peak,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.learner", description="Speed and memory of the learner."
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=96)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the result to this JSON-lines file")
    options = parser.parse_args(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **measure(options),
    }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
