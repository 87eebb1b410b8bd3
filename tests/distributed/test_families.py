"""Every model family under every kind of layout: scores of transformers, exports, converted checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.conversion.to_mcore import convert_to_mcore
from tests.builders import FAMILY_FIELDS, save_model
from tests.distributed.launch import run_distributed
from tests.forks import Forks

CASES = "tests.distributed.family_cases"
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "tp2_pp2": (4, TP2 | PP2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each family tied and untied, in Hugging Face format and converted."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for family in FAMILY_FIELDS:
        for tied in (False, True):
            name = f"{family}_tied" if tied else family
            directory = save_model(family, root / name, tie_word_embeddings=tied)
            convert_to_mcore(directory, root / f"{name}_mcore")
            found[name] = str(directory)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_is_that_of_transformers(forks: Forks, layout: str, models: dict[str, str]) -> None:
    world_size, parallel = LAYOUTS[layout]
    run_distributed(forks, f"{CASES}:check", world_size, 150.0, {"models": models, "parallel": parallel})


def test_a_rank_reads_only_its_slices(forks: Forks, models: dict[str, str]) -> None:
    run_distributed(forks, f"{CASES}:read_slices", 4, 100.0, {"model": models["qwen2"], "parallel": TP2 | PP2})


@pytest.mark.parametrize("name", ["qwen2", "llama_tied"])
def test_trained_under_a_layout_and_converted_it_is_the_same_model(
    forks: Forks, name: str, models: dict[str, str], tmp_path: Path
) -> None:
    arguments = {"model": models[name], "directory": str(tmp_path / "run"), "parallel": TP2 | PP2}
    run_distributed(forks, f"{CASES}:train_and_export", 4, 150.0, arguments)
