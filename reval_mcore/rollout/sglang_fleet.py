"""The SGLang servers of a run: which of them may be asked, and how one that failed comes back.

A server is fit while it serves the weights that are wanted, whole. Its own word for them, the label, is the proof: a
label is unique to one version of one attempt at a run, and a server gets it last, when all of a version is in. So one
that was restarted, that missed an update or has half of one cannot be taken for one that is up to date.

Which servers there are is asked again and again: some join and some leave while a run goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from reval_mcore.rollout.engine import EngineError
from reval_mcore.rollout.sglang_server import (
    UPDATING,
    NoAnswerError,
    NoWeightsError,
    ServerError,
    ServerInfo,
    SGLangServer,
)

logger = logging.getLogger(__name__)

NONE_ANNOUNCED = "none is announced in control/servers/ of the run directory"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LOOK_AROUND_S = 2.0
FindServers = Callable[[], Collection[str]]  # the URLs of the servers that there are now; may raise OSError


def backoff_s(num_failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(_FIRST_WAIT_S * 2.0 ** min(num_failures - 1, 10), _LONGEST_WAIT_S)


@dataclass
class Member:
    """A server and what is known of it."""

    server: SGLangServer
    info: ServerInfo | None = None
    is_fit: bool = False
    is_missed: bool = False  # the log has why it was lost, and is to have when it is back
    is_silent: bool = False  # did not answer when it was asked last
    was_heard: bool = False  # has ever answered
    reason: str = "has no weights yet"  # why it is not fit
    num_running: int = 0  # requests of this engine
    num_failures: int = 0  # in a row
    retry_at: float = 0.0  # by time.monotonic
    lost: asyncio.Event = field(default_factory=asyncio.Event)  # set: whoever waits for an answer need not
    is_tempered: bool | None = None  # its log-probabilities; None: not asked yet
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)  # for that
    care: asyncio.Task[None] | None = None  # the last look after it

    @property
    def url(self) -> str:
        return self.server.url


class Fleet:
    """For one event loop. `restore(server, label)` brings weights to a server that lacks them, if that can be done."""

    def __init__(
        self,
        find: FindServers,
        connect: Callable[[str], SGLangServer],
        *,
        max_concurrent_requests: int,
        timeout_s: float,
        patience_s: float,
        restore: Callable[[SGLangServer, str], Awaitable[None]] | None,
        follows: Callable[[str], bool] | None = None,
    ) -> None:
        """`follows`: labels of weights that another process brings; any of them will do."""
        self.members: list[Member] = []  # changes only where `updating` is not held by others
        self.label = ""  # of the wanted weights
        self.follows = follows
        self.updating = asyncio.Lock()  # held while weights are on their way
        self._find = find
        self._connect = connect
        self._left: list[Member] = []  # whose last requests are still to end
        self._max_concurrent_requests = max_concurrent_requests
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._restore = restore
        self._changed = asyncio.Condition()

    @property
    def fit(self) -> list[Member]:
        return [member for member in self.members if member.is_fit]

    @property
    def reachable(self) -> list[Member]:
        """Those that new weights are offered to: one that does not answer would hold up all others. It is looked after,
        and gets them when it is back."""
        return [member for member in self.members if not member.is_silent] or list(self.members)

    # ------------------------------------------------------------ membership

    async def look_around(self) -> None:
        """Take in the servers that there are now, let go of those that are no more. Not while weights are on their way.

        Where that cannot be told, things stay as they are.
        """
        try:
            found = {url.rstrip("/") for url in await asyncio.to_thread(self._find)}
        except OSError as error:
            logger.debug("which servers there are: %s", error)
            return
        if self.updating.locked():
            return
        async with self.updating:
            for member in [member for member in self.members if member.url not in found]:
                await self._let_go(member)
            for url in sorted(found - {member.url for member in self.members}):
                logger.info("server joins: %s", url)
                self.members.append(Member(self._connect(url)))
            idle = [member for member in self._left if member.num_running == 0]
            self._left = [member for member in self._left if member.num_running > 0]
            for member in idle:
                await member.server.close()

    async def _let_go(self, member: Member) -> None:
        """Its requests go to others."""
        logger.info("server leaves: %s", member.url)
        if member.care is not None:
            member.care.cancel()
        self.members.remove(member)
        self._left.append(member)
        member.is_fit, member.reason = False, f"{member.url}: has left"
        member.lost.set()
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        for member in (*self.members, *self._left):
            await member.server.close()

    # ------------------------------------------------------------ asking

    async def acquire(self, avoid: set[str]) -> Member:
        """A fit server with room, the least busy one; one of `avoid` only where there is no other.

        Raises EngineError where none has become fit for `patience_s`.
        """
        last_fit = time.monotonic()
        async with self._changed:
            while True:
                if self.fit:
                    last_fit = time.monotonic()
                free = [member for member in self.fit if member.num_running < self._max_concurrent_requests]
                if free:
                    chosen = min(free, key=lambda member: (member.url in avoid, member.num_running))
                    chosen.num_running += 1
                    return chosen
                waited = time.monotonic() - last_fit
                if waited > self._patience_s:
                    raise EngineError(f"no server for {waited:.0f} s: {self.reasons()}")
                # not wait_for, which waits in a task of its own: cancelled, that one could keep the lock for good
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()

    async def release(self, member: Member) -> None:
        async with self._changed:
            member.num_running -= 1
            self._changed.notify_all()

    def reasons(self) -> str:
        return "; ".join(member.reason for member in self.members if not member.is_fit) or NONE_ANNOUNCED

    # ------------------------------------------------------------ fitness

    async def lose(self, member: Member, error: ServerError) -> None:
        """It failed: ask it no more until it has shown itself again. One line in the log, the first time; none where it
        only waits for weights."""
        if isinstance(error, NoWeightsError):
            member.retry_at = time.monotonic() + _FIRST_WAIT_S
        else:
            member.num_failures += 1
            member.retry_at = time.monotonic() + backoff_s(member.num_failures)
            if not member.is_missed:
                logger.warning("server %s: %s", "lost" if member.was_heard else "not there yet", error)
            member.is_missed, member.is_silent = True, isinstance(error, NoAnswerError)
        member.is_fit, member.is_tempered, member.reason = False, None, str(error)  # it may be started anew
        member.lost.set()
        async with self._changed:
            self._changed.notify_all()

    async def doubt(self, member: Member, error: ServerError) -> None:
        """A connection broke, or an update was going on: lose it, unless it answers and serves what is wanted."""
        try:
            is_there = self._is_wanted(await member.server.served_weights(self._timeout_s))
        except ServerError:
            is_there = False
        if not is_there and member.is_fit:  # many requests have this doubt at a time, and it is one failure
            await self.lose(member, error)

    def hear(self, member: Member) -> None:
        """It answered."""
        member.is_silent, member.was_heard = False, True

    async def admit(self, member: Member) -> None:
        """It serves the wanted weights."""
        if member.is_missed:
            logger.warning("server back: %s serves %s", member.url, self.label)
        self.hear(member)
        member.is_fit, member.is_missed, member.reason, member.num_failures = True, False, "", 0
        member.lost = asyncio.Event()
        async with self._changed:
            self._changed.notify_all()

    async def want(self, label: str) -> None:
        """Other weights are wanted: nobody is fit until it has them."""
        self.label = label
        for member in self.members:
            member.is_fit = False
            if not member.is_silent:
                member.reason = f"{member.url}: has not got {label} yet"

    async def follow(self, follows: Callable[[str], bool], label: str, *, is_new: bool) -> None:
        """Weights that another process brings are wanted, any that `follows` holds for; `label` says which, to people.

        Where they are of another run than before nobody is fit; else those that are get a look soon.
        """
        self.follows = follows
        if is_new:
            await self.want(label)
        self.label = label
        for member in self.members:
            member.retry_at = 0.0

    def _is_wanted(self, label: str) -> bool:
        return self.follows(label) if self.follows is not None else label == self.label

    async def watch(self) -> None:
        """Look after the servers until cancelled: notice those that hang, bring in those that are new or were lost."""
        look_around_at = 0.0
        async with asyncio.TaskGroup() as group:  # one that hangs holds up nobody else's
            while True:
                await asyncio.sleep(_FIRST_WAIT_S)
                now = time.monotonic()
                if now >= look_around_at:
                    look_around_at = now + _LOOK_AROUND_S
                    await self.look_around()
                for member in self.members:
                    if now >= member.retry_at and (member.care is None or member.care.done()):
                        member.care = group.create_task(self._look_after(member))

    async def _look_after(self, member: Member) -> None:
        try:
            if member.is_fit:
                member.retry_at = time.monotonic() + self._timeout_s / 4
                served = await member.server.served_weights(self._timeout_s)
                if member.is_fit and not self.updating.locked() and not self._is_wanted(served):
                    if served == UPDATING:
                        raise NoWeightsError(f"{member.url}: is being updated")
                    raise ServerError(
                        f"{member.url}: serves {served!r}, not {self.label}: it was restarted, or missed it"
                    )
            elif (self.label or self.follows) and not self.updating.locked():
                await member.server.served_weights(self._timeout_s)  # before the lock: weights may be on their way
                self.hear(member)
                async with self.updating:
                    await self._bring_back(member)
        except ServerError as error:
            await self.lose(member, error)

    async def _bring_back(self, member: Member) -> None:
        if member.is_fit:
            return
        if not self._is_wanted(await member.server.served_weights(self._timeout_s)):
            if self._restore is None:
                raise NoWeightsError(f"{member.url}: waits for the next version of the weights")
            await self._restore(member.server, self.label)
        await member.server.check_replies(self._timeout_s)
        await self.admit(member)
