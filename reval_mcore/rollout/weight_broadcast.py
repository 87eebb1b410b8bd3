"""Weights over a process group of the trainer's first rank and all ranks of the servers: no files.

A broadcast waits for all who take part, and HTTP says who does not: so every request is looked at before and during the
collective, the collective runs in a thread of its own, and both have a deadline. After a failure the group is given up,
never mended; a server is called by the version's label only after the last bucket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from reval_mcore.rollout.sglang_fleet import Fleet, Member
from reval_mcore.rollout.sglang_server import UPDATING, NoWeightsError, ServerError, SGLangServer
from reval_mcore.rollout.weight_sync import Checksums, NamedTensors, Run, admit_agreeing

logger = logging.getLogger(__name__)

_REFUSAL_S = 0.1  # a refused request is answered at once


@dataclass(frozen=True)
class Bucket:
    """Tensors end to end, as bytes."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, dtype, shape)
    flat: torch.Tensor  # uint8 [bytes]


def buckets(named_tensors: NamedTensors, max_bytes: int) -> Iterator[Bucket]:
    """Full buckets of at most `max_bytes` (a larger tensor is one by itself). In each the widest dtypes come first:
    SGLang views a tensor in place, so its offset must be a multiple of its item size."""
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if pending and size + tensor.nbytes > max_bytes:
            yield _bucket(pending)
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
    if pending:
        yield _bucket(pending)


def _bucket(named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    ordered = sorted(named_tensors, key=lambda item: -item[1].element_size())
    return Bucket(
        tensors=tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in ordered),
        flat=torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in ordered]),
    )


