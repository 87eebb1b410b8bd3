"""What a rollout engine is: token ids in; token ids, log-probabilities, finish reasons and policy versions out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

    token_ids: np.ndarray  # int32 [response length], the stop token included; may be empty after an abort
    logprobs: np.ndarray  # float32 [response length], at temperature 1 and before top-p and top-k
    finish_reason: FinishReason  # "abort": ended by `abort`, with the tokens so far
    version_spans: tuple[VersionSpan, ...]  # of all tokens, in their order


# (HF name, whole tensor) pairs of all weights, as often as it is called: a failed transfer starts over
WeightSource = Callable[[], Iterable[tuple[str, "torch.Tensor"]]]


class EngineError(Exception):
    """An engine cannot go on: none of its servers is left, say. One line, with the causes."""


class RolloutEngine(Protocol):
    """Every engine passes the same contract tests (tests/unit/rollout, tests/sglang)."""

    wants_weights: bool  # this rank looks at what `update_weights` is given; where it does not, there may be none of it

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[GenerationResponse]:
        """One response a request, in their order; of the other requests each depends as far as rounding goes.

        An engine that can honour seeds makes each a function of the weights, its request and `sampling`. Raises
        EngineError where responses cannot be had.
        """
        ...

    def abort(self) -> None:
        """End the `generate` that is running in another thread: it returns soon, unfinished responses as "abort"."""
        ...

    def update_weights(self, weights: WeightSource, version: int) -> None:
        """Take these weights as policy `version`. An incomplete or unknown set raises ValueError.

        All ranks of a trainer call it together, and `weights` is called by all of them and read to its end.
        """
        ...

    def close(self) -> None: ...
