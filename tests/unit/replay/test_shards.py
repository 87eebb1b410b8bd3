from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from reval_mcore.records import FinishReason, Trajectory, VerdictReason, VersionSpan
from reval_mcore.replay import shards
from reval_mcore.replay.loading import LoadedShard, read_index, read_shard
from reval_mcore.replay.shards import (
    CorruptShardError,
    ShardName,
    ShardWriter,
    next_incarnation,
    read_trajectories,
)
from tests.small_disk import SmallDisk, fill

INT32 = np.iinfo(np.int32).max
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def make_writer(directory: Path, *, writer: str = "trainer", incarnation: int = 0) -> ShardWriter:
    return ShardWriter(
        directory, writer=writer, incarnation=incarnation, tokenizer_hash="tokenizer", template_hash="template"
    )


@st.composite
def trajectories(draw: st.DrawFn, group: int, index: int) -> Trajectory:
    length = draw(st.integers(1, 6))
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=3)) | {length})
    versions = draw(st.lists(st.integers(0, 2**40), min_size=len(cuts), max_size=len(cuts)))
    spans = zip(versions, [0, *cuts], cuts, strict=False)
    tokens = st.integers(0, INT32)
    return Trajectory(
        trajectory_id=f"{group}/{index}",
        prompt_id=draw(st.text(max_size=5)),
        group_id=str(group),
        sample_index=index,
        prompt_tokens=draw(npst.arrays(np.int32, st.integers(1, 5), elements=tokens)),
        response_tokens=draw(npst.arrays(np.int32, length, elements=tokens)),
        loss_mask=draw(npst.arrays(np.bool_, length)),
        rollout_logprobs=draw(npst.arrays(np.float32, length, elements=st.floats(width=32, allow_nan=False))),
        version_spans=tuple(VersionSpan(*span) for span in spans),
        reward=draw(float32s),
        group_reward_mean=draw(float32s),
        group_reward_std=draw(float32s),
        group_size=0,
        finish_reason=draw(st.sampled_from(get_args(FinishReason))),
        verdict=draw(st.sampled_from(get_args(VerdictReason))),
        verifier_version=draw(st.text(max_size=5)),
        answer=draw(st.text(max_size=10)),
        temperature=draw(float32s),
        top_p=draw(float32s),
        top_k=draw(st.integers(0, INT32)),
        collected_at=draw(st.floats(allow_nan=False)),
    )


@st.composite
def groups(draw: st.DrawFn) -> list[Trajectory]:
    """One to three groups; a group may have no member with a verdict, and so no size."""
    rows: list[Trajectory] = []
    for group in range(draw(st.integers(1, 3))):
        members = [draw(trajectories(group, index)) for index in range(draw(st.integers(1, 3)))]
        size = sum(member.verdict != "unverified" for member in members)
        rows += [replace(member, group_size=size) for member in members]
    return rows


