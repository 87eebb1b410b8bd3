"""A disk that is full, wherever the run writes: one clear error, nothing torn, and afterwards the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reval_mcore.replay.journal import Journal
from reval_mcore.replay.loading import read_shard
from tests.integration import full_disk
from tests.integration.full_disk import Fault
from tests.small_disk import SmallDisk, reason_to_skip

SIZE_KB = 64 << 10
TIMEOUT_S = 240
NEVER = Fault("never")
SMALL = (
    "run.num_iterations=4",
    "rollout.num_prompts=4",
    "rollout.num_responses=4",
    "replay.capacity=40",
    "replay.unlink_delay_s=0",
    "replay.full_disk_patience_s=0",
    "updates.batch_size=16",
    "updates.per_iteration=2",
    "reference.reset_interval=3",
    "evaluation.interval=2",
    "evaluation.max_prompts=8",
    "checkpoint.interval=2",
)
MANY = (
    "run.num_iterations=24",
    "rollout.num_prompts=1",
    "rollout.num_responses=2",
    "replay.capacity=4",
    "replay.unlink_delay_s=0",
    "replay.full_disk_patience_s=0",
    "updates.batch_size=2",
    "updates.per_iteration=1",
    "evaluation.interval=24",
    "evaluation.max_prompts=1",
    "checkpoint.interval=10",
)
PARTS = (  # of a checkpoint, in the order in which they are written
    "config.toml",
    "inputs.json",
    "versions.json",
    "trainer.json",
    "replay.npz",
    "weights/common.pt",
    "weights/__0_0.distcp",
    "weights/.metadata",
    "weights/metadata.json",
    "manifest.json",
)
PARTS_WITH_NAMES = ("config.toml", "inputs.json", "versions.json", "trainer.json", "manifest.json")  # in the error
REMEDY = "; make room, then give the same command again"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)
    with SmallDisk(tmp_path_factory.mktemp("disk"), preload=["reval_mcore.assembly"]) as disk:
        yield disk


def command(disk: SmallDisk, tiny_model: Path, *overrides: str) -> list[str]:
    return [
        "train",
        "configs/demo.toml",
        f"run.directory={disk.mount_point}/run",
        f"model.hf_path={tiny_model}",
        f"prompts.train={tiny_model}/prompts/train.jsonl",
        f"prompts.held_out={tiny_model}/prompts/held_out.jsonl",
        *overrides,
    ]


def run(disk: SmallDisk, arguments: list[str], out: Path, *faults: Fault | None) -> list[int]:
    """See `full_disk.run`."""
    fields = [None if fault is None else asdict(fault) for fault in faults]
    out.mkdir(exist_ok=True)
    return disk.call(
        full_disk.run, size_kb=SIZE_KB, timeout_s=TIMEOUT_S, arguments=arguments, out=str(out), faults=fields
    )


@pytest.fixture(scope="module")
def undisturbed(disk: SmallDisk, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(disk, command(disk, tiny_model, *SMALL), out, None) == [0], (out / "0.err").read_text()
    return out / "0"


# ---------------------------------------------------------------- what must hold


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is a time."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "time" and not k.startswith("seconds/")} for record in found]


def arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "checkpoints" / "latest" / "replay.npz") as file:
        return dict(file)


def check_nothing_is_torn(run: Path) -> None:
    if (run / "metrics.jsonl").exists():
        records(run)
    for path in (run / "replay" / "shards").glob("*"):
        read_shard(path)
    journal = run / "replay" / "journal.jsonl"
    if journal.exists():
        before = journal.read_bytes()
        Journal(journal)
        assert before in (journal.read_bytes(), b"")  # there was no torn line to cut
    unfinished = [path for pattern in (".writing_*", ".*.tmp", "replay/tmp/*/*") for path in run.rglob(pattern)]
    assert unfinished == []
    for link in (run / "checkpoints").rglob("latest"):
        assert (link / "manifest.json").is_file()
    exit_record = run / "control" / "exit.json"
    assert not exit_record.exists() or json.loads(exit_record.read_text())["reason"] == "error"


def check_stopped(run: Path, status: int, named: str) -> None:
    """With one clear message, and the run whole."""
    told = run.with_suffix(".err").read_text()
    *before, message = told.splitlines() or [""]
    assert (status, message.partition(": ")[0]) == (2, "reval train"), told
    assert "Traceback" not in told, told
    assert not any(line.startswith("reval train") for line in before), told
    assert named in message
    assert REMEDY in message
    check_nothing_is_torn(run)


def check_same(run: Path, undisturbed: Path) -> None:
    assert records(run) == records(undisturbed)
    found, expected = arrays(run), arrays(undisturbed)
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert json.loads((run / "control" / "exit.json").read_text())["reason"] == "finished"


def check_story(out: Path, statuses: list[int], named: Sequence[str], undisturbed: Path) -> None:
    """Every attempt but the last stopped, with its message; the last one finished what is the undisturbed run."""
    wrong = []
    for number, name in enumerate(named):
        try:
            check_stopped(out / str(number), statuses[number], name)
        except AssertionError as error:
            wrong.append(f"attempt {number}, {name}: {error}")
    assert not wrong, "\n".join(wrong)
    last = out / str(len(named))
    assert statuses[-1] == 0, last.with_suffix(".err").read_text()
    check_same(last, undisturbed)


# ---------------------------------------------------------------- where it is full


def test_wherever_the_disk_is_full_the_run_stops_whole_and_goes_on_as_the_same_run(
    disk: SmallDisk, tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A run with more bad luck than any: one attempt a line."""
    story = [
        (Fault("start"), "run/config.toml: not written: No space left on device"),
        (Fault("start", leave_kb=4), "run/"),
        (Fault("start", leave_kb=8), "run/"),
        (Fault("collect", 2, leave_kb=4), "run/replay/shards/inline000-0000-000001.parquet: replay shard of"),
        (Fault("collect", 2, limit="replay/journal.jsonl"), "run/replay/shards/inline000-"),
        (Fault("checkpoint", 1, leave_kb=1024), "run/checkpoints/.writing_000002"),
        (Fault("weights", crossing="metrics.jsonl"), "run/metrics.jsonl: not written: No space left on device"),
        (Fault("admit", 1, limit="replay/journal.jsonl"), "run/replay/journal.jsonl: not written: File too large"),
        (Fault("checkpoint", 2), "run/summary.json: not written: No space left on device"),
        (Fault("start"), "run/config.toml: not written: No space left on device"),
    ]
    statuses = run(disk, command(disk, tiny_model, *SMALL), tmp_path, *(fault for fault, _ in story), None)
    check_story(tmp_path, statuses, [named for _, named in story], undisturbed)


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_checkpoint_that_finds_no_room_leaves_nothing(
    disk: SmallDisk, tiny_model: Path, undisturbed: Path, tmp_path: Path, async_save: str
) -> None:
    """One attempt for each of its files: room for those before, and for half of it. The first leaves step_000002."""
    whole = undisturbed / "checkpoints" / "step_000004"
    pages = [-(-(whole / name).stat().st_size // full_disk.PAGE) for name in PARTS]
    numbers = range(PARTS.index("weights/common.pt") if async_save == "true" else 0, len(PARTS))
    rooms = [4 * (sum(pages[:number]) + pages[number] // 2) for number in numbers]
    faults = [Fault("checkpoint", 2 if place == 0 else 1, leave_kb=room) for place, room in enumerate(rooms)]
    arguments = command(disk, tiny_model, *SMALL, f"checkpoint.async_save={async_save}")
    statuses = run(disk, arguments, tmp_path, *faults, NEVER)
    parts = [PARTS[number] for number in numbers]
    named = [f"/.writing_000004/{name}" if name in PARTS_WITH_NAMES else "/.writing_000004" for name in parts]
    check_story(tmp_path, statuses, named, undisturbed)


def test_a_background_writer_without_room_is_heard_of(
    disk: SmallDisk, tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """It fails while training goes on; and soon something in the foreground does."""
    arguments = command(disk, tiny_model, *SMALL, "checkpoint.async_save=true")
    statuses = run(disk, arguments, tmp_path, Fault("checkpoint", 1, leave_kb=1024), NEVER)
    check_story(tmp_path, statuses, ["/run/"], undisturbed)


def test_a_journal_line_that_finds_no_room_is_not_there(disk: SmallDisk, tiny_model: Path, tmp_path: Path) -> None:
    """Its lines are short: many iterations, before one is the first on a new page."""
    arguments = command(disk, tiny_model, *MANY)
    assert run(disk, arguments, tmp_path / "undisturbed", NEVER) == [0], (tmp_path / "undisturbed/0.err").read_text()
    out = tmp_path / "disturbed"
    statuses = run(disk, arguments, out, Fault("admit", crossing="replay/journal.jsonl"), NEVER)
    named = "run/replay/journal.jsonl: not written: No space left on device"
    check_story(out, statuses, [named], tmp_path / "undisturbed" / "0")


def test_training_goes_on_without_tensorboard(
    disk: SmallDisk, tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    (status,) = disk.call(
        full_disk.run_beside_a_full_tensorboard,
        size_kb=SIZE_KB,
        timeout_s=TIMEOUT_S,
        arguments=command(disk, tiny_model, *SMALL),
        out=str(tmp_path),
    )
    told = (tmp_path / "0.err").read_text()
    assert status == 0, told
    warning = "run/tensorboard: not written: No space left on device; the run goes on without TensorBoard"
    assert [warning in line for line in told.splitlines()] == [True]
    check_same(tmp_path / "0", undisturbed)
