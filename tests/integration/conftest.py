"""The demo's model, made once and kept outside the clone."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

import tools.make_tiny_model
import tools.tiny_task


def cache_directory() -> Path:
    """Where tools/environment.sh keeps what is slow to make."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reval_mcore"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The warm-started model of seed 0 with its prompts; made where the cache has none of these sources."""
    modules = (tools.make_tiny_model, tools.tiny_task)
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    path = cache_directory() / f"tiny_model-{hashlib.sha256(sources).hexdigest()[:16]}"
    if not (path / "tiny_model.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        tools.make_tiny_model.make(path, seed=0, threads=1)
    return path
