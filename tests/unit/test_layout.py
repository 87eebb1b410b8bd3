"""A layout that cannot work is refused with the values that would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reval_mcore.architecture import read_spec
from reval_mcore.config import ConfigError, ParallelConfig
from reval_mcore.layout import check_layout, data_parallel_size
from tests.builders import save_qwen2


def refusal(tmp_path: Path, world_size: int, **sizes: Any) -> str:
    """4 heads in 2 groups, 80 columns in the MLP, 6 layers."""
    spec = read_spec(save_qwen2(tmp_path, num_hidden_layers=6))
    with pytest.raises(ConfigError) as refused:
        check_layout(ParallelConfig(**sizes), spec, world_size)
    return str(refused.value)


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    spec = read_spec(save_qwen2(tmp_path, num_hidden_layers=6))
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=2)
    check_layout(parallel, spec, 24)
    assert data_parallel_size(parallel, 24) == 2


def test_tensor_parallelism_that_cuts_a_query_group_names_the_sizes_that_do_not(tmp_path: Path) -> None:
    said = refusal(tmp_path, 4, tensor_model_parallel_size=4)
    assert (
        "parallel.tensor_model_parallel_size = 4: does not divide the model's 2 key-value heads; give one of 1, 2"
    ) in said


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, 8, tensor_model_parallel_size=3, pipeline_model_parallel_size=4)
    assert "3 problems" in said
    assert "2 key-value heads, 4 attention heads, 80 columns of the MLP" in said
    assert "does not divide the model's 6 layers; give one of 1, 2, 3, 6" in said
    assert "one copy of the model takes 3 x 4 x 1 = 12 processes" in said
    assert "and 8 are started; start a multiple of 12 (torchrun --nproc_per_node)" in said
    assert "product is one of 1, 2, 4, 8" in said


def test_one_process_is_not_enough_for_a_layout_of_two(tmp_path: Path) -> None:
    assert "and 1 is started; start a multiple of 2" in refusal(tmp_path, 1, context_parallel_size=2)
