"""Every parallel layout is the same computation: against one process, on ragged batches, in fp64, fp32 and bf16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.builders import max_difference, save_qwen2
from tests.distributed.launch import run_distributed
from tests.forks import Forks

pytestmark = pytest.mark.timeout(900)  # several runs a test; each has its own deadline

CASES = "tests.distributed.layout_cases"
TP2, PP2, CP2 = (
    {f"{kind}_size": 2} for kind in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
SP = {"sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# model, processes, [parallel]
LAYOUTS: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    "tp2": ("untied", 2, TP2),
    "tp2_sp": ("untied", 2, TP2 | SP),
    "tp2_full_recompute": ("untied", 2, TP2 | {"recompute_granularity": "full"}),
    "selective_recompute": ("untied", 1, {"recompute_granularity": "selective"}),
    "pp2": ("untied", 2, PP2),
    "dp2_overlap": ("untied", 2, OVERLAP),
    "cp2": ("untied", 2, CP2),
    "tied_tp2": ("tied", 2, TP2),
    "tied_pp2": ("tied", 2, PP2),
    "tp2_pp2": ("untied", 4, TP2 | PP2),
    "tp2_cp2_sp": ("untied", 4, TP2 | CP2 | SP),
    "pp2_dp2": ("untied", 4, PP2 | OVERLAP),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four layers, an odd vocabulary: of 301 rows, 512 under TP2."""
    root = tmp_path_factory.mktemp("models")
    return {
        kind: save_qwen2(
            root / kind,
            vocab_size=301,
            num_hidden_layers=4,
            max_position_embeddings=256,
            tie_word_embeddings=kind == "tied",
        )
        for kind in ("untied", "tied")
    }


def run(forks: Forks, function: str, out: Path, hf_path: Path, world_size: int, **arguments: Any) -> Path:
    out.mkdir(parents=True)
    arguments |= {"hf_path": str(hf_path), "directory": str(out)}
    run_distributed(forks, f"{CASES}:{function}", world_size, 150.0, arguments)
    return out