def bits(value: object) -> object:
    """Something that is equal exactly where every bit is."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return np.float64(value).tobytes() if isinstance(value, float) else value


def assert_same(found: Sequence[Trajectory], expected: Sequence[Trajectory]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in fields(Trajectory):
            assert bits(getattr(one, field.name)) == bits(getattr(other, field.name)), field.name


def assert_packed(shard: LoadedShard, expected: Sequence[Trajectory]) -> None:
    """Each row of a loaded shard against its trajectory, by slices."""
    assert shard.trajectory_ids == tuple(t.trajectory_id for t in expected)
    for row, t in enumerate(expected):
        own = slice(shard.cu_seqlens[row], shard.cu_seqlens[row + 1])
        prompt = len(t.prompt_tokens)
        np.testing.assert_array_equal(shard.tokens[own], np.concatenate([t.prompt_tokens, t.response_tokens]))
        np.testing.assert_array_equal(shard.loss_mask[own], np.concatenate([np.zeros(prompt, bool), t.loss_mask]))
        assert shard.rollout_logprobs[own][prompt:].tobytes() == t.rollout_logprobs.tobytes()
        assert not shard.rollout_logprobs[own][:prompt].any()
        assert shard.rows[row].item() == (
            prompt + len(t.response_tokens),
            prompt,
            t.policy_version,
            t.reward,
            t.group_reward_mean,
            t.group_reward_std,
            t.verdict != "unverified",
            t.finish_reason,
        )


@settings(max_examples=25)
@given(groups(), st.data())
def test_round_trip_is_bit_for_bit(rows: list[Trajectory], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shards" / make_writer(Path(folder)).write(rows)
        assert_same(read_trajectories(path), rows)
        shard = read_shard(path)
        assert shard.file_crc32 == zlib.crc32(path.read_bytes())
    assert_packed(shard, rows)
    skipped = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    kept = [row for place, row in enumerate(rows) if place not in skipped]
    assert_packed(shard.without(tuple(skipped)), kept)


def test_metadata_and_columns(tmp_path: Path, make_group) -> None:
    rows = [*make_group("a", size=2, version=3), *make_group("b", size=3, version=7)]
    path = tmp_path / "shards" / make_writer(tmp_path, writer="node-1", incarnation=2).write(rows)
    assert path.name == "node-1-0002-000000.parquet"
    metadata = read_shard(path).metadata
    assert (metadata.writer, metadata.incarnation, metadata.seq) == ("node-1", 2, 0)
    assert (metadata.tokenizer_hash, metadata.template_hash) == ("tokenizer", "template")
    assert (metadata.num_trajectories, metadata.num_groups) == (5, 2)
    assert (metadata.min_policy_version, metadata.max_policy_version) == (3, 7)
    assert metadata.num_tokens == sum(len(row.prompt_tokens) + len(row.response_tokens) for row in rows)
    assert pq.read_schema(path).names == [field.name for field in fields(Trajectory)]


def test_duckdb_reads_a_shard(tmp_path: Path, make_group) -> None:
    rows = [*make_group("a", size=2, version=3), *make_group("b", size=4, version=5)]
    make_writer(tmp_path).write(rows)
    found = duckdb.execute(
        f"""select group_id, count(*), avg(reward), min(version_spans[1].version), sum(len(response_tokens))
        from '{tmp_path}/shards/*.parquet' group by group_id order by group_id"""
    ).fetchall()
    tokens = {name: sum(len(row.response_tokens) for row in rows if row.group_id == name) for name in "ab"}
    assert found == [("a", 2, 0.5, 3, tokens["a"]), ("b", 4, 0.5, 5, tokens["b"])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": np.ones(9, bool)}, "loss_mask has shape"),
        ({"rollout_logprobs": np.zeros(9, np.float32)}, "rollout_logprobs has shape"),
        ({"response_tokens": np.zeros(4, np.int64)}, "response_tokens is int64"),
        ({"prompt_tokens": np.zeros(0, np.int32)}, "prompt_tokens is empty"),
        ({"version_spans": ()}, "version_spans end at 0"),
        ({"version_spans": (VersionSpan(0, 1, 9),)}, "version_spans leave a gap"),
        ({"reward": float("nan")}, "not finite"),
        ({"verdict": "perhaps"}, "verdict 'perhaps'"),
        ({"trajectory_id": "a/1"}, "trajectory_id more than once"),
    ],
)
def test_writer_refuses_malformed_trajectories(tmp_path: Path, make_group, change: dict, message: str) -> None:
    first, second = make_group("a", size=2)
    with pytest.raises(AssertionError, match=message):
        make_writer(tmp_path).write([replace(first, **change), second])
    assert not list(tmp_path.rglob("*.parquet"))


def test_writer_refuses_half_a_group(tmp_path: Path, make_group) -> None:
    with pytest.raises(AssertionError, match="a group must be whole in one shard"):
        make_writer(tmp_path).write(make_group("a", size=4)[:3])


def test_names() -> None:
    name = ShardName("node-3.gpu_1", 12, 345)
    assert str(name) == "node-3.gpu_1-0012-000345.parquet"
    assert ShardName.parse(str(name)) == name
    for other in (
        "a-1-2.parquet",
        "a-00012-000001.parquet",
        ".nfs0001",
        "a-0001-000001.parquet.tmp",
        "-0001-000001.parquet",
    ):
        assert ShardName.parse(other) is None, other
    assert ShardName("a", 2, 0) > ShardName("a", 1, 999_999_999)


def test_writer_sweeps_only_its_own_leftovers(tmp_path: Path) -> None:
    make_writer(tmp_path)
    for name in ("a-0000/a-0000-000007.parquet", "a-b-0000/a-b-0000-000001.parquet", "other.txt"):
        (tmp_path / "tmp" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tmp" / name).touch()
    make_writer(tmp_path, writer="a", incarnation=3)
    assert sorted(os.listdir(tmp_path / "tmp")) == ["a-0003", "a-b-0000", "other.txt", "trainer-0000"]


@pytest.mark.parametrize("folder", ["shards", "quarantine"])
def test_an_incarnation_writes_once(tmp_path: Path, make_group, folder: str) -> None:
    name = make_writer(tmp_path, incarnation=1).write(make_group("a"))
    (tmp_path / "shards" / name).rename(tmp_path / folder / name)
    (tmp_path / "tmp" / "trainer-0001").rmdir()
    with pytest.raises(ValueError, match=rf"{name}: incarnation 1 .* a higher incarnation"):
        make_writer(tmp_path, incarnation=1)
    make_writer(tmp_path, incarnation=2)
    with pytest.raises(ValueError, match="incarnation 1 of writer 'trainer' is not new here"):
        make_writer(tmp_path, incarnation=1)


def test_two_writers_started_with_the_same_name(tmp_path: Path, make_group) -> None:
    """One of them gets it, however close they are; and one that a later start took the place of cannot write."""
    with ThreadPoolExecutor(8) as pool:
        starts = [pool.submit(make_writer, tmp_path) for _ in range(8)]
    writers = [start.result() for start in starts if start.exception() is None]
    assert len(writers) == 1
    assert {type(start.exception()) for start in starts} == {type(None), ValueError}
    writers[0].write(make_group("a"))
    later = make_writer(tmp_path, incarnation=next_incarnation(tmp_path))
    with pytest.raises(FileNotFoundError, match="trainer-0000-000001"):
        writers[0].write(make_group("b"))
    assert later.write(make_group("b")) == "trainer-0001-000000.parquet"
    assert len(os.listdir(tmp_path / "shards")) == 2


def test_a_rename_that_nfs_repeats_is_no_error(tmp_path: Path, make_group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that a local disk cannot show: the rename is done, and its repetition says that there is no such file."""
    rename = Path.rename

    def twice(self: Path, target: Path) -> Path:
        rename(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", twice)
    name = make_writer(tmp_path).write(make_group("a"))
    assert read_shard(tmp_path / "shards" / name).trajectory_ids == ("a/0",)


def test_a_bound_on_disk_is_kept_and_waited_for(
    tmp_path: Path, make_group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"tokenizer_hash": "t", "template_hash": "t", "max_disk_bytes": 40_000}
    writer = ShardWriter(tmp_path, writer="w", incarnation=0, **sizes)
    written: list[str] = []

    def write_until_full() -> None:
        for index in range(100):
            written.append(writer.write(make_group(f"g{index}", size=4)))

    with pytest.raises(OSError, match=r"has \d+ of at most 40000 bytes \(replay.max_disk_gib\); raise that") as caught:
        write_until_full()
    assert caught.value.errno == errno.EDQUOT
    assert len(written) >= 2
    assert shards.disk_usage_bytes(tmp_path) <= 40_000
    assert sorted(os.listdir(tmp_path / "shards")) == written
    patient = ShardWriter(tmp_path, writer="w", incarnation=1, full_disk_patience_s=30.0, **sizes)
    waits: list[float] = []

    def make_room(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / "shards" / written.pop()).unlink()

    monkeypatch.setattr(shards.time, "sleep", make_room)
    assert patient.write(make_group("late", size=4)) == "w-0001-000000.parquet"
    assert waits
    assert "trying again for 30 s" in caplog.text


def test_the_index_is_that_of_the_whole_shard(tmp_path: Path, make_group) -> None:
    path = tmp_path / "shards" / make_writer(tmp_path).write([*make_group("a", size=3, version=4), *make_group("b")])
    whole, index = read_shard(path), read_index(path)
    assert index.trajectory_ids == whole.trajectory_ids
    for name in index.rows.dtype.names or ():
        np.testing.assert_array_equal(index.rows[name], whole.rows[name])
    kept = index.without((1,))
    assert kept.trajectory_ids == ("a/0", "a/2", "b/0")
    assert kept.rows.tolist() == index.rows[[0, 2, 3]].tolist()


def write_until_full(disk: Path) -> dict[str, Any]:
    """A real disk that fills up; whoever waits on it goes on when there is room."""
    writer = make_writer(disk)
    ballast = fill(disk, leave_kb=200)
    written: list[str] = []
    told, tries = "", 0
    while not told:
        try:
            written.append(writer.write(simple_group(len(written))))
        except OSError as error:
            told = str(error)
        tries += 1
    left = [path.name for path in (disk / "tmp").rglob("*.parquet")]
    patient = ShardWriter(
        disk, writer="p", incarnation=0, tokenizer_hash="t", template_hash="t", full_disk_patience_s=60.0
    )
    threading.Timer(1.5, ballast.unlink).start()
    written.append(patient.write(simple_group(tries)))
    rows = [len(read_shard(disk / "shards" / name)) for name in written]
    return {"told": told, "left": left, "rows": rows, "shards": sorted(os.listdir(disk / "shards")) == sorted(written)}


def simple_group(index: int) -> list[Trajectory]:
    tokens = np.random.default_rng(index).integers(0, 50_000, 5000, dtype=np.int32)
    return [
        Trajectory(
            f"g{index}-0", f"g{index}", f"g{index}", 0, tokens[:5], tokens, np.ones(5000, bool),
            np.zeros(5000, np.float32), (VersionSpan(0, 0, 5000),), 1.0, 1.0, 0.0, 1, "stop", "correct", "1", "", 1.0,
            1.0, 0, 0.0,
        )
    ]  # fmt: skip


def test_a_full_disk_is_told_waited_for_and_leaves_nothing(small_disk: SmallDisk) -> None:
    found = small_disk.call(write_until_full, size_kb=600, timeout_s=120)
    assert "bytes not written: No space left on device" in found["told"]
    assert found["left"] == []
    assert len(found["rows"]) >= 3
    assert set(found["rows"]) == {1}
    assert found["shards"]


def test_disk_full_leaves_nothing_and_says_where(tmp_path: Path, make_group, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = make_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(OSError, match="not written: No space left") as caught:
            writer.write(make_group("a"))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "shards" / "trainer-0000-000000.parquet")
    assert not list(tmp_path.rglob("*.parquet"))
    assert writer.write(make_group("a")) == "trainer-0000-000001.parquet"


def test_no_flipped_bit_is_read(tmp_path: Path, make_group) -> None:
    """Bits that mean nothing to the data (statistics, encodings) may pass; then the data is what was written."""
    path = tmp_path / "shards" / make_writer(tmp_path).write(make_group("a", size=4))
    data, expected = path.read_bytes(), read_shard(path)
    refused = 0
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), size=250, replace=False).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            found = read_shard(path)
        except CorruptShardError:
            refused += 1
            continue
        assert found.file_crc32 != expected.file_crc32
        for field in fields(LoadedShard):
            if field.name != "file_crc32":
                assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), (bit, field.name)
    assert refused > 125


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_shard_is_corrupt(tmp_path: Path, make_group, keep: int) -> None:
    path = tmp_path / "shards" / make_writer(tmp_path).write(make_group("a", size=4))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptShardError):
        read_shard(path)


