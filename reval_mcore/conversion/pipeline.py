"""What comes next is read, and what came before reaches the disk, while something is written: a thread for each."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def ahead(items: Iterable[T], num_items: int) -> Iterator[Iterator[T]]:
    """The same items in the same order, made in a thread, up to `num_items` before they are asked for.

    What making one raises is raised where it is asked for. On leaving, the thread is gone.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = collections.deque(thread.submit(next, source, end) for _ in range(num_items))

        def in_order() -> Iterator[T]:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, source, end))
                yield item  # pyright: ignore[reportReturnType]

        try:
            yield in_order()
        finally:
            thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Call what it gives with jobs: each is done in a thread, in order, while the caller goes on with one more.

    What a job raises is raised at the next, or on leaving; none is done after one that failed.
    """
    last: Future[None] | None = None

    def submit(job: Callable[[], None]) -> None:
        nonlocal last
        if last is not None:
            last.result()
        last = thread.submit(job)

    with ThreadPoolExecutor(1) as thread:
        yield submit
        if last is not None:
            last.result()
