"""The processes of a run, for those who hand values around between them: one decides, or each does its part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_TURN_S = 60.0  # well below the deadline of a collective


@dataclass(frozen=True)
class Ranks:
    """Every method but `part` is collective: all ranks call it, in the same order. Values travel pickled."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, on all of them; an exception of it likewise."""
        if self.size == 1:
            return make()
        value: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                value = make()
            except Exception as caught:  # the others are waiting: they must end too, and by the same reason
                error = caught
        box = [(value, error)]
        dist.broadcast_object_list(box, src=0)
        value, shared_error = box[0]
        if error is not None:
            raise error
        if shared_error is not None:
            raise shared_error
        return value

    def wait(self, look: Callable[[], tuple[T] | None], pause: Callable[[], None]) -> T:
        """What `look` finds on the first rank, in a tuple, once it finds something; `pause` is between its looks.

        However long that takes: the others hear now and then that it goes on, as a collective has a deadline.
        """

        def turn() -> tuple[T] | None:
            deadline = time.monotonic() + _TURN_S
            while (found := look()) is None and time.monotonic() < deadline:
                pause()
            return found

        while (found := self.share(turn)) is None:
            continue
        return found[0]

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in their order, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share: the parts of all ranks, end to end, are the whole. May be empty."""
        first, end = (len(items) * number // self.size for number in (self.rank, self.rank + 1))
        return items[first:end]
