"""Markers that turn into skips, and the one topology of this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

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
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """Where a function can fill the disk."""
    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)
    with SmallDisk(tmp_path_factory.mktemp("small_disk")) as disk:
        yield disk
