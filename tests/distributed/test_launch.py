"""run_distributed itself: results, failures, deadlines, and that nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import DeadlinePassed, RankFailed, run_distributed
from tests.forks import Forks

CASES = "tests.distributed.launch_cases"


def left_behind(pids: Sequence[int]) -> list[int]:
    """Those that still run; one that waits to be reaped does not."""
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def started(directory: Path) -> list[int]:
    """Process ids that the ranks, and what they started, wrote down."""
    return [int(path.name) for path in directory.iterdir()]


def test_every_rank_runs_and_what_it_prints_comes_back(forks: Forks) -> None:
    out = run_distributed(forks, f"{CASES}:sum_of_ranks", 2, 60.0, {"word": "hello"})
    assert [text.strip().splitlines()[-1] for text in out] == ["hello 0 of 2: 1", "hello 1 of 2: 1"]


def test_a_rank_that_raises_ends_the_run_at_once_with_its_traceback(forks: Forks, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_distributed(forks, f"{CASES}:second_rank_raises", 2, 120.0, {"directory": str(tmp_path)})
    assert time.monotonic() - start < 60.0  # the other rank would wait for ever
    assert "rank 1" in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)
    assert "launch_cases.py" in str(caught.value)
    assert len(started(tmp_path)) == 2
    assert left_behind(started(tmp_path)) == []


def test_a_rank_that_exits_ends_the_run(forks: Forks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_distributed(forks, f"{CASES}:second_rank_exits", 2, 120.0, {"directory": str(tmp_path)})
    assert "status 3" in str(caught.value)
    assert left_behind(started(tmp_path)) == []


def test_a_run_that_hangs_is_killed_with_all_that_it_started(forks: Forks, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlinePassed) as caught:
        run_distributed(forks, f"{CASES}:hang", 2, 10.0, {"directory": str(tmp_path)})
    assert time.monotonic() - start < 40.0
    ranks = str(caught.value).split("---- rank ")[1:]
    assert [rank[0] for rank in ranks] == ["0", "1"]
    assert all("launch_cases.py" in rank and "in hang" in rank for rank in ranks)  # where each of them was
    assert len(started(tmp_path)) == 4  # two ranks, and a child of each
    assert left_behind(started(tmp_path)) == []


def test_a_rank_that_shuts_its_ears_is_killed_too(forks: Forks, tmp_path: Path) -> None:
    """One that has disarmed its own deadline and ignores SIGTERM."""
    with pytest.raises(DeadlinePassed):
        run_distributed(forks, f"{CASES}:deaf", 1, 5.0, {"directory": str(tmp_path)})
    assert len(started(tmp_path)) == 1
    assert left_behind(started(tmp_path)) == []
