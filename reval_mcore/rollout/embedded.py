"""The embedded engine: transformers' `generate` in the trainer's process, for one machine.

Sampling is ours, as a logits processor: every response has its own random stream, so a response does not depend on
which others share its batch, nor on anything drawn before. One uniform number a token is turned into a token by the
inverse of the cumulative distribution.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria

from reval_mcore.records import VersionSpan
from reval_mcore.rollout.engine import GenerationRequest, GenerationResponse, SamplingParams, WeightSource


class EmbeddedEngine:
    """Holds its own copy of the weights; `max_batch_size` sequences are generated at a time."""

    wants_weights = True

    def __init__(
        self, hf_path: Path, *, dtype: torch.dtype, device: torch.device, max_batch_size: int, has_weights: bool = True
    ) -> None:
        """Without weights in `hf_path` there are none until the first update."""
        # its mixins defeat type checkers
        model: Any = (
            AutoModelForCausalLM.from_pretrained(hf_path, dtype=dtype)
            if has_weights
            else (AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf_path), dtype=dtype))
        )
        self._model = model.to(device).eval()
        # named_parameters lists a tied tensor once, under its first name
        self._tensors: dict[str, torch.Tensor] = dict(self._model.named_parameters())
        self._max_batch_size = max_batch_size
        self._version = 0
        self._is_aborting = threading.Event()

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[GenerationResponse]:
        self._is_aborting.clear()
        # neighbours in length share a batch, so that little is padded
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        responses: dict[int, GenerationResponse] = {}
        for start in range(0, len(order), self._max_batch_size):
            chunk = order[start : start + self._max_batch_size]
            if self._is_aborting.is_set():
                responses.update((i, _NOTHING) for i in chunk)
                continue
            responses.update(zip(chunk, self._generate_batch([requests[i] for i in chunk], sampling), strict=True))
        return [responses[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[GenerationResponse]:
        device = self._model.device
        longest = max(len(request.token_ids) for request in requests)
        pad = sampling.stop_token_ids[0]
        prompts = torch.full((len(requests), longest), pad, device=device)
        mask = torch.zeros_like(prompts)
        for row, request in enumerate(requests):
            length = len(request.token_ids)
            prompts[row, longest - length :] = torch.tensor(request.token_ids, device=device)
            mask[row, longest - length :] = 1
        sampler = _Sampler(requests, sampling)
        self._model.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_response_tokens,
            do_sample=False,  # the sampler leaves one token to choose from
            eos_token_id=list(sampling.stop_token_ids),
            pad_token_id=pad,
        )
        output = self._model.generate(
            input_ids=prompts,
            attention_mask=mask,
            logits_processor=[sampler],
            stopping_criteria=[_WhenAborted(self._is_aborting)],
        )
        tokens = output[:, longest:].cpu().numpy().astype(np.int32)
        logprobs = sampler.logprobs().cpu().numpy()
        return [self._response(tokens[row], logprobs[row], sampling) for row in range(len(requests))]

    def _response(self, tokens: np.ndarray, logprobs: np.ndarray, sampling: SamplingParams) -> GenerationResponse:
        stops = np.flatnonzero(np.isin(tokens, sampling.stop_token_ids))
        length = int(stops[0]) + 1 if len(stops) else len(tokens)
        cut = "length" if length == sampling.max_response_tokens else "abort"
        return GenerationResponse(
            token_ids=tokens[:length].copy(),
            logprobs=logprobs[:length].copy(),
            finish_reason="stop" if len(stops) else cut,
            version_spans=(VersionSpan(self._version, 0, length),),
        )

    def abort(self) -> None:
        self._is_aborting.set()

    @torch.no_grad()
    def update_weights(self, weights: WeightSource, version: int) -> None:
        missing = set(self._tensors)
        for name, tensor in weights():
            if name not in self._tensors:
                raise ValueError(f"weight update {version}: unknown tensor {name}; the engine's model has none such")
            self._tensors[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weight update {version}: {len(missing)} tensors missing, {min(missing)} among them")
        self._version = version

    def close(self) -> None:
        self._tensors.clear()


_NOTHING = GenerationResponse(np.empty(0, np.int32), np.empty(0, np.float32), "abort", ())


class _WhenAborted(StoppingCriteria):
    """Ends all rows of a batch."""

    def __init__(self, is_aborting: threading.Event) -> None:
        self._is_aborting = is_aborting

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """bool [B]"""
        return torch.full((len(input_ids),), self._is_aborting.is_set(), device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Chooses each row's next token, and leaves only that one possible; remembers its log-probability."""

    def __init__(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        self._greedy = sampling.temperature == 0.0
        streams = [np.random.Generator(np.random.Philox(key=request.seed)) for request in requests]
        self._uniforms = torch.from_numpy(np.stack([s.random(sampling.max_response_tokens) for s in streams]))
        self._warpers: Any = LogitsProcessorList()  # annotated for LongTensor, which torch does not make
        if not self._greedy and sampling.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        chosen = logits.argmax(-1) if self._greedy else self._draw(input_ids, logits)
        self._logprobs.append(logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen[:, None], 0.0)

    def _draw(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The first token whose cumulative probability exceeds the row's uniform number, int64 [B]."""
        warped = self._warpers(input_ids, logits)
        cumulative = warped.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        uniform = self._uniforms[:, len(self._logprobs), None].to(logits.device)
        # below the total even after rounding, so that a token of probability 0 can never be chosen
        threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0]

    def logprobs(self) -> torch.Tensor:
        """float32 [B, number of steps]"""
        return torch.stack(self._logprobs, dim=1)
