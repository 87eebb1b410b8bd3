"""`reval replay` on a real replay directory: what it tells, what it finds, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from reval_mcore.cli import main
from reval_mcore.records import Trajectory, VersionSpan
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.shards import ShardWriter


def make_group(name: str, *, version: int) -> list[Trajectory]:
    """Two members; the second is right."""
    rng = np.random.default_rng(list(name.encode()))
    return [
        Trajectory(
            trajectory_id=f"{name}-{index}",
            prompt_id=name,
            group_id=name,
            sample_index=index,
            prompt_tokens=np.array([7, 8, 9], np.int32),
            response_tokens=rng.integers(0, 99, 4 + index, dtype=np.int32),
            loss_mask=np.ones(4 + index, bool),
            rollout_logprobs=np.full(4 + index, -np.inf if version == 3 else -0.5, np.float32),
            version_spans=(VersionSpan(version, 0, 2), VersionSpan(version + 1, 2, 4 + index)),
            reward=float(index),
            group_reward_mean=0.5,
            group_reward_std=0.5,
            group_size=2,
            finish_reason="stop",
            verdict="correct" if index else "wrong",
            verifier_version="1",
            answer=str(index),
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            collected_at=1.5,
        )
        for index in range(2)
    ]


@pytest.fixture
def replay(tmp_path: Path) -> Path:
    """Ten trajectories of five shards, of which rows 4 to 9 are live; a sixth shard is pending."""
    directory = tmp_path / "replay"
    writer = ShardWriter(directory, writer="w", incarnation=0, tokenizer_hash="t", template_hash="t")
    for index in range(5):
        writer.write(make_group(f"g{index}", version=index))
    ReplayBuffer(directory, capacity=6, seed=0).admit()
    writer.write(make_group("late", version=5))
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["replay", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    return err


def test_stats(replay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(replay)
    status, out, _ = run(capsys, "stats", replay, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["live trajectories"] == 6
    assert found["rows"] == "4 to 9"
    assert found["shards"] == {"live": 3, "evicted, on disk": 2, "pending": 1, "quarantined": 0}
    assert found["policy versions"] == "2 to 4"
    assert found["reward mean"] == 0.5
    assert found["verdicts"] == {"correct": 3, "wrong": 3}
    assert found["response tokens"] == {"mean": 4.5, "max": 5}
    assert run(capsys, "stats", replay)[1].startswith("directory")
    assert tree(replay) == before


def test_verify_finds_all_kinds_of_damage_and_mends_nothing(replay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", replay)
    assert (status, out.split(": ")[-1]) == (0, "no damage\n")
    shards = replay / "shards"
    body, footer, pending = (shards / f"w-0000-{number:06d}.parquet" for number in (2, 3, 5))
    for path, place in ((body, 200), (footer, footer.read_bytes().rindex(b"parquet-cpp-arrow")), (pending, 200)):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
    (shards / "w-0000-000004.parquet").unlink()
    (shards / "w-0000-000000.parquet").unlink()  # evicted
    (replay / "quarantine" / "stray").touch()
    with (replay / "journal.jsonl").open("ab") as file:
        file.write(b'{"event": "adm')
    before = tree(replay)
    status, out, _ = run(capsys, "verify", replay)
    assert status == 1
    told = out.splitlines()
    assert [line.split(": ")[0].split("/")[-1] for line in told[:5]] == [
        "w-0000-000004.parquet",
        "w-0000-000002.parquet",
        "w-0000-000003.parquet",
        "w-0000-000005.parquet",
        "stray",
    ]
    assert "missing, and the journal says that it is live" in told[0]
    assert "damaged: " in told[1]
    assert "CRC32" in told[2]
    assert "damaged: " in told[3]
    assert "torn line" in told[5]
    assert told[-1].endswith("5 damaged or missing")
    assert tree(replay) == before


@pytest.mark.parametrize("name", ["g3-1", "7"])
def test_show_by_id_and_by_row(replay: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = run(capsys, "show", replay, name, "--tokens")
    assert status == 0
    tokens = " ".join(map(str, make_group("g3", version=3)[1].response_tokens))
    assert f"--- prompt, 3 tokens\n7 8 9\n--- response, 5 tokens\n{tokens}\n" in out
    told = {line[:22].strip(): line[23:] for line in out.splitlines() if len(line) > 23}
    assert told["trajectory_id"] == "g3-1"
    assert told["reward"] == "1.0"
    assert told["verdict"] == "correct"
    assert told["policy versions"] == "3 (tokens 0 to 1), 4 (tokens 2 to 4)"
    assert told["admitted"].startswith("at journal position")
    assert told["state"] == "live"
    assert told["row"] == "7"


def test_show_of_what_is_evicted_pending_and_nowhere(replay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evicted: rows from 4 on are live" in run(capsys, "show", replay, "g0-0", "--tokens")[1]
    assert "not admitted yet" in run(capsys, "show", replay, "late-1", "--tokens")[1]
    assert "nobody: no such trajectory on disk" in fails(capsys, "show", replay, "nobody", "--tokens")
    assert "not in a run directory" in fails(capsys, "show", replay, "g3-1")


SELECTIONS: dict[str, tuple[Sequence[str], list[str]]] = {
    "all": ((), [f"g{group}-{index}" for group in (2, 3, 4) for index in (0, 1)]),
    "verdict": (("--verdict", "correct"), ["g2-1", "g3-1", "g4-1"]),
    "reward and version": (("--max-reward", "0.5", "--min-version", "3"), ["g3-0", "g4-0"]),
    "prompts": (("--prompt-id", "g2", "--prompt-id", "g4", "--min-reward", "1"), ["g2-1", "g4-1"]),
    "newest": (("--limit", "3"), ["g3-1", "g4-0", "g4-1"]),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_export(replay: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    filters, expected = SELECTIONS[name]
    out = tmp_path / f"out.{kind}"
    assert run(capsys, "export", replay, "--out", out, *filters)[:2] == (0, f"{out}: {len(expected)} trajectories\n")
    if kind == "jsonl":
        records = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        records = pq.read_table(out).to_pylist()
        assert duckdb.execute(f"select count(*) from '{out}'").fetchall() == [(len(expected),)]
    assert [record["trajectory_id"] for record in records] == expected
    written = {t.trajectory_id: t for group in range(5) for t in make_group(f"g{group}", version=group)}
    for record in records:
        assert record["response_tokens"] == written[record["trajectory_id"]].response_tokens.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "replay"]


def test_wrong_inputs(replay: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.jsonl"
    there.touch()
    assert "no replay buffer in it; give a run directory" in fails(capsys, "stats", tmp_path / "nothing")
    assert "ends in .parquet or .jsonl" in fails(capsys, "export", replay, "--out", tmp_path / "x.csv")
    assert "is there already" in fails(capsys, "export", replay, "--out", there)
    assert "--limit 0" in fails(capsys, "export", replay, "--out", tmp_path / "x.jsonl", "--limit", 0)
    nothing = fails(capsys, "export", replay, "--out", tmp_path / "x.jsonl", "--verdict", "perfect")
    assert "no live trajectory is selected; nothing is written" in nothing
    path = replay / "shards" / "w-0000-000003.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    damaged = fails(capsys, "export", replay, "--out", tmp_path / "x.jsonl")
    assert path.name in damaged
    assert "reval replay verify" in damaged
    assert not (tmp_path / "x.jsonl").exists()


def test_an_id_that_came_back_is_shown_as_it_is_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = ShardWriter(tmp_path, writer="w", incarnation=0, tokenizer_hash="t", template_hash="t")
    buffer = ReplayBuffer(tmp_path, capacity=2, seed=0)
    for version, answer in ((0, "old"), (1, "between"), (2, "new")):
        name = "a" if answer != "between" else "b"
        writer.write([replace(each, answer=answer) for each in make_group(name, version=version)])
        buffer.admit()
    assert "new" in run(capsys, "show", tmp_path, "a-0", "--tokens")[1]
