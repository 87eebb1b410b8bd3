"""Two tensor-parallel ranks over gloo against one process: scores, updates, exports, checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.builders import max_difference, same_tensors, save_qwen2, source_tensors
from tests.distributed.launch import run_distributed
from tests.forks import Forks

CASES = "tests.distributed.tensor_parallel_cases"


def test_logsumexp_over_two_ranks_equals_dense_fp64(forks: Forks) -> None:
    """100 and 65 of 128: padding in the upper part of the last shard; 64 and 40: rank 1 holds padding only."""
    run_distributed(forks, f"{CASES}:logsumexp", 2, 120.0, {"num_valid": [128, 100, 65, 64, 40]})


@dataclass(frozen=True)
class Runs:
    """The same life in one process and in two, and in each what the other's checkpoint went on to."""

    hf_path: Path
    one: Path
    two: Path
    notes_one: dict[str, Any]
    notes_two: list[dict[str, Any]]


# 301 of 512 rows: rank 1 holds some; 101 of 256: rank 1 holds padding only
@pytest.fixture(scope="module", params=["untied_301", "tied_101"])
def runs(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kind, rows = request.param.split("_")
    root = tmp_path_factory.mktemp(request.param)
    hf_path = save_qwen2(root / "model", vocab_size=int(rows), tie_word_embeddings=kind == "tied")
    directories = {1: root / "one", 2: root / "two"}
    for world_size, directory in directories.items():
        directory.mkdir()
        run_distributed(
            forks, f"{CASES}:live", world_size, 240.0, {"hf_path": str(hf_path), "directory": str(directory)}
        )
    for world_size, directory in directories.items():
        arguments = {
            "hf_path": str(hf_path),
            "checkpoint": str(directories[3 - world_size] / "checkpoint"),
            "directory": str(directory),
        }
        run_distributed(forks, f"{CASES}:continue_from", world_size, 240.0, arguments)
    notes = [
        json.loads((directory / f"rank{rank}.json").read_text(encoding="utf-8"))
        for directory, rank in ((directories[1], 0), (directories[2], 0), (directories[2], 1))
    ]
    return Runs(hf_path, directories[1], directories[2], notes[0], notes[1:])


def test_scores_equal_those_of_one_process(runs: Runs) -> None:
    one, two = np.load(runs.one / "scores.npz"), np.load(runs.two / "scores.npz")
    for name in ("logprobs", "initial_value", "final_value"):
        np.testing.assert_allclose(two[name], one[name], rtol=0.0, atol=1e-5, err_msg=name)
    # a sum over up to 24 tokens
    np.testing.assert_allclose(two["trajectory_score"], one["trajectory_score"], rtol=0.0, atol=5e-5)


def test_exported_tensors_equal_the_source_bit_for_bit(runs: Runs) -> None:
    assert same_tensors(load_file(runs.two / "exported.safetensors"), source_tensors(runs.hf_path))


def test_updates_equal_those_of_one_process(runs: Runs) -> None:
    for notes in runs.notes_two:
        np.testing.assert_allclose(notes["loss"], runs.notes_one["loss"], rtol=1e-5)
        np.testing.assert_allclose(notes["grad_norm"], runs.notes_one["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(notes["residual"], runs.notes_one["residual"], rtol=0.0, atol=5e-5)
    one, two = load_file(runs.one / "updated.safetensors"), load_file(runs.two / "updated.safetensors")
    assert max_difference(two, one) < 1e-6
    assert max_difference(one, source_tensors(runs.hf_path)) > 1e-4


@pytest.mark.parametrize(
    "claim", ["calibrated", "padding_is_zero", "reference_reproduced", "resume_is_exact", "reset_identity"]
)
def test_what_holds_exactly_in_one_process_holds_on_every_rank(claim: str, runs: Runs) -> None:
    assert [notes[claim] for notes in (runs.notes_one, *runs.notes_two)] == [True, True, True]


def test_adam_counts_its_steps_on_every_rank(runs: Runs) -> None:
    assert [notes["adam_steps"] for notes in (runs.notes_one, *runs.notes_two)] == [[5], [5], [5]]


def test_no_megatron_module_of_a_whole_life_keeps_the_bare_torch(runs: Runs) -> None:
    """Late imports of updating, saving and loading included."""
    assert [notes["bare_modules"] for notes in (runs.notes_one, *runs.notes_two)] == [[], [], []]


def test_a_checkpoint_of_one_layout_goes_on_under_the_other(runs: Runs) -> None:
    """Weights and reference arrive bit for bit; the next update is the one that the writer took, up to rounding."""
    for writer, reader in ((runs.one, runs.two), (runs.two, runs.one)):
        assert same_tensors(load_file(reader / "loaded.safetensors"), load_file(writer / "updated.safetensors"))
        reference, scores = np.load(reader / "loaded_reference.npz"), np.load(writer / "scores.npz")
        np.testing.assert_allclose(reference["logprobs"], scores["logprobs"], rtol=0.0, atol=1e-5)
        found, expected = load_file(reader / "resharded.safetensors"), load_file(writer / "continued.safetensors")
        assert max_difference(found, expected) < 1e-6
        assert max_difference(expected, load_file(writer / "updated.safetensors")) > 1e-5
