"""Run a function in several real processes, under a hard deadline, and leave none of them behind.

The parent hosts the store for the rendezvous on a port that the system gives, so runs side by side cannot collide. Each
process gets torchrun's environment, and a session of its own, so that what it starts is ended with it.

As a program this is one such process: `python -m tests.distributed.launch MODULE:FUNCTION JSON_ARGUMENTS ENDS_AT_S`,
where the last is a time of `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.forks import Fork, Forks

_GRACE_S = 5.0  # stuck processes say where they hang and end themselves; the parent kills them this much later
_POLL_S = 0.05


class RankFailed(Exception):
    """A rank ended with an error; the message has its traceback."""


class DeadlinePassed(Exception):
    """The run took too long; the message says where each rank was."""


def run_distributed(
    forks: Forks, function_path: str, world_size: int, timeout_s: float, arguments: Mapping[str, Any] | None = None
) -> list[str]:
    """Call `module:function(**arguments)` in `world_size` processes; returns what each rank printed.

    Arguments travel as JSON. The first rank that fails ends the run at once. Raises RankFailed or DeadlinePassed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=60))
    processes: list[Fork] = []
    ends_at_s = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory) / f"{rank}.log" for rank in range(world_size)]
        try:
            for rank, log in enumerate(logs):
                what = (function_path, json.dumps(dict(arguments or {})), str(ends_at_s))
                env = _environment(rank, world_size, store.port)
                with log.open("wb") as file:
                    processes.append(forks.start(__name__, *what, env=env, stdout=file))
            _wait(processes, logs, hard_deadline=ends_at_s + _GRACE_S)
            return [log.read_text(errors="replace") for log in logs]
        finally:
            for process in processes:
                _kill_session(process)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _wait(processes: list[Fork], logs: list[Path], *, hard_deadline: float) -> None:
    """Until all have ended well. Ranks that hang end themselves at their deadline, each with a report."""
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        failed = [code not in (None, 0) for code in codes]
        is_late = any(failed) and any(_TIMED_OUT in log.read_text(errors="replace") for log in logs)
        if time.monotonic() > hard_deadline or (is_late and None not in codes):
            raise DeadlinePassed(_told(logs, codes, [code != 0 for code in codes]))
        if any(failed) and not is_late:
            # a rank that meets the hole that another left fails too: show both
            codes = [process.poll() for process in processes]
            raise RankFailed(_told(logs, codes, [code not in (None, 0) for code in codes]))
        time.sleep(_POLL_S)


_TIMED_OUT = "Timeout ("  # how faulthandler begins its report


def _told(logs: list[Path], codes: list[int | None], shown: list[bool]) -> str:
    """What the ranks that are to be shown printed."""
    states = ["still running" if code is None else f"ended with status {code}" for code in codes]
    return "\n".join(
        f"---- rank {rank}, {states[rank]}\n{log.read_text(errors='replace')}"
        for rank, log in enumerate(logs)
        if shown[rank]
    )


def _kill_session(process: Fork) -> None:
    """End the process and all that it started, and see them gone."""
    members = [other for other in psutil.process_iter() if _group_of(other.pid) == process.pid]
    process.kill()
    while any(map(_is_alive, members)):
        time.sleep(_POLL_S)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _is_alive(process: psutil.Process) -> bool:
    """Not ended; what waits to be reaped by its parent has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _main(function_path: str, arguments: str, ends_at_s: str) -> None:
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(max(float(ends_at_s) - time.monotonic(), 0.1), exit=True)
    module, _, function = function_path.partition(":")
    try:
        getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except BaseException:
        # the others wait for this rank in a collective, and leaving in good order may wait for them: say why, and end
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
