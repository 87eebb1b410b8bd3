"""The conversion tools: killed at random moments, without room, and a run that starts from what they made."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.conversion.sources import find_checkpoint
from reval_mcore.conversion.to_hf import convert_to_hf
from reval_mcore.conversion.to_mcore import convert_to_mcore
from reval_mcore.durable import crc32
from tests.builders import same_tensors, save_qwen2, source_tensors
from tests.forks import Fork, Forks
from tests.integration.test_train import SMALL, paths_of, reval
from tests.small_disk import SmallDisk

_NUM_KILLS = 2
_DEADLINE_S = 200.0


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB: converting takes long enough to be killed in the middle."""
    sizes: dict[str, Any] = {"vocab_size": 9000, "hidden_size": 512, "intermediate_size": 1024}
    return save_qwen2(tmp_path_factory.mktemp("conversion") / "hf", **sizes)


def convert(forks: Forks, tool: str, *arguments: str, status: int = 0) -> str:
    """What it printed."""
    done = forks.run(f"tools.{tool}", *arguments, timeout_s=_DEADLINE_S)
    assert done.returncode == status, done.stderr
    return done.stdout


def kill_within(process: Fork, progress: Path, stream: random.Random) -> None:
    """SIGKILL after its first part is on the disk, or a moment later."""
    deadline = time.monotonic() + _DEADLINE_S
    while process.poll() is None and not progress.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(stream.uniform(0.0, 0.3))
    process.kill()


def contents(directory: Path) -> dict[str, int]:
    """CRC32 of every file."""
    return {str(path.relative_to(directory)): crc32(path) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.timeout(900)  # a dozen processes; 60 s on a free machine
def test_killed_at_random_moments_both_tools_end_with_the_same_files(forks: Forks, hf: Path, tmp_path: Path) -> None:
    stream = random.Random(0)
    ways = (
        ("convert_hf_to_mcore", ("--hf", str(hf))),
        ("convert_mcore_to_hf", ("--checkpoint", str(tmp_path / "whole_mcore"), "--max-shard-bytes", "10000000")),
    )
    for tool, source in ways:
        kind = tool.rpartition("_")[2]
        whole, out = tmp_path / f"whole_{kind}", tmp_path / kind
        convert(forks, tool, *source, "--out", str(whole))
        for _ in range(_NUM_KILLS):
            process = forks.start(f"tools.{tool}", *source, "--out", str(out))
            kill_within(process, tmp_path / f".{kind}.converting" / "progress.jsonl", stream)
            if out.exists():  # it was faster: what is there is whole, see below
                break
        if not out.exists():
            convert(forks, tool, *source, "--out", str(out))
        assert contents(out) == contents(whole)
    assert same_tensors(source_tensors(tmp_path / "hf"), source_tensors(hf))


@pytest.mark.timeout(900)
def test_a_run_starts_from_a_converted_model_and_its_policy_comes_back_out(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    """The same run as from the HF directory, which the converted one stands in for altogether."""
    converted = tmp_path / "converted"
    said = convert(forks, "convert_hf_to_mcore", "--hf", str(tiny_model), "--out", str(converted), "--verify")
    assert "tensors: 0 of" in said
    assert not list(converted.rglob("*.safetensors"))
    metrics = []
    short = (*SMALL, "run.num_iterations=2", "logging.tensorboard=false")
    for name, model in (
        ("from_hf", ()),
        ("from_mcore", (f"model.hf_path={converted}", f"model.checkpoint={converted}")),
    ):
        done = reval(forks, "train", "configs/demo.toml", *paths_of(tiny_model, tmp_path / name), *short, *model)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        metrics.append([{k: v for k, v in line.items() if "seconds" not in k and k != "time"} for line in lines])
    assert metrics[0] == metrics[1]
    run, out = tmp_path / "from_mcore", tmp_path / "out"
    said = convert(forks, "convert_mcore_to_hf", "--checkpoint", str(run), "--out", str(out), "--verify")
    assert "tensors: 0 of" in said
    assert "all the same" in convert(forks, "inspect_checkpoint", str(run), str(out))
    assert "tensors differ" in convert(forks, "inspect_checkpoint", str(tiny_model), str(out), status=1)
    assert "iteration 2, " in convert(forks, "inspect_checkpoint", str(run))


def on_a_full_disk(disk: Path) -> dict[str, Any]:
    hf = save_qwen2(disk.parent / "full_hf", hidden_size=128, intermediate_size=256, vocab_size=2000)
    told = {}
    convert_to_mcore(hf, disk.parent / "full_mcore")
    ways: dict[str, Callable[[Path], None]] = {
        "mcore": lambda out: convert_to_mcore(hf, out),
        "hf": lambda out: convert_to_hf(find_checkpoint(disk.parent / "full_mcore"), out, max_shard_bytes=600_000),
    }
    for name, convert in ways.items():
        with pytest.raises(OSError) as caught:
            convert(disk / name)
        told[name] = [caught.value.errno, str(caught.value), (disk / name).exists()]
    return told


def test_a_full_disk_is_named_and_nothing_is_published(small_disk: SmallDisk) -> None:
    told = small_disk.call(on_a_full_disk, size_kb=1024, timeout_s=100)
    for name, (number, message, is_published) in told.items():
        assert number == 28, message
        assert name in message
        assert not is_published
