"""A run directory holds one run, and only what was published counts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from reval_mcore.config import ConfigError, load
from reval_mcore.run_directory import RunDirectory, read_trainer_state
from tests.builders import make_config


def publish(directory: RunDirectory, iteration: int, *, keep: int = 2) -> Path:
    written = directory.begin_checkpoint(iteration)
    (written / "trainer.json").write_text(json.dumps({"iteration": iteration}))
    return directory.publish_checkpoint(written, keep=keep)


def test_the_resolved_configuration_is_kept_and_loads_again(tmp_path: Path) -> None:
    config = make_config(tmp_path / "model")
    assert RunDirectory(tmp_path / "run").open(config, inputs={}) is None
    assert load(tmp_path / "run" / "config.toml") == config


def test_latest_is_the_last_published_and_old_ones_go(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    for iteration in (2, 4, 6):
        publish(directory, iteration)
    assert [path.name for path in directory.kept_checkpoints()] == ["step_000004", "step_000006"]
    latest = directory.latest_checkpoint()
    assert latest is not None
    assert read_trainer_state(latest) == {"iteration": 6}


def test_an_unpublished_checkpoint_does_not_count_and_is_swept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    directory.begin_checkpoint(4)
    assert directory.open(make_config(tmp_path), inputs={}) == tmp_path / "checkpoints" / "step_000002"
    assert not list(directory.checkpoints.glob(".writing_*"))


def test_a_checkpoint_that_latest_does_not_reach_does_not_count(tmp_path: Path) -> None:
    """A crash between the two renames leaves one. It must neither be resumed from nor push out the one that counts."""
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    publish(directory, 6)
    (directory.checkpoints / "latest").unlink()
    (directory.checkpoints / "latest").symlink_to("step_000002")
    assert directory.open(make_config(tmp_path), inputs={}) == directory.checkpoints / "step_000002"
    assert [path.name for path in directory.kept_checkpoints()] == ["step_000002"]
    publish(directory, 4, keep=1)
    assert [path.name for path in directory.kept_checkpoints()] == ["step_000004"]
    assert directory.latest_checkpoint() == directory.checkpoints / "step_000004"


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    RunDirectory(tmp_path).open(make_config(tmp_path), inputs={})  # closes its lock when it is collected
    first = RunDirectory(tmp_path)
    first.open(make_config(tmp_path), inputs={})
    with pytest.raises(ValueError, match="another process trains here"):
        RunDirectory(tmp_path).open(make_config(tmp_path), inputs={})


def test_what_an_earlier_attempt_said_of_its_end_is_taken_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    for path in (directory.summary, directory.exit_record):
        path.write_text("{}")
    directory.open(make_config(tmp_path), inputs={})
    assert not directory.summary.exists()
    assert not directory.exit_record.exists()


def test_a_run_that_finished_no_iteration_starts_from_an_empty_buffer(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    (directory.replay / "shards").mkdir(parents=True)
    (directory.replay / "journal.jsonl").write_text("something")
    assert directory.open(make_config(tmp_path), inputs={}) is None
    assert not directory.replay.exists()


def test_a_run_without_a_checkpoint_is_not_run_over(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    directory.metrics.write_text('{"iteration": 0}\n')
    with pytest.raises(ValueError, match="holds a run without a checkpoint; remove it"):
        directory.open(make_config(tmp_path), inputs={})


def test_metrics_are_cut_at_the_checkpoint_and_a_torn_line_goes(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.metrics.write_text("".join(f'{{"iteration": {i}}}\n' for i in range(5)) + '{"iterat')
    directory.cut_metrics(3)
    assert [json.loads(line)["iteration"] for line in directory.metrics.read_text().splitlines()] == [0, 1, 2]


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a checkpoint of a run"):
        read_trainer_state(tmp_path)


def test_a_resume_that_would_learn_something_else_is_refused_field_by_field(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    other = make_config(tmp_path, objective={"beta": 0.25}, run={"seed": 5}, optimizer={"lr": 2e-3})
    with pytest.raises(ConfigError) as refused:
        directory.open(other, inputs={})
    assert {problem.path for problem in refused.value.problems} == {"objective.beta", "run.seed"}
    assert "the run was made with 0.5" in str(refused.value)
    assert "--allow-changed objective.beta" in str(refused.value)
    assert load(tmp_path / "config.toml") == make_config(tmp_path)


def test_other_changes_are_accepted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    other = make_config(tmp_path, objective={"beta": 0.25}, optimizer={"lr": 2e-3})
    assert directory.open(other, inputs={}, allow_changed=["objective.beta"]) is not None
    assert "optimizer.lr: 0.001 -> 0.002" in caplog.text
    assert "objective.beta: 0.5 -> 0.25" in caplog.text
    assert load(tmp_path / "config.toml") == other


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_flipped_bit, Path.unlink])
def test_a_damaged_checkpoint_is_refused_by_file_and_the_one_before_it_offered(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    damage(publish(directory, 4) / "trainer.json")
    with pytest.raises(ValueError, match=r"step_000004: damaged \(trainer\.json\)") as refused:
        directory.open(make_config(tmp_path), inputs={})
    _, command = str(refused.value).split("go on from the one before it: ")
    subprocess.run(command.split(), check=True)
    assert directory.open(make_config(tmp_path), inputs={}) == directory.checkpoints / "step_000002"


def test_other_contents_behind_the_same_setting_are_refused(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    before = {"prompts.train": "1", "model.hf_path": "2"}
    directory.open(make_config(tmp_path), inputs=before)
    publish(directory, 2)
    now = {"prompts.train": "1", "model.hf_path": "3"}
    with pytest.raises(ValueError, match=r"other contents than when this run began, behind model\.hf_path;"):
        directory.open(make_config(tmp_path), inputs=now)
    directory.open(make_config(tmp_path), inputs=now, allow_changed=["model.hf_path"])
    directory.open(make_config(tmp_path), inputs=now)
