"""Markers that turn into skips, the one topology of this process, and the demo's model."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.forks import Forks
from tests.small_disk import SmallDisk, reason_to_skip

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology


# No deadline: a loaded machine is no bug. Derandomized: a red run is red again on the next machine.
hypothesis.settings.register_profile("reval", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reval")


def _missing(marker: str) -> str | None:
    """Why tests under this marker cannot run here, and what to do about it; None where they can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device; run on a machine with one and a CUDA build of torch"
    if marker == "te" and importlib.util.find_spec("transformer_engine") is None:
        return 'no Transformer Engine; pip install "reval_mcore[te]"'
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    # here, not beside the tests that they are for: pytest parses its command line before it finds a deeper conftest.py
    parser.addoption("--update-golden", action="store_true", help="write the messages of wrong inputs anew, to be read")
    parser.addoption("--update-recordings", action="store_true", help="write the replies of a real SGLang anew")
    parser.addoption("--sglang-urls", default="", metavar="URL,URL", help="two servers that run, to save their start")
    parser.addoption("--num-kills", type=int, default=8, metavar="N", help="random moments at which a run is killed")
    parser.addoption("--replay-seconds", type=float, default=6.0, metavar="S", help="how long eight writers write")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker in ("gpu", "te"):
        marked = [item for item in items if item.get_closest_marker(marker) is not None]
        if marked and (reason := _missing(marker)) is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    """This process alone. megatron-core's state is global: one topology at a time, so one for the session."""
    import torch

    from reval_mcore.mcore.topology import open_topology

    torch.set_num_threads(1)  # the same kernels, in the same order, on every machine
    with open_topology() as opened:
        yield opened


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """To start programs in."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """Where a function can fill the disk."""
    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)
    with SmallDisk(tmp_path_factory.mktemp("small_disk")) as disk:
        yield disk


def cache_directory() -> Path:
    """Where tools/environment.sh keeps what is slow to make."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reval_mcore"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The warm-started model of seed 0 with its prompts; made where the cache has none of these sources."""
    import tools.make_tiny_model  # here, for it takes seconds, which a process that only hands out tests can do without
    import tools.tiny_task

    modules = (tools.make_tiny_model, tools.tiny_task)
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    path = cache_directory() / f"tiny_model-{hashlib.sha256(sources).hexdigest()[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of tests that run side by side one makes it
        if not (path / "tiny_model.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            tools.make_tiny_model.make(path, seed=0, threads=1)
    return path


@pytest.fixture(scope="session")
def half_way(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model after one iteration: it is right half of the time."""
    from tests.sglang.runs import reval, settings

    run = tmp_path_factory.mktemp("half_way")
    done = reval(forks, "train", *settings(tiny_model, tiny_model, run / "run"), "run.num_iterations=1")
    assert done.returncode == 0, done.stderr
    done = reval(forks, "export", str(run / "run"), "--out", str(run / "model"))
    assert done.returncode == 0, done.stderr
    return run / "model"
