"""Reading ahead and finishing behind: the same as one after the other, errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from reval_mcore.conversion.pipeline import ahead, behind


def test_items_come_in_order_and_no_more_are_made_than_said() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with ahead(items(), 3) as ready:
        for number in range(20):
            assert next(ready) == number
            assert len(made) <= number + 1 + 3
        assert list(ready) == []
    assert made == list(range(20))


def test_what_making_one_raises_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("the third")

    with ahead(items(), 3) as ready:
        assert [next(ready), next(ready)] == [0, 1]
        with pytest.raises(ValueError, match="the third"):
            next(ready)


def test_leaving_early_leaves_no_thread() -> None:
    before = threading.active_count()
    with ahead(range(100), 2) as ready:
        next(ready)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_jobs_are_done_in_order_and_all_before_leaving() -> None:
    done: list[int] = []
    with behind() as do_behind:
        for number in range(10):
            do_behind(lambda number=number: done.append(number))
    assert done == list(range(10))


def test_no_job_is_done_after_one_that_failed() -> None:
    done: list[str] = []

    def fails() -> None:
        raise OSError("no room")

    def all_jobs(*jobs: Callable[[], None]) -> None:
        with behind() as do_behind:
            for job in jobs:
                do_behind(job)

    for jobs in ((fails, lambda: done.append("next")), (fails,)):
        with pytest.raises(OSError, match="no room"):
            all_jobs(*jobs)
    assert done == []
