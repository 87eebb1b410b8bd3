"""`reval` commands in forks of one process that has imported everything: a process each, in a moment each.

That process gives up root's privileges, so that permissions bind it as they bind users. It takes one command a line on
its standard input, a JSON object, and answers with one a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
_DEADLINE_S = 60


@dataclass(frozen=True)
class Told:
    """What a command left on a terminal."""

    status: int
    out: str
    err: str


class Forks:
    """To be used in a `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*UNPRIVILEGED, sys.executable, "-m", "tests.integration.forks"],
            cwd=ROOT,
            # one thread, for a process with more must not fork; lines as long as on every machine
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def reval(self, arguments: Sequence[str], *, cwd: Path) -> Told:
        """`reval ARGUMENTS` in the directory `cwd`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"arguments": list(arguments), "cwd": str(cwd)}), file=self._process.stdin, flush=True)
        return Told(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input is the end of it


# ---------------------------------------------------------------- the other side


def _serve() -> None:
    import reval_mcore.assembly
    import reval_mcore.report

    assert reval_mcore.assembly
    assert reval_mcore.report
    for line in sys.stdin:
        print(json.dumps(_fork(**json.loads(line))), flush=True)


def _fork(arguments: list[str], cwd: str) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(arguments, cwd, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        texts = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read().decode()
    return {"status": os.waitstatus_to_exitcode(status), **texts}


def _become(arguments: list[str], cwd: str, out: int, err: int) -> NoReturn:
    """What `python -m reval_mcore.cli` would be."""
    from reval_mcore.cli import main

    status: Any = 1
    try:
        signal.alarm(_DEADLINE_S)
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        status = main(arguments)
    except SystemExit as request:
        status = request.code
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
