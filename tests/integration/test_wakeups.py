"""Wake-ups come at once; without them, and whatever befalls their store, a wait is no longer than between two polls."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reval_mcore.control import TO_COLLECTORS, News, WakeUps, open_wakeups, serve_wakeups

LONG_S = 20.0  # no wait of these tests may be as long
FILE = "wakeups.json"


def never() -> bool:
    return False


def hear_and_answer(control: Path) -> None:
    """A trainer in a process of its own, that wakes collectors whenever it was woken."""
    with serve_wakeups(control, never) as trainer:
        while True:
            trainer.wait([News.SHARDS])
            trainer.signal(News.COLLECTION)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120.0
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def wait(end: WakeUps, *names: News) -> float:
    """Seconds that it took."""
    start = time.monotonic()
    end.wait(names, long_poll_s=LONG_S)
    return time.monotonic() - start


def connect(trainer: WakeUps, collector: WakeUps) -> None:
    """Until each hears the other."""

    def hears(end: WakeUps, name: News, other: WakeUps) -> bool:
        other.signal(name)
        end.wait([name], poll_s=0.05, long_poll_s=1.0)
        return end._line is not None and end._line.num_listeners > 1 and end._line.seen.get(name, 0) > 0

    wait_until(lambda: hears(trainer, News.SHARDS, collector))
    wait_until(lambda: hears(collector, News.COLLECTION, trainer))


@contextmanager
def both(control: Path) -> Iterator[tuple[WakeUps, WakeUps]]:
    with serve_wakeups(control, never) as trainer, open_wakeups(control, never) as collector:
        connect(trainer, collector)
        for end, name in ((trainer, News.SHARDS), (collector, News.COLLECTION)):  # what is still under way
            end.wait([name], long_poll_s=0.3)
            end.wait([name], long_poll_s=0.3)
        yield trainer, collector


@contextmanager
def after(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, do)
    timer.start()
    yield
    timer.join()


def test_a_wait_ends_with_a_signal_of_its_name_and_with_no_other(tmp_path: Path) -> None:
    with both(tmp_path) as (trainer, collector):
        for end, other, name in ((collector, trainer, News.COLLECTION), (trainer, collector, News.SHARDS)):
            with after(0.3, lambda: other.signal(News.EVALUATION)), after(0.6, lambda: other.signal(name)):  # noqa: B023
                waited_s = wait(end, name)
            assert 0.55 < waited_s < LONG_S / 2


def test_a_signal_between_two_looks_is_not_lost(tmp_path: Path) -> None:
    with both(tmp_path) as (trainer, collector):
        trainer.signal(News.COLLECTION)
        time.sleep(0.2)
        assert wait(collector, *TO_COLLECTORS) < LONG_S / 2
        start = time.monotonic()
        collector.wait(TO_COLLECTORS, long_poll_s=0.5)  # it was looked at
        assert time.monotonic() - start >= 0.5


def test_a_wait_ends_when_the_run_is_asked_to_stop(tmp_path: Path) -> None:
    stop = threading.Event()
    with serve_wakeups(tmp_path, never) as trainer, open_wakeups(tmp_path, stop.is_set) as collector:
        connect(trainer, collector)
        with after(0.3, stop.set):
            assert wait(collector, News.COLLECTION) < LONG_S / 2


def test_with_no_store_it_is_polling(tmp_path: Path) -> None:
    with open_wakeups(tmp_path, never) as collector:
        collector.signal(News.SHARDS)
        assert wait(collector, News.COLLECTION) < LONG_S / 2


def test_a_trainer_that_nobody_comes_to_polls(tmp_path: Path) -> None:
    with serve_wakeups(tmp_path, never) as trainer:
        assert wait(trainer, News.SHARDS) < LONG_S / 2
        wait_until(lambda: trainer._line is not None and trainer._line.is_open)
        assert wait(trainer, News.SHARDS) < LONG_S / 2


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"host": "127.0.0.1", "port": 9, "of": "x"}'])
def test_where_the_store_is_not_found_it_is_polling_and_that_is_said_once(
    tmp_path: Path, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reval_mcore")
    (tmp_path / FILE).write_text(said)
    with open_wakeups(tmp_path, never) as collector:
        for _ in range(4):
            collector.signal(News.SHARDS)
            assert wait(collector, News.COLLECTION) < LONG_S / 2
    assert [record.getMessage()[:14] for record in caplog.records] == [
        "no wake-ups, f" if len(said) < 9 else "no wake-ups ov"
    ]


def test_a_port_that_accepts_and_is_mute_delays_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        (tmp_path / FILE).write_text(json.dumps({"host": "127.0.0.1", "port": port, "of": "x"}))
        start = time.monotonic()
        with open_wakeups(tmp_path, never) as collector:
            for _ in range(3):
                collector.signal(News.SHARDS)
                assert wait(collector, News.COLLECTION) < LONG_S / 2
        assert time.monotonic() - start < LONG_S / 2
        mute.close()  # ends the thread that is still in there


def test_a_trainer_that_hangs_or_dies_delays_nobody_and_the_next_one_is_found(tmp_path: Path) -> None:
    """It hangs while the collector waits, then the kernel closes its connections."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=hear_and_answer, args=(tmp_path,), daemon=True)
    process.start()

    def wakes() -> bool:
        collector.signal(News.SHARDS)
        collector.wait([News.COLLECTION], poll_s=0.05, long_poll_s=1.0)
        return collector._line is not None and collector._line.seen.get(News.COLLECTION, 0) > 0

    try:
        with open_wakeups(tmp_path, never) as collector:
            wait_until(wakes)
            collector.wait([News.COLLECTION], long_poll_s=0.5)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            start = time.monotonic()
            for _ in range(3):
                collector.signal(News.SHARDS)
                collector.wait([News.COLLECTION], long_poll_s=0.5)
            assert 1.0 < time.monotonic() - start < LONG_S / 2
            with after(0.3, process.kill):
                assert wait(collector, News.COLLECTION) < LONG_S / 2
            assert wait(collector, News.COLLECTION) < LONG_S / 2  # polling from now on
            with serve_wakeups(tmp_path, never) as trainer:
                connect(trainer, collector)
    finally:
        process.kill()
        process.join()


def test_the_end_of_a_trainer_wakes_and_leaves_no_file(tmp_path: Path) -> None:
    woken: list[float] = []
    with open_wakeups(tmp_path, never) as collector:
        with serve_wakeups(tmp_path, never) as trainer:
            connect(trainer, collector)
            waiting = threading.Thread(target=lambda: woken.append(wait(collector, *TO_COLLECTORS)))
            waiting.start()
            time.sleep(0.2)
        waiting.join(LONG_S)
        assert woken[0] < LONG_S / 2
        assert not (tmp_path / FILE).exists()
        assert wait(collector, News.COLLECTION) < LONG_S / 2