def rewrite_metadata(path: Path, **changes: object) -> None:
    """As another version of the program would have written it: checksums are right."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata or {})
    text = json.dumps(json.loads(metadata[b"reval_mcore.shard"]) | changes).encode()
    metadata |= {b"reval_mcore.shard": text, b"reval_mcore.shard.crc32": str(zlib.crc32(text)).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, write_page_checksum=True)


def test_unknown_schema_version_is_refused(tmp_path: Path, make_group) -> None:
    path = tmp_path / "shards" / make_writer(tmp_path).write(make_group("a"))
    rewrite_metadata(path, schema_version=99)
    with pytest.raises(ValueError, match=r"trainer-0000-000000.parquet: schema version 99, this program reads 1; read"):
        read_shard(path)


def test_a_foreign_table_is_corrupt(tmp_path: Path, make_group) -> None:
    path = tmp_path / "shards" / make_writer(tmp_path).write(make_group("a", size=2))
    table = pq.read_table(path)
    for changed in (table.drop_columns(["reward"]), table.slice(1), table.replace_schema_metadata({})):
        pq.write_table(changed, path)
        with pytest.raises(CorruptShardError):
            read_shard(path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("trajectory_id", "a/1", "a trajectory_id more than once"),
        ("reward", float("inf"), "not finite"),
        ("loss_mask", [True] * 9, "not as long as response_tokens"),
        ("prompt_tokens", [], "an empty prompt"),
        ("verdict", "perhaps", r"unknown verdict: \['perhaps'\]"),
    ],
)
def test_values_that_no_writer_writes_are_corrupt(
    tmp_path: Path, make_group, column: str, value: object, message: str
) -> None:
    path = tmp_path / "shards" / make_writer(tmp_path).write(make_group("a", size=2))
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    changed = pa.array([value, table[column][1].as_py()], table.schema.field(column).type)
    pq.write_table(table.set_column(place, table.schema.field(column), changed), path)
    with pytest.raises(CorruptShardError, match=message):
        read_shard(path)


def test_unreadable_is_not_corrupt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_shard(tmp_path / "absent.parquet")
