"""Forks are programs: their own arguments, environment, directory, output, status, and end."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.forks import Forks

WORD = {"WORD": "hello"}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Of any name, found where it is started: `probe.py`."""
    (tmp_path / "probe.py").write_text(
        "import atexit, os, sys, time\n"
        "atexit.register(print, 'the end')\n"
        "print(__name__, sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read(), flush=True)\n"
        "print('an error', file=sys.stderr)\n"
        "if sys.argv[1] == 'wait': time.sleep(600)\n"
        "if sys.argv[1] == 'raise': 1 / 0\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    return tmp_path


def run(forks: Forks, program: Path, argument: str) -> subprocess.CompletedProcess[str]:
    return forks.run("probe", argument, timeout_s=1.0 if argument == "wait" else 20.0, cwd=program, env=WORD)


@pytest.mark.parametrize("status", [0, 3])
def test_it_runs_to_the_end_of_the_interpreter(forks: Forks, program: Path, status: int) -> None:
    done = run(forks, program, str(status))
    said = f"__main__ ['{program}/probe.py', '{status}'] {program} hello \nthe end\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, said, "an error\n")


def test_what_is_raised_is_told_and_is_status_1(forks: Forks, program: Path) -> None:
    done = run(forks, program, "raise")
    assert done.returncode == 1
    assert done.stderr.startswith("an error\nTraceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.stdout.endswith("the end\n")


def test_what_takes_too_long_is_killed(forks: Forks, program: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired, match="process"):
        run(forks, program, "wait")


def test_several_run_at_a_time_and_none_outlives_the_parent(program: Path) -> None:
    with Forks() as forks:
        waiting = [forks.start("probe", "wait", cwd=program, env=WORD) for _ in range(3)]
        assert forks.start("probe", "5", cwd=program, env=WORD).wait(20.0) == 5
        waiting[0].send_signal(signal.SIGTERM)
        assert waiting[0].wait(20.0) == -signal.SIGTERM
        assert [process.poll() for process in waiting[1:]] == [None, None]
        left = [psutil.Process(process.pid) for process in waiting[1:]]
    deadline = time.monotonic() + 10.0
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left):
        assert time.monotonic() < deadline
        time.sleep(0.05)
