"""What users get wrong is told in one short message that names place, value and remedy, with status 2.

The messages are in wrong_inputs/, one file a case; `pytest --update-golden` writes them anew, for a reader to judge.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import tools.make_tiny_model
from tests.forks import ROOT, Forks
from tests.integration.wrong_inputs import CASES, Bench

GOLDEN = Path(__file__).parent / "wrong_inputs"
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
Reval = Callable[[Sequence[str], Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def reval() -> Iterator[Reval]:
    """The command in a directory, without root's privileges: permissions bind it as they bind users."""
    with Forks(command_prefix=UNPRIVILEGED) as forks:
        # lines as long as on every machine
        yield lambda arguments, cwd: forks.run(
            "reval_mcore.cli", *arguments, timeout_s=60.0, cwd=cwd, env={"COLUMNS": "120"}
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """All that a run needs. The model knows nothing yet."""
    bench = Bench(tmp_path_factory.mktemp("bench"))
    bench.model.mkdir()
    tools.make_tiny_model.save_config(bench.model, tools.make_tiny_model.Shape())
    tools.make_tiny_model.build_model(bench.model, seed=0).save_pretrained(bench.model)
    bench.fill()
    return bench


@pytest.fixture(scope="module")
def trained(bench: Bench, reval: Reval, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With a run of one iteration; so what is wrong in a case is what the case made wrong."""
    trained = bench.copy_to(tmp_path_factory.mktemp("trained"))
    done = reval(["train", "config.toml"], trained.path)
    assert done.returncode == 0, done
    return trained


def contents(path: Path) -> dict[str, int]:
    """CRC32 of every readable file below `path`, 0 of what else there is."""
    found = sorted(path.rglob("*"))
    return {
        str(x.relative_to(path)): zlib.crc32(x.read_bytes()) if x.is_file() and os.access(x, os.R_OK) else 0
        for x in found
    }


def with_placeholders(text: str, tmp_path: Path) -> str:
    return text.replace(str(tmp_path), "{tmp}").replace(str(ROOT), "{root}")


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name: str, request: pytest.FixtureRequest, reval: Reval, tmp_path: Path) -> None:
    case = CASES[name]
    right: Bench = request.getfixturevalue("trained" if case.trained else "bench")
    bench = right.copy_to(tmp_path)
    arguments = case.make(bench)
    before = contents(tmp_path)
    done = reval(arguments, tmp_path)
    message = with_placeholders(done.stderr, tmp_path)
    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(message, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, ""), message
    assert message == golden.read_text(encoding="utf-8")
    check_form(message)
    assert contents(tmp_path) == before  # a refused command leaves everything as it was


def check_form(message: str) -> None:
    """What holds of every message, whoever writes it."""
    assert not re.search(r"Traceback|\[Errno|Error:|Warning", message)
    first, *rest = message.splitlines()
    if first.startswith("usage: "):  # argparse's own
        *wrapped, error = rest
        assert all(line.startswith("  ") for line in wrapped)
        assert re.match(r"reval( \w+)?: error: \S", error)
        return
    assert re.match(r"reval (train|eval|export|report): \S", first)
    assert all(line.startswith("  ") for line in rest)  # one message
    for problem in [line for line in rest if not line.startswith("  ...")] or [first]:
        assert re.search(r": \S.*\S$", problem)
    assert max(map(len, message.splitlines())) < 300


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


def test_permissions_bind_here(tmp_path: Path) -> None:
    """Else the cases of unreadable files would show nothing."""
    (tmp_path / "secret").touch(mode=0o000)
    done = subprocess.run([*UNPRIVILEGED, "cat", tmp_path / "secret"], capture_output=True, text=True, check=False)
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize("name", ["wrong_type", "weights_missing"])
def test_a_start_from_nothing_says_the_same(name: str, bench: Bench, tmp_path: Path) -> None:
    """No library adds a word of its own while it is imported."""
    arguments = CASES[name].make(bench.copy_to(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "reval_mcore.cli", *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    expected = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert (done.returncode, done.stdout, with_placeholders(done.stderr, tmp_path)) == (2, "", expected)
