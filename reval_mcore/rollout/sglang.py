"""The engine on SGLang servers: every response a request of its own, retried elsewhere, ended on demand.

A response that a server gave up half-way goes on from its tokens, on any server; its version spans tell what made what.
The calling threads see plain functions; all that waits lives on one event loop in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from reval_mcore.ranks import Ranks
from reval_mcore.records import FinishReason
from reval_mcore.rollout.engine import (
    EngineError,
    GenerationRequest,
    GenerationResponse,
    SamplingParams,
    WeightSource,
)
from reval_mcore.rollout.sglang_fleet import NONE_ANNOUNCED, FindServers, Fleet, Member, backoff_s
from reval_mcore.rollout.sglang_replies import Partial, read_reply
from reval_mcore.rollout.sglang_server import (
    BrokenConnectionError,
    NoAnswerError,
    NoWeightsError,
    ServerError,
    SGLangServer,
)
from reval_mcore.rollout.weight_sync import WeightSync, label_of, version_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
# a server takes what is not given from the model's generation_config.json
_PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
_MAX_FAILURES = 6  # of one request, in a row
_MAX_TRANSFERS = 3  # of one version
_LOOK_AGAIN_S = 1.0  # for servers, before the first is there
_ABORT_INTERVAL_S = 1.0  # an abort overtakes a request that is still on its way, so it is said again


class EventLoop:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="sglang", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """To its end, from any other thread; an interrupt of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class SGLangEngine:
    """All ranks of a trainer have one, each generates its part; `sync` is used by the first alone.

    `servers`: URLs, or a function that tells which there are now: some may join and leave at any time then.
    `vocab_size`: ids from there on kill a server, so they are refused here. `timeout_s`: of one request to /generate;
    `control_timeout_s`: of any other, updates aside. `patience_s`: how long to be without a fit server.
    """

    def __init__(
        self,
        servers: Sequence[str] | FindServers,
        sync: WeightSync,
        *,
        vocab_size: int,
        api_key: str = "",
        max_concurrent_requests: int = 64,
        timeout_s: float = 600.0,
        control_timeout_s: float = 30.0,
        patience_s: float = 300.0,
        ranks: Ranks | None = None,
    ) -> None:
        self._sync = sync
        self._ranks = ranks = ranks or Ranks()
        self.wants_weights = ranks.is_first
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s
        self._patience_s = patience_s
        self._may_join = callable(servers)
        self.attempt = ranks.share(lambda: uuid.uuid4().hex[:8])  # tells this attempt's versions from any other's
        self._oldest = 0  # version that is good enough
        self._name = uuid.uuid4().hex[:8]
        self._is_aborting = threading.Event()
        self._running: dict[str, Member] = {}  # by request id
        self._numbers = itertools.count()
        self._loop = EventLoop()
        self._fleet = self._loop.run(
            self._open_fleet(
                servers if callable(servers) else lambda: servers,
                lambda url: SGLangServer(url, api_key),
                max_concurrent_requests=max_concurrent_requests,
                timeout_s=control_timeout_s,
                patience_s=patience_s,
                restore=sync.restore if ranks.is_first else None,
            )
        )

    async def _open_fleet(self, *arguments: Any, **settings: Any) -> Fleet:
        fleet = Fleet(*arguments, **settings)
        await fleet.look_around()
        self._watch = asyncio.create_task(fleet.watch())
        return fleet

    def follow(self, attempt: str, oldest: int = 0) -> None:
        """From now on use whatever version of this attempt at a run another process brings to the servers, from
        `oldest` on. What a server is at work on it may finish."""
        self._loop.run(self._follow(attempt, oldest))

    async def _follow(self, attempt: str, oldest: int) -> None:
        if (attempt, oldest) == (self.attempt, self._oldest):
            return
        is_new, self.attempt, self._oldest = attempt != self.attempt, attempt, oldest

        def follows(label: str) -> bool:
            version = version_of(attempt, label)
            return version is not None and version >= oldest

        await self._fleet.follow(follows, f"version {oldest} of attempt {attempt}, or a later one", is_new=is_new)

    def check(self) -> None:
        """Raises ValueError where a server that answers cannot be used, or none answers.

        Of servers that may join it waits for one, `patience_s`, and the others may be as they are.
        """
        self._loop.run(self._check())

    async def _check(self) -> None:
        deadline, is_told = time.monotonic() + self._patience_s, False
        while True:
            await self._fleet.look_around()
            members = list(self._fleet.members)
            errors = await asyncio.gather(*(self._probe(member) for member in members))
            failed = {member.url: error for member, error in zip(members, errors, strict=True) if error is not None}
            refusals = [str(error) for error in failed.values() if not isinstance(error, NoAnswerError)]
            if len(failed) < len(members) and (self._may_join or not refusals):
                for member in members:
                    if member.url in failed:
                        await self._fleet.lose(member, failed[member.url])
                return
            reasons = "; ".join(refusals or map(str, failed.values())) or NONE_ANNOUNCED
            if not self._may_join:
                raise ValueError(f"rollout.servers: {'' if refusals else 'none answers; start them first: '}{reasons}")
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rollout.servers: none for {self._patience_s:g} s; start them first, or name their URLs: {reasons}"
                )
            if not is_told:
                logger.warning("waiting for a server: %s", reasons)
                is_told = True
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _probe(self, member: Member) -> ServerError | None:
        """What keeps it from being used."""
        try:
            member.info = await member.server.probe(self._control_timeout_s)
            self._fleet.hear(member)
            await member.server.check_replies(self._control_timeout_s)
        except ServerError as error:
            return error
        return None

    # ------------------------------------------------------------ generating

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[GenerationResponse]:
        for request in requests:
            wrong = [token for token in request.token_ids if not 0 <= token < self._vocab_size]
            if wrong:
                raise ValueError(f"token id {wrong[0]} in a prompt: the vocabulary has {self._vocab_size}")
        self._is_aborting.clear()
        return self._loop.run(self._generate(requests, sampling))

    async def _generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[GenerationResponse]:
        try:
            async with asyncio.TaskGroup() as group:
                aborter = group.create_task(self._abort_when_asked())
                tasks = [group.create_task(self._respond(request, sampling)) for request in requests]
                responses = await asyncio.gather(*tasks)
                aborter.cancel()
        except BaseExceptionGroup as errors:  # the first is the cause; all others were cancelled
            raise errors.exceptions[0] from None
        return responses

    async def _refuse_tempered(self, member: Member, sampling: SamplingParams) -> None:
        """Raises EngineError where its log-probabilities would not be those at temperature 1, ServerError where it does
        not tell."""
        if sampling.temperature in (0.0, 1.0):
            return
        async with member.asking:
            if member.is_tempered is None:
                member.is_tempered = await member.server.is_tempered(self._control_timeout_s)
        if member.is_tempered:
            raise EngineError(
                f"{member.url}: gives log-probabilities at temperature {sampling.temperature:g}, not at 1; start it "
                "with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
            )

    async def _respond(self, request: GenerationRequest, sampling: SamplingParams) -> GenerationResponse:
        partial, avoid, num_failures = Partial(), set[str](), 0
        while not self._is_aborting.is_set():
            member = await self._fleet.acquire(avoid)
            num_before = len(partial.tokens)
            try:
                await self._refuse_tempered(member, sampling)
                finish_reason = await self._ask(member, request, sampling, partial)
            except NoWeightsError as error:  # as often as weights come
                await self._fleet.doubt(member, error)
                continue
            except ServerError as error:
                num_failures += 1
                avoid.add(member.url)
                await self._blame(member, error, num_failures)
                continue
            finally:
                await self._fleet.release(member)
            if finish_reason is not None:
                return partial.response(finish_reason)
            num_failures = 0 if len(partial.tokens) > num_before else num_failures + 1
            if num_failures > _MAX_FAILURES:
                raise EngineError(f"{member.url}: ends responses without a token, again and again")
            await asyncio.sleep(backoff_s(num_failures) if num_failures else 0.0)
        return partial.response("abort")

    async def _blame(self, member: Member, error: ServerError, num_failures: int) -> None:
        """Of a failed request: the server is lost, unless the request is to blame, which no other would take."""
        if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 429):
            raise EngineError(str(error)) from None
        if num_failures > _MAX_FAILURES:
            raise EngineError(f"given up after {num_failures} servers failed, the last one: {error}") from None
        if error.status == 429:
            await asyncio.sleep(backoff_s(num_failures))
            return
        if not member.is_fit:  # lost already, by another request: one failure and not one for each
            return
        if isinstance(error, BrokenConnectionError):
            await self._fleet.doubt(member, error)
        else:
            await self._fleet.lose(member, error)

    async def _ask(
        self, member: Member, request: GenerationRequest, sampling: SamplingParams, partial: Partial
    ) -> FinishReason | None:
        """Have one server go on with a response; None where it is not at its end."""
        rid = f"{self._name}-{self._ranks.rank}-{next(self._numbers)}"
        remaining = sampling.max_response_tokens - len(partial.tokens)
        body = {
            "rid": rid,
            "input_ids": [*request.token_ids, *partial.tokens],
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": remaining,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                **_PLAIN,
                "stop_token_ids": list(sampling.stop_token_ids),
                "skip_special_tokens": False,
            },
        }
        self._running[rid] = member
        oldest = self._oldest  # what is wanted now; it may finish under that
        try:
            reply = await self._unless_lost(member, member.server.post("/generate", body, self._timeout_s))
        except ServerError:
            await self._end(rid, member)
            raise
        finally:
            del self._running[rid]
        tokens, logprobs, spans, kind = read_reply(reply, member.url, self.attempt)
        if len(tokens) > remaining or any(not 0 <= token < self._vocab_size for token in tokens):
            raise ServerError(f"{member.url}: answered {len(tokens)} tokens, the largest {max(tokens)}")
        if any(span.version < oldest for span in spans):
            raise ServerError(f"{member.url}: answered by version {spans[0].version}, {oldest} is the oldest wanted")
        partial.extend(tokens, logprobs, spans)
        if partial.tokens and partial.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        if len(partial.tokens) == sampling.max_response_tokens:
            return "length"
        if kind == "abort" and self._is_aborting.is_set():
            return "abort"
        return None  # another's abort, or the model's own end token, which is none of ours

    async def _unless_lost(self, member: Member, work: Coroutine[Any, Any, T]) -> T:
        """Its result; ServerError at once when the server is lost meanwhile."""
        lost = member.lost
        task, loss = asyncio.ensure_future(work), asyncio.ensure_future(lost.wait())
        try:
            await asyncio.wait({task, loss}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ServerError(member.reason)
        finally:
            task.cancel()
            loss.cancel()

    async def _end(self, rid: str, member: Member) -> None:
        """Nobody waits for it any more; a server that does not hear this is not asked again."""
        if not member.is_missed:
            try:
                await member.server.post("/abort_request", {"rid": rid}, 5.0)
            except ServerError as error:
                logger.debug("%s", error)

    # ------------------------------------------------------------ ending early

    def abort(self) -> None:
        self._is_aborting.set()

    async def _abort_when_asked(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            if self._is_aborting.is_set():
                await asyncio.gather(*(self._end(rid, member) for rid, member in list(self._running.items())))
                await asyncio.sleep(_ABORT_INTERVAL_S)

    # ------------------------------------------------------------ weights

    def update_weights(self, weights: WeightSource, version: int) -> None:
        """Raises EngineError where no server can be brought to this version."""
        self._loop.run(self._fleet.want(label_of(self.attempt, version)))
        for _ in range(_MAX_TRANSFERS):
            is_done, fit = self._transfer(weights, version)
            if is_done:
                self._loop.run(self._admit(fit))
                return
        raise EngineError(f"weights {version} reached no server: {self._fleet.reasons()}")

    def _transfer(self, weights: WeightSource, version: int) -> tuple[bool, list[str]]:
        """(whether that was it, URLs of the servers that have the version), on all ranks."""
        named_tensors = iter(weights())
        is_done, error = False, None
        if self._ranks.is_first:
            try:
                is_done = self._sync.send(named_tensors, version, self._fleet, self._loop.run)
            except Exception as caught:  # the other ranks are still handing over; they must hear of it
                error = caught
        for _ in named_tensors:  # collective: read to its end on every rank, whatever went wrong
            continue

        def outcome() -> tuple[bool, list[str]]:
            if error is not None:
                raise error
            return is_done, [member.url for member in self._fleet.fit]

        return self._ranks.share(outcome)

    async def _admit(self, urls: Sequence[str]) -> None:
        """What the first rank saw."""
        for member in self._fleet.members:
            if member.url in urls and not member.is_fit:
                await self._fleet.admit(member)

    def close(self) -> None:
        self._sync.close()
        self._loop.run(self._close())
        self._loop.close()

    async def _close(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._fleet.close()
