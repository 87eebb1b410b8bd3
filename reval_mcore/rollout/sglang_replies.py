"""What comes back from /generate: checked, and put together where a response took several requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reval_mcore.records import FinishReason, VersionSpan
from reval_mcore.rollout.engine import GenerationResponse
from reval_mcore.rollout.sglang_server import UPDATING, NoWeightsError, ServerError
from reval_mcore.rollout.weight_sync import version_of


@dataclass
class Partial:
    """A response in the making."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float], spans: Sequence[VersionSpan]) -> None:
        start = len(self.tokens)
        self.tokens += tokens
        self.logprobs += logprobs
        for span in spans:
            moved = VersionSpan(span.version, start + span.start, start + span.end)
            if self.spans and self.spans[-1].version == moved.version:
                moved = VersionSpan(moved.version, self.spans.pop().start, moved.end)
            self.spans.append(moved)

    def response(self, finish_reason: FinishReason) -> GenerationResponse:
        return GenerationResponse(
            token_ids=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            finish_reason=finish_reason,
            version_spans=tuple(self.spans),
        )


def read_reply(
    reply: Mapping[str, Any], url: str, attempt: str
) -> tuple[list[int], list[float], list[VersionSpan], str]:
    """(tokens, log-probabilities, spans, kind of end) of a reply to /generate. Raises ServerError."""
    try:
        meta = reply["meta_info"]
        entries = meta["output_token_logprobs"] or []
        tokens = [int(token) for _, token, _ in entries]
        logprobs = [float(logprob) for logprob, _, _ in entries]
        told = [(str(span["version"]), int(span["start"]), int(span["end"])) for span in meta["weight_versions"] or []]
        kind = str(meta["finish_reason"]["type"])
        ids = [int(token) for token in reply["output_ids"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{url}: a reply to /generate is not as expected ({error!r})") from None
    spans, end = [], 0
    for label, start, stop in told:
        version = version_of(attempt, label)
        if label == UPDATING:
            raise NoWeightsError(f"{url}: answered in the middle of an update")
        if version is None or start != end:
            raise ServerError(f"{url}: answered by weights that are none of this run's: {told}")
        spans.append(VersionSpan(version, start, stop))
        end = stop
    if ids != tokens or end != len(tokens):
        raise ServerError(f"{url}: a reply to /generate has {len(ids)} tokens, {len(tokens)} with figures: {told}")
    return tokens, logprobs, [span for span in spans if span.end > span.start], kind
