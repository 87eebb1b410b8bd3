"""The whole loop on real parts, through the `reval` command: megatron-core, transformers, verifier pool, Parquet."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from reval_mcore.cli import main
from reval_mcore.config import load
from reval_mcore.plan import make_plan
from reval_mcore.plan.traffic import TOKEN_BYTES_ON_DISK
from reval_mcore.replay.shards import read_trajectories
from tests.forks import ROOT, Fork, Forks

SMALL = (
    "run.num_iterations=4",
    "rollout.num_prompts=4",
    "rollout.num_responses=4",
    "replay.capacity=40",
    "replay.unlink_delay_s=0",
    "updates.batch_size=16",
    "updates.per_iteration=2",
    "reference.reset_interval=3",
    "evaluation.interval=2",
    "evaluation.max_prompts=8",
    "checkpoint.interval=2",
)


def reval(forks: Forks, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forks.run("reval_mcore.cli", *arguments, timeout_s=240.0)


@contextlib.contextmanager
def watched(forks: Forks, *arguments: str) -> Iterator[tuple[Fork, IO[str]]]:
    """`reval ARGUMENTS` and what it prints, as it goes."""
    reader, writer = os.pipe()
    with open(reader) as lines:
        with open(writer, "wb") as out:
            process = forks.start("reval_mcore.cli", *arguments, stdout=out)
        try:
            yield process, lines
        finally:
            process.kill()


def paths_of(tiny_model: Path, run: Path) -> tuple[str, ...]:
    return (
        f"run.directory={run}",
        f"model.hf_path={tiny_model}",
        f"prompts.train={tiny_model}/prompts/train.jsonl",
        f"prompts.held_out={tiny_model}/prompts/held_out.jsonl",
    )


def train(forks: Forks, tiny_model: Path, run: Path, *overrides: str) -> dict[str, Any]:
    done = reval(forks, "train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL, *overrides)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is a time."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "time" and not k.startswith("seconds/")} for record in records]


@pytest.fixture(scope="module")
def finished(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "small"
    train(forks, tiny_model, run, "checkpoint.keep=1")
    return run


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    counts = {key: summary[key] for key in ("iterations", "trajectories_generated", "updates", "reference_resets")}
    assert counts == {"iterations": 4, "trajectories_generated": 64, "updates": 8, "reference_resets": 1}
    assert {"collect", "score", "update", "evaluate"} <= set(summary["seconds"])
    assert (finished / "config.toml").is_file()
    assert list((finished / "tensorboard").iterdir())
    assert "torch.optim.adamw.AdamW" in (finished / "logs" / "attempt_000" / "rank_000.log").read_text()
    records = metrics(finished)
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert records[-1]["replay/size"] == 40
    assert records[-1]["progress/reference_age"] == 1


def test_engine_and_learner_agree_on_every_fresh_token(finished: Path) -> None:
    assert max(record["mismatch/logprob_abs_max"] for record in metrics(finished)) < 1e-4


def test_shards_hold_whole_groups_under_the_versions_that_made_them(finished: Path) -> None:
    shards = sorted((finished / "replay" / "shards").glob("*.parquet"))
    for path in shards:
        trajectories = read_trajectories(path)
        iteration = int(path.stem.rsplit("-", 1)[1])
        assert len(trajectories) == 16
        assert {t.policy_version for t in trajectories} == {iteration}
        for start in range(0, 16, 4):
            group = trajectories[start : start + 4]
            assert len({t.group_id for t in group}) == 1
            assert group[0].group_reward_mean == pytest.approx(np.mean([t.reward for t in group]))


def test_shards_that_no_kept_checkpoint_needs_are_removed(finished: Path) -> None:
    """At the last checkpoint, the only one kept, rows 24 to 63 live, so the shard of rows 0 to 15 is not needed."""
    kept = sorted(path.stem for path in (finished / "replay" / "shards").iterdir())
    assert [name[-1] for name in kept] == ["1", "2", "3"]
    assert [path.name for path in (finished / "checkpoints").glob("step_*")] == ["step_000004"]


def test_the_buffer_of_a_run_can_be_looked_into(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoded by the run's own tokenizer, with what its last checkpoint noted."""
    assert main(["replay", "stats", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["live trajectories"] == 40
    assert found["reuse, by checkpoint"] == "step_000004"
    assert found["replay ratio"] == pytest.approx(metrics(finished)[-1]["replay/replay_ratio"], abs=1e-3)
    assert sum(found["times sampled"].values()) == 40
    assert main(["replay", "verify", str(finished)]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert main(["replay", "show", str(finished), "60"]) == 0
    shown = capsys.readouterr().out
    first = read_trajectories(max((finished / "replay" / "shards").iterdir()))[12]  # row 60 is place 12 of the last
    assert f"trajectory_id          {first.trajectory_id}" in shown
    assert "reference_version" in shown
    assert main(["replay", "export", str(finished), "--out", str(finished / "out.jsonl"), "--text"]) == 0
    (record,) = [
        each
        for each in map(json.loads, (finished / "out.jsonl").read_text().splitlines())
        if each["trajectory_id"] == first.trajectory_id
    ]
    (finished / "out.jsonl").unlink()
    assert f"tokens\n{record['prompt_text']}\n" in shown
    assert f"tokens\n{record['response_text']}\n" in shown


def test_the_plan_of_the_run_was_right(finished: Path) -> None:
    plan = make_plan(load(finished / "config.toml"), finished / "config.toml")
    summary = json.loads((finished / "summary.json").read_text())
    assert (plan.run.num_updates, plan.run.num_resets) == (summary["updates"], summary["reference_resets"])
    assert plan.iteration.num_trajectories * 4 == summary["trajectories_generated"]
    assert plan.gpu.num_parameters == summary["num_parameters"]
    weights = (finished / "checkpoints" / "latest" / "weights").iterdir()
    size = sum(path.stat().st_size for path in weights)
    assert plan.checkpoint.bytes_each == pytest.approx(size, rel=0.1)  # such small tensors have headers that count
    shards = (finished / "replay" / "shards").iterdir()
    lengths = [len(t.prompt_tokens) + len(t.response_tokens) for path in shards for t in read_trajectories(path)]
    assert sum(lengths) * TOKEN_BYTES_ON_DISK < plan.replay.disk_bytes


@pytest.mark.parametrize("refresh", ["eager", "lazy"])
def test_a_resumed_run_is_the_same_run(forks: Forks, tiny_model: Path, tmp_path: Path, refresh: str) -> None:
    """Stopped after iteration 4 was trained but before its checkpoint was published, and started again."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    refresh = f"reference.refresh={refresh}"
    train(forks, tiny_model, whole, refresh)
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step_000004")
    (again / "checkpoints" / "latest").unlink()
    (again / "checkpoints" / "latest").symlink_to("step_000002")
    train(forks, tiny_model, again, refresh)
    assert metrics(again) == metrics(whole)
    for name in ("replay.npz",):
        with np.load(whole / "checkpoints/latest" / name) as a, np.load(again / "checkpoints/latest" / name) as b:
            assert set(a) == set(b)
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, again)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("asking", ["SIGTERM", "SIGUSR1", "SIGINT", "a file"])
def test_asked_to_stop_it_finishes_the_iteration_saves_and_says_so(
    forks: Forks, tiny_model: Path, tmp_path: Path, finished: Path, asking: str
) -> None:
    run = tmp_path / "run"
    with watched(forks, "train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL) as (process, lines):
        assert any(line.startswith("[1/4]") for line in lines)
        if asking == "a file":
            (run / "control" / "stop").write_text(asking)
        else:
            process.send_signal(signal.Signals[asking])
        rest = "".join(lines)
        assert process.wait(timeout=60) == 0, rest
    exit_record = json.loads((run / "control" / "exit.json").read_text())
    assert exit_record["reason"] == asking
    assert 1 <= exit_record["iteration"] < 4
    assert (run / "checkpoints" / "latest").readlink().name == f"step_{exit_record['iteration']:06d}"
    train(forks, tiny_model, run)
    assert metrics(run) == metrics(finished)
    assert json.loads((run / "control" / "exit.json").read_text())["reason"] == "finished"


def test_the_second_ctrl_c_stops_at_once(forks: Forks, tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with watched(forks, "train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL) as (process, lines):
        for awaited in ("[1/4]", "SIGINT: stopping at the end of this iteration; Ctrl-C stops at once"):
            assert any(line.startswith(awaited) for line in lines)
            process.send_signal(signal.SIGINT)
        rest = "".join(lines)
        assert process.wait(timeout=60) == 128 + signal.SIGINT, rest
    assert rest.endswith("reval train: interrupted\n")
    assert "Traceback" not in rest
    assert json.loads((run / "control" / "exit.json").read_text())["error"].startswith("KeyboardInterrupt")


WITH_A_FAULT = """
import sys
from reval_mcore.cli import main
from reval_mcore.trainer import Trainer
def collect(self, iteration): raise RuntimeError("a fault of ours")
Trainer.collect = collect
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_of_ours_is_a_traceback_with_the_place_of_the_log(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = (sys.executable, "-c", WITH_A_FAULT, "train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    log = run / "logs" / "attempt_000" / "rank_000.log"
    told = done.stderr.replace("[rank0]: ", "")  # torch's, where it has process groups
    assert told.startswith("Traceback")
    assert told.endswith(f"RuntimeError: a fault of ours\nthe log of this attempt: {log}\n")
    assert "RuntimeError: a fault of ours" in log.read_text()
    record = json.loads((run / "control" / "exit.json").read_text())
    assert record == {"reason": "error", "error": "RuntimeError: a fault of ours"}


def test_debug_shows_where_an_error_of_the_user_arose(forks: Forks, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("train", "configs/demo.toml", *paths_of(tiny_model, tmp_path / "run"), "optimizer.lr=fast")
    plain, debug = reval(forks, *arguments), reval(forks, "--debug", *arguments)
    assert (plain.returncode, debug.returncode) == (2, 2)
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith(plain.stderr)


def test_a_checkpoint_with_a_flipped_bit_is_refused_by_file(
    forks: Forks, finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    path = run / "checkpoints" / "latest" / "weights" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    more = ("run.num_iterations=6", "checkpoint.keep=1")
    done = reval(forks, "train", "configs/demo.toml", *paths_of(tiny_model, run), *SMALL, *more)
    assert done.returncode == 2
    assert "step_000004: damaged (weights/__0_0.distcp); there is no older one" in done.stderr
    assert (run / "summary.json").is_file()  # a refused start leaves the run as it was


def test_a_checkpoint_evaluates_as_its_run_did(forks: Forks, finished: Path, tiny_model: Path) -> None:
    config = str(finished / "config.toml")
    after = json.loads((finished / "summary.json").read_text())
    for source, expected in ((("--checkpoint", str(finished / "checkpoints" / "latest")), "after"), ((), "before")):
        done = reval(forks, "eval", config, *source)
        assert done.returncode == 0, done.stderr
        shown = dict(line.split()[:2] for line in done.stdout.splitlines()[1:])
        assert float(shown["accuracy"]) == pytest.approx(after[f"accuracy_{expected}"], abs=1e-5)
        assert float(shown["greedy_accuracy"]) == pytest.approx(after[f"greedy_accuracy_{expected}"], abs=1e-5)


def test_an_exported_policy_is_what_the_run_trained(forks: Forks, finished: Path, tmp_path: Path) -> None:
    done = reval(forks, "export", str(finished), "--out", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    done = reval(forks, "eval", str(finished / "config.toml"), "--hf", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    shown = dict(line.split()[:2] for line in done.stdout.splitlines()[1:])
    after = json.loads((finished / "summary.json").read_text())
    assert float(shown["accuracy"]) == pytest.approx(after["accuracy_after"], abs=1e-5)


def test_the_curve_is_a_picture(forks: Forks, finished: Path) -> None:
    done = reval(forks, "report", str(finished))
    assert done.returncode == 0, done.stderr
    picture = Path(done.stdout.strip()).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
