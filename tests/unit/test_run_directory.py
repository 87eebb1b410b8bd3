"""A run directory holds one run, and only what was published counts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from reval_mcore.config import ConfigError, load
from reval_mcore.run_directory import TRAINER_LOG, RunDirectory, read_trainer_state
from tests.builders import make_config


def publish(directory: RunDirectory, iteration: int, *, keep: int = 2) -> Path:
    written = directory.begin_checkpoint(iteration)
    (written / "trainer.json").write_text(json.dumps({"iteration": iteration}))
    (written / "weights" / "__0_0.distcp").write_bytes(bytes(range(100)))
    published = directory.publish_checkpoint(written, crc32s={})
    directory.remove_checkpoints(keep=keep)
    return published


def checkpoint_found(directory: RunDirectory) -> str:
    found = directory.open(make_config(directory.path), inputs={})
    assert found is not None
    return found.checkpoint.name


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
    assert checkpoint_found(directory) == "step_000002"
    assert not list(directory.checkpoints.glob(".writing_*"))


def test_a_checkpoint_that_latest_does_not_reach_does_not_count(tmp_path: Path) -> None:
    """A crash between the two renames leaves one. It must neither be resumed from nor push out the one that counts."""
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    publish(directory, 6)
    (directory.checkpoints / "latest").unlink()
    (directory.checkpoints / "latest").symlink_to("step_000002")
    assert checkpoint_found(directory) == "step_000002"
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
    directory.open(make_config(tmp_path), inputs={})
    (directory.replay / "shards").mkdir(parents=True)
    (directory.replay / "journal.jsonl").write_text("something")
    assert directory.open(make_config(tmp_path), inputs={}) is None
    assert not directory.replay.exists()


def test_a_run_that_keeps_no_checkpoints_is_not_run_over(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    directory.metrics.write_text('{"iteration": 0}\n')
    with pytest.raises(
        ValueError, match=r"holds a run that kept no checkpoints .* remove it, or give another directory"
    ):
        directory.open(make_config(tmp_path), inputs={})


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    config = make_config(tmp_path, checkpoint={"interval": 5})
    directory.open(config, inputs={})
    directory.metrics.write_text('{"iteration": 0}\n')
    (directory.replay / "shards").mkdir(parents=True)
    other = make_config(tmp_path, checkpoint={"interval": 5}, objective={"beta": 0.25})
    with pytest.raises(ConfigError, match=r"objective\.beta = 0\.25: the run was made with 0\.5"):
        directory.open(other, inputs={})
    assert directory.replay.exists()
    assert directory.open(config, inputs={}) is None
    assert not directory.replay.exists()


def test_metrics_are_cut_at_the_checkpoint_and_a_torn_line_goes(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.metrics.write_text("".join(f'{{"iteration": {i}}}\n' for i in range(5)) + '{"iterat')
    directory.cut_metrics(3)
    assert [json.loads(line)["iteration"] for line in directory.metrics.read_text().splitlines()] == [0, 1, 2]


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a checkpoint of a run"):
        read_trainer_state(tmp_path)


def test_everything_that_would_learn_something_else_is_refused_in_one_message(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={"prompts.train": "1", "model.hf_path": "2"})
    publish(directory, 2)
    other = make_config(tmp_path, objective={"beta": 0.25}, run={"seed": 5}, optimizer={"lr": 2e-3})
    with pytest.raises(ConfigError) as refused:
        directory.open(other, inputs={"prompts.train": "1", "model.hf_path": "3"})
    assert {problem.path for problem in refused.value.problems} == {"objective.beta", "run.seed", "model.hf_path"}
    assert "the run was made with 0.5" in str(refused.value)
    assert "--allow-changed objective.beta" in str(refused.value)
    assert "holds something else than when the run began" in str(refused.value)
    assert load(tmp_path / "config.toml") == make_config(tmp_path)


def test_accepted_changes_are_said_until_a_checkpoint_holds_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the last start decides what a run is, but the checkpoint: a start may have failed right after."""
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={"model.hf_path": "1"})
    publish(directory, 2)
    other = make_config(tmp_path, objective={"beta": 0.25}, optimizer={"lr": 2e-3})
    allow = ["objective.beta", "model.hf_path"]
    for _ in range(2):
        caplog.clear()
        found = directory.open(other, inputs={"model.hf_path": "2"}, allow_changed=allow)
        assert found is not None
        assert len(found.changes) == 3
        for change in ("optimizer.lr: 0.001 -> 0.002", "objective.beta: 0.5 -> 0.25", "model.hf_path: other contents"):
            assert change in caplog.text
        assert load(tmp_path / "config.toml") == other
    publish(directory, 4)
    found = directory.open(other, inputs={"model.hf_path": "2"})
    assert found is not None
    assert found.changes == ()


def test_a_run_that_once_had_other_settings_is_known_for_it(tmp_path: Path) -> None:
    """Back at the old settings, shards that were written under the others must not be taken for this run's."""
    directory = RunDirectory(tmp_path)
    config = make_config(tmp_path)
    directory.open(config, inputs={})
    publish(directory, 2)
    seen = []
    for each in (config, make_config(tmp_path, optimizer={"lr": 2e-3}), config):
        found = directory.open(each, inputs={})
        assert found is not None
        seen.append((bool(found.changes), found.had_other_settings))
    assert seen == [(False, False), (True, True), (False, True)]


def test_other_versions_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    written = directory.begin_checkpoint(2)
    text = (written / "versions.json").read_text()
    (written / "versions.json").write_text(json.dumps(json.loads(text) | {"torch": "2.6.0"}))
    directory.publish_checkpoint(written, crc32s={})
    assert checkpoint_found(directory) == "step_000002"
    assert "torch 2.6.0 -> " in caplog.text


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def damage_by_a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["trainer.json", "config.toml", "manifest.json", "weights/__0_0.distcp"])
@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_flipped_bit, Path.unlink])
def test_a_damaged_checkpoint_is_refused_by_file_and_the_one_before_it_offered(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config(tmp_path), inputs={})
    publish(directory, 2)
    damage(publish(directory, 4) / name)
    with pytest.raises(ValueError, match=rf"step_000004: damaged \({name}\)") as refused:
        directory.open(make_config(tmp_path), inputs={})
    _, command = str(refused.value).split("go on from the one before it: ")
    subprocess.run(command.split(), check=True)
    assert checkpoint_found(directory) == "step_000002"


def test_a_trainer_joins_the_attempt_that_a_launcher_has_begun(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    begun = directory.begin_attempt()  # a launcher's
    assert begun.name == "attempt_000"
    assert directory.join_attempt() == begun
    (begun / f"{TRAINER_LOG}000.log").touch()
    alone = directory.join_attempt()  # the next start, by hand
    assert alone.name == "attempt_001"
    assert (tmp_path / "logs" / "latest").resolve() == alone.resolve()
    (alone / f"{TRAINER_LOG}000.log").touch()
    assert directory.begin_attempt().name == "attempt_002"
    assert [path.name for path in sorted((tmp_path / "logs").iterdir())] == [
        *(f"attempt_{number:03d}" for number in range(3)),
        "latest",
    ]
