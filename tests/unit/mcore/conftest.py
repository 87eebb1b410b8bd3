"""Tiny models on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import save_qwen2


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(params=["untied", "tied"])
def hf_path(request: pytest.FixtureRequest, untied: Path, tied: Path) -> Path:
    """Both kinds in turn."""
    return {"untied": untied, "tied": tied}[request.param]
