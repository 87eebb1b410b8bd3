"""megatron-core distributed checkpoints: written by all ranks, at once or in the background, loadable under any layout.

megatron-core plans who writes what, and gathers the metadata. The writing itself runs here, in this process or in a
forked one: megatron-core 0.16.1's own path starts a Manager process that outlives a killed trainer, forks twice, and
waits for ever when a writer dies (out of memory, say).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from reval_mcore.control import die_with_parent
from reval_mcore.durable import crc32, raise_if_full

_KEPT_FROM_WRITER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def with_tensors(sharded_state: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, prefix: str) -> dict[str, Any]:
    """A model's sharded state with other tensors of the same shapes in it, under keys that begin with `prefix`."""
    chosen = {name: sharded_state[name] for name in tensors if name in sharded_state}
    for name, entry in chosen.items():
        entry.data = tensors[name]
    add_prefix_for_sharding(chosen, prefix)
    return chosen


def load(directory: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Read `directory` into tensors laid out like `template`; collective."""
    state = dist_checkpointing.load(template, str(directory))
    assert isinstance(state, dict)
    return state


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    results: dict[int, Any]  # by bucket, for megatron-core's metadata
    crc32s: dict[str, int]  # by file name


class PendingSave:
    """A checkpoint on its way to disk. Every rank makes one and calls its methods together with the others."""

    def __init__(self, directory: Path, state: dict[str, Any], *, in_background: bool) -> None:
        """Begin to write `state` into `directory`, which must be empty.

        In the background the state is that of this moment: tensors on a GPU are copied to the host here, those on the
        host are kept by the fork, copy on write. `state` may change as soon as this returns. Raises OSError.
        """
        self._directory = directory
        self._results: queue.SimpleQueue[dict[int, Any]] = queue.SimpleQueue()
        # where megatron-core would otherwise put a Manager process, which finds its results here and nowhere else
        filesystem_async._results_queue = self._results
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        try:
            request = dist_checkpointing.save(state, str(directory), sharded_strategy=strategy, async_sharded_save=True)
        except RuntimeError:  # torch.save, which keeps the errno to itself
            raise_if_full(directory)
            raise
        assert request is not None
        self._finalize_fns = request.finalize_fns
        self._process: ForkProcess | None = None
        self._connection: Connection | None = None
        self._outcome: _Written | Exception = _Written({}, {})
        if request.async_fn is None:  # another rank writes all that this one holds
            return
        assert isinstance(request.async_fn, functools.partial)
        buckets, transforms = request.preload_fn(), request.async_fn.args[0]  # on the host from here on
        if in_background:
            self._start([_unpinned(bucket) for bucket in buckets], transforms)
        else:
            self._outcome = _write(buckets, transforms)

    def _start(self, buckets: Sequence[Any], transforms: list[Any]) -> None:
        context = multiprocessing.get_context("fork")  # any other start would have to send the tensors
        self._connection, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve, args=(theirs, os.getpid(), buckets, transforms), name="checkpoint-writer", daemon=True
        )
        # held back until the writer has said that it ignores them
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_FROM_WRITER)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._process = process
        theirs.close()

    def is_done(self) -> bool:
        """Whether every rank has written its part, well or not: `finish` will not wait. Collective."""
        is_written = self._process is None or self._connection is None or self._connection.poll()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        everywhere = torch.tensor(int(is_written), device=device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        return bool(everywhere.item())

    def finish(self) -> dict[str, int]:
        """Wait, and complete the checkpoint: CRC32 of the files of all ranks, by name. Collective.

        Raises the error of the first rank that has one, on all ranks: OSError where the disk is at fault.
        """
        outcome = self._receive() if self._process is not None else self._outcome
        error = outcome if isinstance(outcome, Exception) else None
        crc32s = outcome.crc32s if isinstance(outcome, _Written) else {}
        shared: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shared, (error, crc32s))
        for rank_error, _ in shared:
            if rank_error is not None:
                raise rank_error
        assert isinstance(outcome, _Written)
        self._results.put(outcome.results)
        for finalize in self._finalize_fns:
            finalize()
        return {name: value for _, of_rank in shared for name, value in of_rank.items()}

    def abandon(self) -> None:
        """Stop writing; what is there is of no use. Not collective."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _receive(self) -> _Written | Exception:
        assert self._process is not None
        assert self._connection is not None
        try:
            outcome = self._connection.recv()
        except EOFError:
            self._process.join()
            return RuntimeError(
                f"{self._directory}: the process that wrote it died (exit status {self._process.exitcode}); if the "
                f"kernel ended it for memory, set checkpoint.async_save = false"
            )
        self._process.join()
        return outcome


def _unpinned(bucket: Any) -> Any:
    """The bucket without pinned memory, which a forked process cannot read."""
    path, name, (data, tensors) = bucket
    return path, name, (data, [(item, each.clone() if each.is_pinned() else each) for item, each in tensors])


def _write(buckets: Sequence[Any], transforms: list[Any]) -> _Written | Exception:
    """Write the files of this rank, fsynced."""
    results, crc32s = {}, {}
    for index, bucket in enumerate(buckets):
        path, name, _ = bucket
        said: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        tickets: queue.Queue[int] = queue.Queue()
        tickets.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, said, tickets, use_fsync=True)  # pyright: ignore[reportArgumentType]
        _, outcome = said.get()
        try:
            if isinstance(outcome, RuntimeError):  # torch's writer has lost the errno
                raise_if_full(Path(path).parent)
            if isinstance(outcome, Exception):
                return outcome
            crc32s[name] = crc32(Path(path))
        except OSError as error:
            return error
        results[index] = outcome
    return _Written(results, crc32s)


def _serve(connection: Connection, parent: int, buckets: Sequence[Any], transforms: list[Any]) -> None:
    """The life of a background writer."""
    # batch systems signal all processes of a job at once; the trainer wants this checkpoint all the more then
    for number in _KEPT_FROM_WRITER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEPT_FROM_WRITER)
    die_with_parent()  # a killed trainer leaves no writer behind
    if os.getppid() != parent:  # it died before that
        return
    outcome = _write(buckets, transforms)
    if isinstance(outcome, Exception) and not isinstance(outcome, OSError):  # others may not survive the pipe
        outcome = RuntimeError(f"{type(outcome).__name__}: {outcome}")
    connection.send(outcome)
    connection.close()
