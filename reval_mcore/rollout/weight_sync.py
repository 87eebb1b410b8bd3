"""How a version of the weights gets to the servers: over files that they load, or over a process group (see
weight_broadcast.py).

Each way ends alike: the checksums that the servers tell of what they hold must agree, and only then a server is fit.
It is called by the label of the version once all of it is in: after the load of whole files, or after the last bucket.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reval_mcore.rollout.sglang_fleet import Fleet, Member
from reval_mcore.rollout.sglang_server import UPDATING, NoWeightsError, ServerError, SGLangServer
from reval_mcore.rollout.weight_directory import publish_weights, sweep_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]
Run = Callable[[Coroutine[Any, Any, Any]], Any]  # on the engine's event loop, to the end


def label_of(attempt: str, version: int) -> str:
    """What a server is to call this version of this attempt at a run."""
    return f"v{version:06d}-{attempt}"


def version_of(attempt: str, label: str) -> int | None:
    """The version of a label; None where it is not one of this attempt."""
    number, _, rest = label.removeprefix("v").partition("-")
    return int(number) if rest == attempt and number.isdecimal() else None


class WeightSync(Protocol):
    """Used by the first rank alone."""

    can_restore: bool  # a server can get the version at any time, without anybody handing in the weights again

    def send(self, named_tensors: NamedTensors, version: int, fleet: Fleet, run: Run) -> bool:
        """Bring the weights to the servers as `fleet.label`; admit those that have it. False: once more, please.

        Reads no further than it needs. What goes wrong with a server is that server's loss and no exception.
        """
        ...

    async def restore(self, server: SGLangServer, label: str) -> None:
        """Where `can_restore`: bring the last version to one server. Raises ServerError."""
        ...

    def close(self) -> None: ...


class Checksums:
    """What servers hold of one version: they must agree. Those of other parallel layouts are compared by themselves."""

    def __init__(self) -> None:
        self._label = ""
        self._agreed: dict[int, frozenset[tuple[str, str]]] = {}  # by number of ranks

    async def disagreeing(self, servers: Sequence[SGLangServer], label: str, timeout_s: float) -> set[str]:
        """URLs of servers that hold something else than most do, or than was agreed on before for this label.

        Raises ServerError where a server does not tell.
        """
        if label != self._label:
            self._label, self._agreed = label, {}
        held = [frozenset(found.items()) for found in await asyncio.gather(*(s.checksums(timeout_s) for s in servers))]
        wrong: set[str] = set()
        layouts = [_num_ranks(found) for found in held]
        for layout in set(layouts):
            found = {s.url: h for s, h, own in zip(servers, held, layouts, strict=True) if own == layout}
            if layout not in self._agreed:
                likeliest, count = Counter(found.values()).most_common(1)[0]
                if count * 2 <= len(found):
                    wrong |= set(found)
                    continue
                self._agreed[layout] = likeliest
            wrong |= {url for url, content in found.items() if content != self._agreed[layout]}
        return wrong


def _num_ranks(checksums: frozenset[tuple[str, str]]) -> int:
    return len({name.split("/")[1] for name, _ in checksums})


async def admit_agreeing(
    fleet: Fleet, members: Sequence[Member], checksums: Checksums, timeout_s: float, *, is_named: bool
) -> None:
    """Those that hold the same are fit, and called by `fleet.label` if that is not so yet; the others are lost, and
    what they hold loses its name."""
    try:
        wrong = await checksums.disagreeing([member.server for member in members], fleet.label, timeout_s)
    except ServerError as error:
        for member in members:
            await fleet.lose(member, error)
        return

    async def judge(member: Member) -> None:
        try:
            if member.url in wrong:
                await member.server.rename_weights(UPDATING, timeout_s)
                raise ServerError(f"{member.url}: holds other weights than the other servers after the same update")
            if not is_named:
                await member.server.rename_weights(fleet.label, timeout_s)
        except ServerError as error:
            await fleet.lose(member, error)
        else:
            await fleet.admit(member)

    await asyncio.gather(*(judge(member) for member in members))


class FollowedWeights:
    """Of a process that only generates: another brings the weights."""

    can_restore = False

    def send(self, named_tensors: NamedTensors, version: int, fleet: Fleet, run: Run) -> bool:
        raise AssertionError("a process that only generates has no weights to send")

    async def restore(self, server: SGLangServer, label: str) -> None:
        raise NoWeightsError(f"{server.url}: waits for weights of this run")

    def close(self) -> None: ...


class DiskSync:
    """Directories RUN/weights/v000012/ that servers load; for a filesystem that they share with the trainer.

    One is kept while it is the newest, or a server may still load it: a call that nobody waits for any more is carried
    out all the same.
    """

    can_restore = True

    def __init__(self, directory: Path, *, companions: Path, timeout_s: float, control_timeout_s: float = 30.0) -> None:
        self._directory = directory
        self._companions = companions
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s
        self._checksums = Checksums()
        self._newest: Path | None = None  # whole; None while there is none
        self._may_load: dict[str, set[Path]] = {}  # by server

    def send(self, named_tensors: NamedTensors, version: int, fleet: Fleet, run: Run) -> bool:
        start = time.monotonic()
        num_bytes = publish_weights(self._directory / fleet.label, named_tensors, companions=self._companions)
        self._newest = self._directory / fleet.label
        written = time.monotonic()
        run(self._load_everywhere(fleet))
        seconds = time.monotonic() - start
        logger.info(
            "weights %s: %d bytes in %.2f s (%.3g bytes/s), of which %.2f s for the files; %d of %d servers have them",
            *(
                fleet.label,
                num_bytes,
                seconds,
                num_bytes / seconds,
                written - start,
                len(fleet.fit),
                len(fleet.members),
            ),
        )
        self._sweep({member.url for member in fleet.members})
        return True

    async def _load_everywhere(self, fleet: Fleet) -> None:
        async with fleet.updating:
            asked = fleet.reachable
            loaded = await asyncio.gather(*(self._load_or_lose(fleet, member) for member in asked))
            members = [member for member, is_loaded in zip(asked, loaded, strict=True) if is_loaded]
            await admit_agreeing(fleet, members, self._checksums, self._timeout_s, is_named=True)

    async def _load_or_lose(self, fleet: Fleet, member: Member) -> bool:
        try:
            await self._load(member.server, fleet.label)
        except ServerError as error:
            await fleet.lose(member, error)
            return False
        return True

    async def _load(self, server: SGLangServer, label: str) -> None:
        directory = self._newest
        if directory is None or directory.name != label:
            raise NoWeightsError(f"{server.url}: waits until {label} is written")
        await server.served_weights(self._control_timeout_s)  # one that hangs is found out before the long wait
        loading = self._may_load.setdefault(server.url, set())
        loading.add(directory)
        try:
            await server.load_weights(str(directory.resolve()), label, self._timeout_s)
        except ServerError as error:
            if error.status is not None or not error.was_sent:  # done with this, and with what was asked before
                loading.clear()
            raise
        loading.clear()

    async def restore(self, server: SGLangServer, label: str) -> None:
        await self._load(server, label)
        if await self._checksums.disagreeing([server], label, self._timeout_s):
            await server.rename_weights(UPDATING, self._timeout_s)
            raise ServerError(f"{server.url}: holds other weights than the other servers after loading the same files")

    def _sweep(self, urls: Collection[str]) -> None:
        """Of what a server was asked that has left, nothing is kept."""
        assert self._newest is not None
        self._may_load = {url: loading for url, loading in self._may_load.items() if url in urls}
        sweep_weights(self._directory, keep={self._newest, *itertools.chain(*self._may_load.values())})

    def close(self) -> None:
        """Servers may be serving what lies there; it stays."""
