"""What a plan says of a run: flows, warnings, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reval_mcore.architecture import read_spec
from reval_mcore.cli import main
from reval_mcore.config import ConfigError, load
from reval_mcore.mcore.packing import plan_ranks
from reval_mcore.plan import GIB, make_plan
from reval_mcore.plan.text import render
from reval_mcore.plan.traffic import TOKEN_BYTES_IN_MEMORY, TOKEN_BYTES_ON_DISK
from reval_mcore.records import Trajectory, VersionSpan
from reval_mcore.replay.loading import read_shard
from reval_mcore.replay.shards import SHARDS, ShardWriter
from tests.builders import make_config, save_qwen2
from tests.plans import CONFIGS, SHIPPED, planned, shipped

# ---------------------------------------------------------------- files and flows


def test_uses_of_a_trajectory_as_in_the_paper() -> None:
    fresh, uniform = shipped("paper_7b").replay, shipped("paper_7b", "replay.first_update=uniform").replay
    assert fresh.uses_per_trajectory == uniform.uses_per_trajectory == 2.0  # Eq. 3
    assert (fresh.unused_fraction, uniform.unused_fraction) == (0.0, pytest.approx(0.8**10))
    four = shipped("paper_7b", "updates.per_iteration=4", "updates.batch_size=512").replay
    assert four.uses_per_trajectory == 2.5


def test_the_buffer_on_disk_holds_what_kept_checkpoints_need() -> None:
    row_bytes = 4096 * 8
    never = shipped("paper_7b", "checkpoint.interval=never").replay.disk_bytes
    assert never == (5120 + 1024) * row_bytes
    assert shipped("paper_7b").replay.disk_bytes == never + 2 * 50 * 1024 * row_bytes
    assert shipped("paper_7b", "run.num_iterations=3").replay.disk_bytes == 3 * 1024 * row_bytes


def test_tokens_take_the_space_that_the_plan_says(tmp_path: Path) -> None:
    """Of random ids of a vocabulary of 152,064, which compress least."""
    rng = np.random.default_rng(0)
    group = [trajectory(rng, index, prompt_length=40, response_length=960) for index in range(8)]
    writer = ShardWriter(tmp_path, writer="test", incarnation=0, tokenizer_hash="", template_hash="")
    path = tmp_path / SHARDS / writer.write(group)
    assert 0.6 < path.stat().st_size / (8 * 1000 * TOKEN_BYTES_ON_DISK) < 1.0
    shard = read_shard(path)
    in_memory = shard.tokens.nbytes + shard.loss_mask.nbytes + shard.rollout_logprobs.nbytes
    assert in_memory == 8 * 1000 * TOKEN_BYTES_IN_MEMORY


def trajectory(rng: np.random.Generator, index: int, *, prompt_length: int, response_length: int) -> Trajectory:
    return Trajectory(
        trajectory_id=f"0/prompt/{index}",
        prompt_id="prompt",
        group_id="0/prompt",
        sample_index=index,
        prompt_tokens=rng.integers(0, 152064, prompt_length, dtype=np.int32),
        response_tokens=rng.integers(0, 152064, response_length, dtype=np.int32),
        loss_mask=np.ones(response_length, np.bool_),
        rollout_logprobs=-rng.random(response_length, dtype=np.float32),
        version_spans=(VersionSpan(0, 0, response_length),),
        reward=1.0,
        group_reward_mean=1.0,
        group_reward_std=0.0,
        group_size=8,
        finish_reason="stop",
        verdict="correct",
        verifier_version="1",
        answer="42",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        collected_at=1.5,
    )


def test_micro_batches_are_those_that_the_trainer_packs() -> None:
    for overrides in ((), ("updates.max_tokens_per_micro_batch=20000", "updates.batch_size=1000")):
        schedule = shipped("paper_7b", *overrides).schedule
        limit, number = schedule.max_tokens_per_micro_batch, schedule.num_trajectories
        packed = plan_ranks(np.full(number, 4096), limit, 2)
        assert schedule.max_num_micro_batches == len(packed[0]) == len(packed[1])
        assert schedule.typical_num_micro_batches == len(plan_ranks(np.full(number, 2048), limit, 2)[0])


def test_bubble() -> None:
    overrides = ("parallel.pipeline_model_parallel_size=4", "updates.batch_size=48")
    schedule = shipped("paper_7b", *overrides, world_size=16).schedule
    assert schedule.typical_num_micro_batches == 12
    assert schedule.bubble == pytest.approx(3 / 15)


def test_the_run() -> None:
    plan = shipped("paper_7b")
    assert (plan.run.num_updates, plan.run.num_resets, plan.run.num_checkpoints) == (1300, 3, 13)
    assert plan.checkpoint.disk_bytes == 3 * plan.checkpoint.bytes_each
    ragged = shipped("paper_7b", "checkpoint.interval=400")
    assert (ragged.run.num_checkpoints, ragged.checkpoint.num_kept) == (2, 2)  # the second after the last iteration
    assert shipped("paper_7b", "checkpoint.interval=never").gpu.save_bytes == 0


def test_a_checkpoint_gathers_bucket_by_bucket_where_there_are_several() -> None:
    """At most 40 M parameters, and one more: the embedding's 136 M."""
    several, one = (shipped("paper_7b", f"parallel.overlap_grad_reduce={each}").gpu for each in ("true", "false"))
    assert one.num_bucket_parameters == one.num_parameters
    assert several.num_bucket_parameters == 40_000_000 + 152064 * 3584 // 4
    assert (several.save_bytes, one.save_bytes) == (6 * several.num_bucket_parameters, 6 * one.num_parameters)


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(("name", "world_size"), SHIPPED.items())
def test_every_shipped_config_has_a_plan(name: str, world_size: int) -> None:
    plan = shipped(name, world_size=world_size)
    text = render(plan)
    assert max(map(len, text.splitlines())) < 200
    assert plan.gpu.training_bytes < 72 * GIB  # of 80: the rest is for what is not counted
    if name == "qwen2_5_32b":
        assert [warning for warning in plan.warnings if "embedded engine" not in warning] == []
    else:
        assert plan.warnings == ()
        assert "nothing speaks against this plan" in text


