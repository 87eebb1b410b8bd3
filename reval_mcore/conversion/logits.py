"""The same prompts through transformers and through megatron-core: the check that no mapping error survives."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from reval_mcore.architecture import ModelSpec, read_spec
from reval_mcore.config import ModelConfig
from reval_mcore.mcore.model import build_model, forward_packed
from reval_mcore.mcore.topology import open_topology
from reval_mcore.randomness import generator

_TOLERANCE = 1e-4  # of the largest logit: what float32 leaves open
_LENGTHS = (3, 17, 64, 128)


@dataclass(frozen=True)
class LogitComparison:
    num_prompts: int
    num_tokens: int
    largest_logit: float  # absolute
    largest_gap: float  # absolute

    @property
    def agree(self) -> bool:
        return self.largest_gap <= _TOLERANCE * max(1.0, self.largest_logit)


def synthetic_prompts(spec: ModelSpec) -> list[np.ndarray]:
    """int64 [length] each: random tokens of any kind."""
    stream = generator(0, "logit_check")
    lengths = [min(length, spec.max_position_embeddings) for length in _LENGTHS]
    return [stream.integers(spec.vocab_size, size=length) for length in lengths]


@torch.no_grad()
def compare_logits(hf: Path, checkpoint: Path, prompts: Sequence[np.ndarray], dtype: torch.dtype) -> LogitComparison:
    """transformers' model of `hf` against megatron-core's of `checkpoint`, weights of `dtype`, computed in float32.

    One after the other: four bytes a parameter of host memory, and again what is loaded at a time.
    """
    expected = _of_transformers(hf, prompts, dtype)
    found = _of_megatron(hf, checkpoint, prompts)
    gaps = [float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)]
    return LogitComparison(
        num_prompts=len(prompts),
        num_tokens=sum(map(len, prompts)),
        largest_logit=max(float(logits.abs().max()) for logits in expected),
        largest_gap=max(gaps),
    )


def _of_transformers(hf: Path, prompts: Sequence[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype).float().eval()
    return [model(torch.from_numpy(tokens)[None]).logits[0] for tokens in prompts]


def _of_megatron(hf: Path, checkpoint: Path, prompts: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """float32 [length, V] each."""
    spec = read_spec(hf)
    config = ModelConfig(hf_path=hf, checkpoint=checkpoint, implementation="local", precision="fp32")
    with contextlib.ExitStack() as stack:
        topology = stack.enter_context(open_topology())
        model = build_model(config, spec, topology).eval()
        logits = []
        for tokens in prompts:
            length = len(tokens)
            packed = forward_packed(
                model,
                torch.from_numpy(tokens).to(topology.device),
                torch.arange(length, device=topology.device),
                torch.tensor([0, length], dtype=torch.int32, device=topology.device),
                length,
            )
            logits.append(packed[0, :, : spec.vocab_size].cpu())
        return logits