class Group:
    """Rank 0 of a process group whose other ranks are those of some servers. For one member to fail is its end."""

    def __init__(self, members: Sequence[Member], backend: str, timeout_s: float) -> None:
        self.urls = frozenset(member.url for member in members)
        self.name = f"reval-{uuid.uuid4().hex[:8]}"
        self.backend = backend
        self._timeout = timedelta(seconds=timeout_s)
        self._offsets = [1]
        for member in members:
            assert member.info is not None
            self._offsets.append(self._offsets[-1] + member.info.num_ranks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._group: dist.ProcessGroup | None = None

    async def join(self, servers: Sequence[SGLangServer], timeout_s: float) -> None:
        """Raises ServerError or RuntimeError where not all have joined in time."""
        size = self._offsets[-1]
        address = _address_towards(servers[0].url)
        store = dist.TCPStore(address, 0, size, is_master=True, timeout=self._timeout, wait_for_workers=False)
        joined = self._in_thread(self._join, store, size)
        requests = [
            server.join_group(self.name, (address, store.port), offset, size, self.backend, timeout_s)
            for server, offset in zip(servers, self._offsets, strict=False)
        ]
        await _all_or_first_error(joined, [asyncio.ensure_future(request) for request in requests])

    def _join(self, store: dist.TCPStore, size: int) -> None:
        # SGLang's side makes its group by the same function, with the same prefix: the names in the store must agree
        prefixed = dist.PrefixStore(self.name, store)
        backend = dist.Backend(self.backend)
        name: Any = self.name  # of a type of its own in some versions of torch
        group, _ = c10d._new_process_group_helper(
            size, 0, [], backend, prefixed, group_name=name, timeout=self._timeout
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        self._group = group

    async def send(self, bucket: Bucket, servers: Sequence[SGLangServer], timeout_s: float) -> None:
        """Raises ServerError or RuntimeError where not all have taken it in time."""
        requests = [
            asyncio.ensure_future(server.receive_weights(self.name, bucket.tensors, timeout_s)) for server in servers
        ]
        await asyncio.wait(requests, timeout=_REFUSAL_S, return_when=asyncio.FIRST_COMPLETED)
        refused = next((request for request in requests if request.done()), None)
        if refused is not None:
            await _cancel(requests)
            refused.result()
        await _all_or_first_error(self._in_thread(self._broadcast, bucket.flat), requests)

    def _broadcast(self, flat: torch.Tensor) -> None:
        assert self._group is not None
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)
        dist.broadcast(flat, src=0, group=self._group)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def _in_thread(self, work: Any, *arguments: Any) -> asyncio.Future[None]:
        return asyncio.wrap_future(self._thread.submit(work, *arguments))

    def abandon(self) -> None:
        """Close the connections, so that a server that waits in a collective hears of it and serves again.

        A thread of ours that is still in one ends with it, or by its deadline; nobody waits for it.
        """
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = None


async def _all_or_first_error(own: asyncio.Future[None], requests: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all; raise the first error without waiting for the others."""
    try:
        await asyncio.gather(own, *requests)
    finally:
        await _cancel(requests)


async def _cancel(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


async def _release(lock: asyncio.Lock) -> None:
    lock.release()


def _address_towards(url: str) -> str:
    """This machine's address as the server's network knows it."""
    parts = urlsplit(url)
    family, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect(target)
        return probe.getsockname()[0]


class BroadcastSync:
    """`max_bucket_bytes` are held twice for a moment. `backend`: "nccl" between GPUs, "gloo" between CPUs."""

    can_restore = False  # the weights are not kept: a server that missed a version waits for the next one

    def __init__(
        self, *, backend: str, timeout_s: float, control_timeout_s: float = 30.0, max_bucket_bytes: int = 512 << 20
    ) -> None:
        self._backend = backend
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s
        self._max_bucket_bytes = max_bucket_bytes
        self._checksums = Checksums()
        self._group: Group | None = None

    def send(self, named_tensors: NamedTensors, version: int, fleet: Fleet, run: Run) -> bool:
        """False where a server failed while the others waited for it: the next try is without it."""
        start = time.monotonic()
        run(fleet.updating.acquire())
        try:
            num_bytes = self._send_all(named_tensors, fleet, run)
        finally:
            run(_release(fleet.updating))
        seconds = time.monotonic() - start
        if not fleet.fit:
            return False
        logger.info(
            "weights %s: %d bytes in %.2f s (%.3g bytes/s) by %s; %d of %d servers have them",
            *(fleet.label, num_bytes, seconds, num_bytes / seconds, self._backend, len(fleet.fit), len(fleet.members)),
        )
        return True

    def _send_all(self, named_tensors: NamedTensors, fleet: Fleet, run: Run) -> int:
        """Bytes sent to each."""
        members: list[Member] = run(self._open(fleet))
        num_bytes = 0
        for bucket in buckets(named_tensors, self._max_bucket_bytes) if members else ():
            num_bytes += bucket.flat.nbytes
            if not run(self._send(fleet, members, bucket)):
                return num_bytes
        run(self._finish(fleet, members))
        return num_bytes

    async def restore(self, server: SGLangServer, label: str) -> None:
        raise NoWeightsError(f"{server.url}: waits for the next version of the weights")

    async def _open(self, fleet: Fleet) -> list[Member]:
        """The servers that take part, in a group with them; none where there is no such group."""
        asked = fleet.reachable
        prepared = await asyncio.gather(*(self._prepare(fleet, member) for member in asked))
        members = [member for member, is_prepared in zip(asked, prepared, strict=True) if is_prepared]
        if self._group is not None and self._group.urls != {member.url for member in members}:
            self._give_up_group()
        if self._group is None and members:
            self._group = Group(members, self._backend, self._timeout_s)
            try:
                await self._group.join([member.server for member in members], self._timeout_s)
            except (ServerError, RuntimeError) as error:  # torch's own errors are RuntimeErrors
                await self._fail(fleet, members, error)
                return []
        return members

    async def _prepare(self, fleet: Fleet, member: Member) -> bool:
        """From here on what it serves is of no version."""
        try:
            if member.info is None:
                member.info = await member.server.probe(self._control_timeout_s)
            if member.info.needs_begin_and_end:
                await self._begin(member.server)  # after this, requests under way have ended under their own version
            await member.server.rename_weights(UPDATING, self._control_timeout_s)
        except ServerError as error:
            await fleet.lose(member, error)
            return False
        return True

    async def _begin(self, server: SGLangServer) -> None:
        try:
            await server.post("/begin_weight_update", {}, self._control_timeout_s)
        except ServerError as error:
            if error.status != 400:
                raise
            # one that failed is still open
            await server.post("/end_weight_update", {}, self._control_timeout_s)
            await server.post("/begin_weight_update", {}, self._control_timeout_s)

    async def _send(self, fleet: Fleet, members: Sequence[Member], bucket: Bucket) -> bool:
        assert self._group is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._group.send(bucket, [member.server for member in members], self._timeout_s)
        except (ServerError, RuntimeError, TimeoutError) as error:
            await self._fail(fleet, members, error)
            return False
        return True

    async def _finish(self, fleet: Fleet, members: Sequence[Member]) -> None:
        try:
            open_ones = [member for member in members if member.info is not None and member.info.needs_begin_and_end]
            await asyncio.gather(*(m.server.post("/end_weight_update", {}, self._timeout_s) for m in open_ones))
            await admit_agreeing(fleet, members, self._checksums, self._timeout_s, is_named=False)
        except ServerError as error:
            await self._fail(fleet, members, error)

    async def _fail(self, fleet: Fleet, members: Sequence[Member], error: Exception) -> None:
        logger.warning("weights %s: given up half-way: %s", fleet.label, error or "no end in time")
        self._give_up_group()
        for member in members:
            await fleet.lose(member, NoWeightsError(f"{member.url}: has half of {fleet.label}"))

    def _give_up_group(self) -> None:
        if self._group is not None:
            self._group.abandon()
        self._group = None

    def close(self) -> None:
        self._give_up_group()