def test_every_shipped_config_is_known_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(SHIPPED)


@pytest.mark.parametrize(
    ("overrides", "options", "says"),
    [
        (["updates.max_tokens_per_micro_batch=65536"], {}, "training alone takes"),
        ([], {"gpu_memory_gib": 40.0}, "embedded engine's weights do not fit"),
        (["rollout.max_batch_size=1024"], {}, "lower rollout.max_batch_size"),
        (["parallel.pipeline_model_parallel_size=4", "updates.batch_size=20"], {"world_size": 16}, "wait 38%"),
        (["parallel.pipeline_model_parallel_size=4", "updates.batch_size=8"], {"world_size": 16}, "fewer than the 4"),
        (["rollout.max_response_tokens=7168", "rollout.max_batch_size=32"], {}, "more than the model's 4096 positions"),
        (["replay.capacity=1500"], {}, "hardly replay"),
        (["reference.reset_interval=700"], {}, "the run ends before"),
    ],
)
def test_warnings(overrides: list[str], options: dict[str, Any], says: str) -> None:
    (warning,) = shipped("paper_7b", *overrides, **options).warnings
    assert says in warning
    assert f"WARNING: {warning}" in render(shipped("paper_7b", *overrides, **options))


@pytest.mark.parametrize(
    ("overrides", "world_size", "path", "says"),
    [
        (["parallel.tensor_model_parallel_size=8"], 8, "parallel.tensor_model_parallel_size", "give one of 1, 2, 4"),
        (
            ["parallel.pipeline_model_parallel_size=3"],
            12,
            "parallel.pipeline_model_parallel_size",
            "1, 2, 4, 7, 14, 28",
        ),
        ([], 6, "parallel.*_size", "one of 1, 2, 3, 6"),
    ],
)
def test_layouts_that_the_model_cannot_have(overrides: list[str], world_size: int, path: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        shipped("paper_7b", *overrides, world_size=world_size)
    (problem,) = error.value.problems
    assert problem.path == path
    assert says in problem.remedy


def test_by_default_one_copy_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "qwen2_5_32b.toml"
    assert make_plan(load(path), path).world.num_processes == 16
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "processes\n  in all                                 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry-run", "--world-size", "0"], "--world-size = 0: no number of processes"),
        (["--dry-run", "--gpu-memory-gib", "0"], "--gpu-memory-gib = 0: no size"),
        (["--world-size", "8"], "--world-size: is for a plan; add --dry-run"),
        (["--gpu-memory-gib", "8"], "--gpu-memory-gib: is for a plan; add --dry-run"),
        (["model.hf_path=models/absent", "--dry-run"], "architectures/absent.json"),
        (["--dry-run", "--world-size", "3"], "parallel.*_size"),
    ],
)
def test_what_a_plan_cannot_be_made_of(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(CONFIGS / "paper_7b.toml"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_model_that_is_there_is_read_itself(tmp_path: Path) -> None:
    model = save_qwen2(tmp_path)
    config = make_config(model)
    plan = planned(config)
    assert plan.architecture == model / "config.json"
    assert plan.spec == read_spec(model)
    assert "is not there" not in render(plan)
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json in it; give a directory in Hugging Face format$"):
        planned(config)


def test_a_plan_starts_without_torch_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from reval_mcore.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'megatron', 'pyarrow', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    command = [sys.executable, "-c", code, "train", str(CONFIGS / "paper_7b.toml"), "--dry-run"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "7,615,616,512" in done.stdout
    assert list(tmp_path.iterdir()) == []
