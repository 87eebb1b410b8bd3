"""A pool of verifiers that nothing can hang: deadlines, deaths, leftovers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from reval_mcore.config import VerifierConfig
from reval_mcore.verifiers import VerifierPool
from tests.verifying import boxed, reasons_of, workers

ENDLESS = "2^{3000000000}"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    """One pool for many tests: whatever one of them does to its worker, the next one must find a pool that works."""
    with VerifierPool(VerifierConfig(timeout_s=1.0)) as pool:
        yield pool


@pytest.fixture
def worker(pool: VerifierPool) -> psutil.Process:
    """The worker of the pool, started and idle."""
    assert reasons_of(pool.verify([(boxed("x+1"), "1+x")])) == ["correct"]
    (worker,) = workers()
    return worker


@pytest.mark.parametrize(
    "answer",
    ["2^(3*10^9)", "{" * 10_000 + "1" + "}" * 10_000, "{" * 900 + "1" + "}" * 900, "x" * 10**6],
    ids=["power", "10000_braces", "900_braces", "megabyte"],
)
@pytest.mark.usefixtures("worker")  # its start is not what is measured
def test_a_hostile_answer_costs_one_deadline_at_most(pool: VerifierPool, answer: str) -> None:
    before = time.monotonic()
    (verdict,) = pool.verify([(boxed(answer), "7")])
    assert time.monotonic() - before < 4.0  # a deadline of 1 s, and room for a busy machine
    assert verdict.reason in ("wrong", "timeout")
    assert verdict.reward == 0.0
    assert len(verdict.answer) <= 200
    assert reasons_of(pool.verify([(boxed("x+2"), "2+x")])) == ["correct"]
    assert len(workers()) == 1


@pytest.mark.usefixtures("worker")
def test_equal_hostile_answers_cost_one_deadline_together(pool: VerifierPool) -> None:
    before = time.monotonic()
    verdicts = pool.verify([(boxed(ENDLESS), "7"), (boxed("x+1"), "1+x")] * 16)
    assert reasons_of(verdicts) == ["timeout", "correct"] * 16
    assert time.monotonic() - before < 8.0  # sixteen deadlines would take longer


def test_workers_work_side_by_side() -> None:
    elsewhere = workers()
    with VerifierPool(VerifierConfig(timeout_s=1.0, num_workers=2)) as pool:
        verdicts = pool.verify([(boxed(answer), "7+x") for answer in (ENDLESS, "x+7", "x+8", "7 + x")])
        assert reasons_of(verdicts) == ["timeout", "correct", "wrong", "correct"]
        assert len(workers()) == len(elsewhere) + 2
    assert workers() == elsewhere


def test_starting_takes_nothing_from_the_deadline() -> None:
    with VerifierPool(VerifierConfig(timeout_s=0.2)) as pool:  # a worker takes longer than that to start
        assert reasons_of(pool.verify([(boxed("x+1"), "1+x")])) == ["correct"]


def test_a_worker_that_dies_by_itself_is_an_error_and_replaced() -> None:
    elsewhere = workers()
    with VerifierPool(VerifierConfig(timeout_s=60.0)) as pool:
        pool.verify([(boxed("x+1"), "1+x")])
        (worker,) = (process for process in workers() if process not in elsewhere)
        killer = threading.Timer(0.2, worker.kill)
        killer.start()
        verdicts = pool.verify([(boxed(ENDLESS), "7"), (boxed("x+2"), "2+x")])
        killer.join()
    assert reasons_of(verdicts) == ["error", "correct"]


def test_a_worker_that_dies_while_idle_costs_no_verdict(pool: VerifierPool, worker: psutil.Process) -> None:
    worker.kill()
    while worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert reasons_of(pool.verify([(boxed("x+2"), "2+x")])) == ["correct"]


def test_signals_to_the_whole_job_leave_workers_working(pool: VerifierPool, worker: psutil.Process) -> None:
    worker.terminate()
    assert reasons_of(pool.verify([(boxed("x+2"), "2+x")])) == ["correct"]
    assert workers() == [worker]


def test_workers_that_never_start_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = workers()
    pool = VerifierPool(VerifierConfig())
    monkeypatch.setattr("reval_mcore.verifiers._WORKER_PROGRAM", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="do not start"):
        pool.verify([(boxed("x+1"), "1+x")])
    assert workers() == elsewhere


@pytest.mark.usefixtures("worker")
def test_close_leaves_no_process_and_the_pool_can_be_used_again(pool: VerifierPool) -> None:
    pool.close()
    assert workers() == []
    assert reasons_of(pool.verify([(boxed("x+1"), "1+x")])) == ["correct"]


@pytest.mark.parametrize("last_words", ["os.kill(os.getpid(), 9)", f"pool.verify([(box('{ENDLESS}'), '7')])"])
def test_workers_do_not_outlive_a_killed_parent(last_words: str) -> None:
    """Killed between verdicts, or with a worker in the middle of an endless answer."""
    code = f"""if True:
        import os, psutil
        from reval_mcore.config import VerifierConfig
        from reval_mcore.verifiers import VerifierPool
        box = "\\\\boxed{{{{{{}}}}}}".format
        pool = VerifierPool(VerifierConfig(timeout_s=0.3))
        pool.verify([(box("x+1"), "1+x")])
        print(psutil.Process().children()[0].pid, flush=True)
        {last_words}
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()
