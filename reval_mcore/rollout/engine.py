"""What a rollout engine is: token ids in; token ids, log-probabilities, finish reasons and policy versions out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from reval_mcore.records import FinishReason, VersionSpan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a batch of responses is drawn."""

    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0  # 0.0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One response to one prompt."""

    token_ids: tuple[int, ...]
    seed: int  # names the random stream of this response, see randomness.stream_key


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """What came back, aligned with its request."""

    token_ids: np.ndarray  # int32 [response length], the stop token included
    logprobs: np.ndarray  # float32 [response length], at temperature 1 and before top-p and top-k
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]


class RolloutEngine(Protocol):
    """Every engine passes the same contract tests (tests/unit/rollout)."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[GenerationResponse]:
        """One response a request, in their order. A response is a function of the weights, its request and `sampling`;
        of the other requests only as far as rounding goes."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take (HF name, whole tensor) pairs as policy `version`. An incomplete or unknown set raises ValueError."""
        ...

    def close(self) -> None: ...