@pytest.fixture(scope="module")
def ones(forks: Forks, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process does."""
    root = tmp_path_factory.mktemp("one")
    return {kind: run(forks, "work", root / kind, models[kind], 1, parallel={}) for kind in models}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(
    request: pytest.FixtureRequest,
    forks: Forks,
    models: dict[str, Path],
    ones: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """(what one process wrote, what the layout wrote)."""
    kind, world_size, parallel = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp("layout") / request.param
    return ones[kind], run(forks, "work", out, models[kind], world_size, parallel=parallel)


def relative_gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def worst_gradient_gap(found: Path, expected: Path) -> float:
    left, right = load_file(found), load_file(expected)
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max() / right[name].abs().max()) for name in right)


# ---------------------------------------------------------------- fp64


def test_scores_residuals_and_losses_are_equal_in_fp64(pair: tuple[Path, Path]) -> None:
    expected, found = (np.load(path / "fp64.npz") for path in pair)
    assert set(found) == set(expected)
    gaps = {name: relative_gap(found[name], expected[name]) for name in expected}
    # log-probabilities of tokens leave a pass as float32
    assert {name: gap for name, gap in gaps.items() if gap > (1e-6 if name == "logprobs" else 1e-9)} == {}
    assert len({round(float(value), 6) for value in expected["residual_1"]}) == len(expected["residual_1"])


@pytest.mark.parametrize("num_passes", [1, 2])
def test_gradients_are_equal_in_fp64_in_one_pass_and_in_two(pair: tuple[Path, Path], num_passes: int) -> None:
    expected, found = pair
    gap = worst_gradient_gap(found / f"gradients_{num_passes}.safetensors", expected / "gradients_1.safetensors")
    assert gap < 1e-9


def test_without_reward_at_the_reference_residuals_and_gradients_are_zero(pair: tuple[Path, Path]) -> None:
    notes = json.loads((pair[1] / "notes.json").read_text())
    assert notes == {"calibration_residual": 0.0, "calibration_gradient": 0.0}


# ---------------------------------------------------------------- fp32, with the optimizer


def test_three_updates_end_at_the_same_parameters(pair: tuple[Path, Path]) -> None:
    expected, found = (load_file(path / "weights.safetensors") for path in pair)
    assert max_difference(found, expected) < 1e-4 * max(float(value.abs().max()) for value in expected.values())
    assert max_difference(found, expected) < 2e-6  # as seen; a step is 1e-4


def test_every_rank_reports_the_updates_of_one_process(pair: tuple[Path, Path]) -> None:
    (expected,), reports = (json.loads((path / "updates.json").read_text()) for path in pair)
    for report in reports:
        assert report["adam_steps"] == [3]
        for one, other in zip(expected["learning"], report["learning"], strict=True):
            assert other["metrics"]["grad_norm"] == pytest.approx(one["metrics"]["grad_norm"], rel=1e-4)
            assert other["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)
            np.testing.assert_allclose(other["residual"], one["residual"], rtol=0.0, atol=1e-3)


def test_the_reference_scores_what_it_was_before_the_updates(pair: tuple[Path, Path]) -> None:
    expected, found = (np.load(path / "fp32.npz") for path in pair)
    assert relative_gap(found["trajectory_score"], expected["trajectory_score"]) < 1e-6


# ---------------------------------------------------------------- bf16

# nats a token and of a value, against fp32 weights: what rounding weights and activations to bf16 does to this model;
# the head adds nothing, its logits are fp32
BF16_BOUND = 0.35


def test_bf16_stays_near_fp32_in_one_process_and_under_a_layout(
    forks: Forks, models: dict[str, Path], tmp_path: Path
) -> None:
    scores = {}
    for name, world_size, parallel, precision in (
        ("fp32", 1, {}, "fp32"),
        ("one", 1, {}, "bf16"),
        ("four", 4, TP2 | PP2 | SP, "bf16"),
    ):
        out = run(forks, "score", tmp_path / name, models["untied"], world_size, parallel=parallel, precision=precision)
        scores[name] = dict(np.load(out / "scores.npz"))
    for name in ("one", "four"):
        for field in ("logprobs", "initial_value", "final_value"):
            assert np.abs(scores[name][field] - scores["fp32"][field]).max() < BF16_BOUND, (name, field)
    assert all(float(scores[name]["loss_after"]) < 0.9 * float(scores[name]["loss_before"]) for name in scores)


# ---------------------------------------------------------------- what would be noticed


@pytest.mark.parametrize(
    ("mutation", "world_size", "parallel"),
    [
        ("no_context_parallel_sum", 2, CP2),
        ("labels_shifted_after_cutting", 2, CP2),
        ("local_normalizer", 2, {}),
        ("padded_columns_unmasked", 2, TP2),
    ],
)
def test_a_mutation_turns_the_comparison_red(
    forks: Forks, mutation: str, world_size: int, parallel: Mapping[str, Any], models: dict[str, Path],
    ones: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    out = run(forks, "mutated", tmp_path / mutation, models["untied"], world_size, parallel=parallel, mutation=mutation)
    pair = ones["untied"], out
    with pytest.raises(AssertionError):
        test_gradients_are_equal_in_fp64_in_one_pass_and_in_two(pair, 1)
    if mutation != "local_normalizer":  # which leaves values as they are
        with pytest.raises(AssertionError):
            test_scores_residuals_and_losses_are_equal_in_fp64(pair)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_moves_between_layouts(forks: Forks, models: dict[str, Path], tmp_path: Path) -> None:
    """TP2 x PP2 writes; DP2, then one process, then TP2 x PP2 load it and write it again: the same to the last bit.

    What is compared is every tensor of the checkpoints: weights, Adam's moments, master weights, reference. From each
    of them three further updates lead to the same parameters.
    """
    ways: list[tuple[str, int, Mapping[str, Any]]] = [
        ("tp2_pp2", 4, TP2 | PP2),
        ("dp2", 2, OVERLAP),
        ("one", 1, {}),
        ("tp2_pp2_again", 4, TP2 | PP2),
    ]
    source = ""
    for name, world_size, parallel in ways:
        out = run(forks, "go_on", tmp_path / name, models["untied"], world_size, parallel=parallel, checkpoint=source)
        source = str(out / "checkpoint")
    run(
        forks,
        "compare",
        tmp_path / "compare",
        models["untied"],
        1,
        checkpoints=[str(tmp_path / way[0]) for way in ways],
    )
    first, *others = (tmp_path / way[0] for way in ways)
    expected, before = load_file(first / "weights.safetensors"), load_file(first / "saved.safetensors")
    for other in others:
        assert max_difference(load_file(other / "saved.safetensors"), before) == 0.0
        assert max_difference(load_file(other / "weights.safetensors"), expected) < 2e-6
        notes = json.loads((other / "notes.json").read_text())
        assert notes == json.loads((first / "notes.json").read_text())
        assert notes == {"num_updates": 3, "reference_version": 2, "adam_steps": [3], "adam_steps_after": [6]}
    assert max_difference(expected, before) > 1e-4
