"""Replay shards: immutable Parquet files of whole groups, one row a trajectory.

    shards/<writer>-<incarnation>-<seq>.parquet   complete; a rename brings them here
    tmp/                                          unfinished writes, swept by their own writer
    quarantine/                                   shards that failed a check

Page checksums are written and verified, which catches any damage to the data; with only one of the two, flipped bits
are read silently. They do not cover the footer, so what matters is a column, the footer's own values carry a CRC32, and
the CRC32 of the whole file goes to the journal at admission. Files are read whole and never mapped: a mapped file that
another node unlinks or truncates kills the reader with SIGBUS.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reval_mcore.durable import fsync
from reval_mcore.records import FinishReason, Trajectory, VerdictReason, VersionSpan

SHARDS, TMP, QUARANTINE = "shards", "tmp", "quarantine"
SCHEMA_VERSION = 1
_METADATA_KEY, _METADATA_CRC_KEY = b"reval_mcore.shard", b"reval_mcore.shard.crc32"
_REWARDS = ("reward", "group_reward_mean", "group_reward_std")


def _list(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


_SPAN = pa.struct([pa.field(name, pa.int64(), nullable=False) for name in ("version", "start", "end")])
_COLUMNS: dict[str, pa.DataType] = {  # names and order of records.Trajectory
    "trajectory_id": pa.string(),
    "prompt_id": pa.string(),
    "group_id": pa.string(),
    "sample_index": pa.int16(),
    "prompt_tokens": _list(pa.int32()),
    "response_tokens": _list(pa.int32()),
    "loss_mask": _list(pa.bool_()),
    "rollout_logprobs": _list(pa.float32()),
    "version_spans": _list(_SPAN),
    "reward": pa.float32(),
    "group_reward_mean": pa.float32(),
    "group_reward_std": pa.float32(),
    "group_size": pa.int16(),
    "finish_reason": pa.string(),
    "verdict": pa.string(),
    "verifier_version": pa.string(),
    "answer": pa.string(),
    "temperature": pa.float32(),
    "top_p": pa.float32(),
    "top_k": pa.int32(),
    "collected_at": pa.float64(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])
_TOKEN_COLUMNS = {
    "prompt_tokens": np.int32,
    "response_tokens": np.int32,
    "loss_mask": np.bool_,
    "rollout_logprobs": np.float32,
}

ROW_DTYPE = np.dtype([
    ("length", np.int64),  # prompt plus response tokens
    ("prompt_length", np.int64),
    ("policy_version", np.int64),  # of the first response token
    ("reward", np.float32),
    ("group_reward_mean", np.float32),
    ("group_reward_std", np.float32),
    ("has_verdict", np.bool_),
    ("finish_reason", f"U{max(map(len, get_args(FinishReason)))}"),
])  # fmt: skip


class CorruptShardError(Exception):
    """The bytes of a shard are not what a shard writer wrote; says how. Failures to read them at all stay OSError."""


class ShardName(NamedTuple):
    """Who wrote a shard, and its place in that writer's order. Tuple order is the order of admission."""

    writer: str
    incarnation: int  # a new one at every start of the writer, so that no name is ever used twice
    seq: int  # from 0

    def __str__(self) -> str:
        return f"{self.writer}-{self.incarnation:04d}-{self.seq:06d}.parquet"

    @staticmethod
    def parse(name: str) -> ShardName | None:
        """None for the names of other files, such as .nfs* left-overs."""
        match = re.fullmatch(r"(\w[\w.-]*)-(\d{4,})-(\d{6,})\.parquet", name, re.ASCII)
        parsed = ShardName(match[1], int(match[2]), int(match[3])) if match else None
        return parsed if str(parsed) == name else None  # one spelling for each


@dataclass(frozen=True, slots=True)
class ShardMetadata:
    """What a shard's footer says about it, for people and tools; the columns are what counts."""

    schema_version: int
    writer: str
    incarnation: int
    seq: int
    tokenizer_hash: str
    template_hash: str
    num_trajectories: int
    num_groups: int
    num_tokens: int
    min_policy_version: int
    max_policy_version: int


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """A verified shard in memory, packed as in `records.Batch`: row i owns tokens[cu_seqlens[i]:cu_seqlens[i + 1]]."""

    name: str
    file_crc32: int  # of the bytes that the arrays came from
    metadata: ShardMetadata
    trajectory_ids: tuple[str, ...]  # [rows]
    rows: np.ndarray  # ROW_DTYPE [rows]
    cu_seqlens: np.ndarray  # int64 [rows + 1]
    tokens: np.ndarray  # int32 [T]: prompt then response of each trajectory
    loss_mask: np.ndarray  # bool [T]: False on prompts
    rollout_logprobs: np.ndarray  # float32 [T]: 0 on prompts

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, skipped: Sequence[int]) -> LoadedShard:
        """The same shard less the rows at these places; `metadata` goes on describing the file."""
        if not skipped:
            return self
        keep = np.ones(len(self), dtype=np.bool_)
        keep[list(skipped)] = False
        keep_token = np.repeat(keep, self.rows["length"])
        rows = self.rows[keep]
        return replace(
            self,
            trajectory_ids=tuple(itertools.compress(self.trajectory_ids, keep)),
            rows=rows,
            cu_seqlens=cumulative(rows["length"]),
            tokens=self.tokens[keep_token],
            loss_mask=self.loss_mask[keep_token],
            rollout_logprobs=self.rollout_logprobs[keep_token],
        )


def cumulative(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n ragged rows begins, and the total."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


# ---------------------------------------------------------------- writing


def _check_trajectory(trajectory: Trajectory) -> None:
    name, length = trajectory.trajectory_id, len(trajectory.response_tokens)
    for column, dtype in _TOKEN_COLUMNS.items():
        array = getattr(trajectory, column)
        expected = len(trajectory.prompt_tokens) if column == "prompt_tokens" else length
        assert array.dtype == dtype, f"{name}: {column} is {array.dtype}, not {np.dtype(dtype)}"
        assert array.shape == (expected,), f"{name}: {column} has shape {array.shape}, not {(expected,)}"
        assert expected >= 1, f"{name}: {column} is empty"
    ends = [0, *(span.end for span in trajectory.version_spans)]
    assert [span.start for span in trajectory.version_spans] == ends[:-1], f"{name}: version_spans leave a gap"
    assert ends == sorted(set(ends)), f"{name}: empty version span"
    assert ends[-1] == length, f"{name}: version_spans end at {ends[-1]} of {length} tokens"
    numbers = [getattr(trajectory, column) for column in _REWARDS]
    assert np.isfinite(np.array(numbers, dtype=np.float32)).all(), f"{name}: reward or statistics {numbers} not finite"
    assert trajectory.finish_reason in get_args(FinishReason), f"{name}: finish_reason {trajectory.finish_reason!r}"
    assert trajectory.verdict in get_args(VerdictReason), f"{name}: verdict {trajectory.verdict!r}"


def _check_groups(trajectories: Sequence[Trajectory]) -> None:
    assert trajectories, "a shard holds at least one trajectory"
    ids = Counter(trajectory.trajectory_id for trajectory in trajectories)
    assert len(ids) == len(trajectories), f"trajectory_id more than once: {ids.most_common(1)}"
    verified = Counter(trajectory.group_id for trajectory in trajectories if trajectory.verdict != "unverified")
    for trajectory in trajectories:
        assert trajectory.group_size == verified[trajectory.group_id], (
            f"group {trajectory.group_id}: group_size {trajectory.group_size}, but {verified[trajectory.group_id]} "
            f"members with a verdict here; a group must be whole in one shard"
        )


def _column(trajectories: Sequence[Trajectory], name: str) -> pa.Array:
    kind = SCHEMA.field(name).type
    values = [getattr(trajectory, name) for trajectory in trajectories]
    if name in _TOKEN_COLUMNS:  # end to end: token by token, as Python objects, is far slower
        offsets = cumulative(np.array([len(value) for value in values]))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(values)), type=kind)
    if name == "version_spans":
        values = [[{"version": s.version, "start": s.start, "end": s.end} for s in spans] for spans in values]
    return pa.array(values, kind)


def serialize(
    trajectories: Sequence[Trajectory], *, name: ShardName, tokenizer_hash: str, template_hash: str
) -> pa.Buffer:
    """The bytes of a shard. Rewards, group statistics, temperature and top_p are rounded to float32.

    The trajectories are checked by assert: unique ids, whole groups, types and lengths of arrays, spans that cover.
    """
    _check_groups(trajectories)
    for trajectory in trajectories:
        _check_trajectory(trajectory)
    versions = [span.version for trajectory in trajectories for span in trajectory.version_spans]
    metadata = ShardMetadata(
        schema_version=SCHEMA_VERSION,
        **name._asdict(),
        tokenizer_hash=tokenizer_hash,
        template_hash=template_hash,
        num_trajectories=len(trajectories),
        num_groups=len({t.group_id for t in trajectories}),
        num_tokens=sum(len(t.prompt_tokens) + len(t.response_tokens) for t in trajectories),
        min_policy_version=min(versions),
        max_policy_version=max(versions),
    )
    text = json.dumps(asdict(metadata)).encode()
    footer = {_METADATA_KEY: text, _METADATA_CRC_KEY: str(zlib.crc32(text)).encode()}
    columns = [_column(trajectories, column) for column in SCHEMA.names]
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(footer))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True)
    return sink.getvalue()


class ShardWriter:
    """Writes the shards of one collector. Each writer owns its names, so that any number of them need no lock."""

    def __init__(
        self, directory: Path, *, writer: str, incarnation: int, tokenizer_hash: str, template_hash: str
    ) -> None:
        """`directory` is the replay directory. Raises ValueError where shards of this incarnation exist already."""
        self._next = ShardName(writer, incarnation, 0)
        assert ShardName.parse(str(self._next)) == self._next, f"not usable in a file name: {writer!r}, {incarnation}"
        self._hashes = {"tokenizer_hash": tokenizer_hash, "template_hash": template_hash}
        self._shards, self._tmp = directory / SHARDS, directory / TMP
        for folder in (self._shards, self._tmp, directory / QUARANTINE):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                name = ShardName.parse(path.name)
                if name is None or name.writer != writer:
                    continue
                if folder == self._tmp:
                    path.unlink()
                elif name.incarnation == incarnation:
                    raise ValueError(
                        f"{path}: incarnation {incarnation} of writer {writer!r} has written here before; "
                        f"give every start of a writer a new incarnation"
                    )

    def write(self, trajectories: Sequence[Trajectory]) -> str:
        """Write one shard of whole groups and return its name; readers see all of it or nothing.

        Raises OSError with the errno of the failure (disk full, quota, I/O) and leaves nothing in tmp/. Writing the
        same trajectories again is safe then, under a new name: should the failed shard be visible after all, because
        only the fsync after its rename failed, admission skips trajectories that it has already.
        """
        name, self._next = self._next, self._next._replace(seq=self._next.seq + 1)
        data = serialize(trajectories, name=name, **self._hashes)
        tmp, final = self._tmp / str(name), self._shards / str(name)
        try:
            with tmp.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            tmp.rename(final)
            fsync(self._shards)
        except OSError as error:
            tmp.unlink(missing_ok=True)
            reason = f"replay shard of {data.size} bytes not written: {error.strerror}"
            raise OSError(error.errno, reason, str(final)) from error
        return str(name)


# ---------------------------------------------------------------- reading


def _parse_metadata(path: Path, footer: dict[bytes, bytes]) -> ShardMetadata:
    text = footer.get(_METADATA_KEY, b"")
    if footer.get(_METADATA_CRC_KEY) != str(zlib.crc32(text)).encode():
        raise CorruptShardError("metadata checksum verification failed")
    values = json.loads(text)
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema version {values['schema_version']}, this program reads {SCHEMA_VERSION}; "
            f"read it with the version of reval_mcore that wrote it, or move the file out of {path.parent}"
        )
    return ShardMetadata(**values)


def _read_table(path: Path, data: bytes) -> tuple[pa.Table, ShardMetadata]:
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            metadata = _parse_metadata(path, file.metadata.metadata or {})
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # from bytes in memory: the disk did not fail
        raise CorruptShardError(str(error)) from error
    if not table.schema.equals(SCHEMA) or len(table) != metadata.num_trajectories:
        raise CorruptShardError("columns or number of rows are not those of the schema and the metadata")
    return table, metadata


def _check_values(table: pa.Table, lengths: dict[str, np.ndarray]) -> None:
    """Checksums vouch for what was written; this is for what another program wrote wrongly."""
    if any((each < 1).any() for each in lengths.values()):
        raise CorruptShardError("an empty prompt, response or list of version spans")
    if any((lengths["response_tokens"] != lengths[name]).any() for name in ("loss_mask", "rollout_logprobs")):
        raise CorruptShardError("loss_mask or rollout_logprobs are not as long as response_tokens")
    if any(not np.isfinite(table[name].to_numpy()).all() for name in _REWARDS):
        raise CorruptShardError(f"not finite: one of {', '.join(_REWARDS)}")
    if len(set(table["trajectory_id"].to_pylist())) < len(table):
        raise CorruptShardError("a trajectory_id more than once")
    for name, known in (("finish_reason", FinishReason), ("verdict", VerdictReason)):
        if unknown := set(table[name].to_pylist()) - set(get_args(known)):
            raise CorruptShardError(f"unknown {name}: {sorted(unknown)}")


def read_shard(path: Path) -> LoadedShard:
    """Read a shard whole and verify it.

    Raises CorruptShardError where the bytes are damaged, ValueError where the schema version is unknown (every shard
    will be so: stop, do not quarantine), OSError where the file cannot be read.
    """
    data = path.read_bytes()
    table, metadata = _read_table(path, data)
    lists = {name: table[name].combine_chunks() for name in (*_TOKEN_COLUMNS, "version_spans")}
    lengths = {name: np.diff(array.offsets.to_numpy()).astype(np.int64) for name, array in lists.items()}
    _check_values(table, lengths)
    first_spans = cumulative(lengths["version_spans"])[:-1]
    rows = np.empty(len(table), dtype=ROW_DTYPE)
    rows["prompt_length"] = lengths["prompt_tokens"]
    rows["length"] = lengths["prompt_tokens"] + lengths["response_tokens"]
    rows["policy_version"] = lists["version_spans"].flatten().field("version").to_numpy()[first_spans]
    rows["has_verdict"] = np.array(table["verdict"].to_pylist()) != "unverified"
    rows["finish_reason"] = table["finish_reason"].to_pylist()
    for name in _REWARDS:
        rows[name] = table[name].to_numpy()

    cu_seqlens = cumulative(rows["length"])
    offset = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], rows["length"])
    in_response = offset >= np.repeat(rows["prompt_length"], rows["length"])

    def packed(name: str) -> np.ndarray:
        array = np.zeros(len(in_response), dtype=_TOKEN_COLUMNS[name])
        array[in_response] = lists[name].flatten().to_numpy(zero_copy_only=False)
        return array

    tokens = packed("response_tokens")
    tokens[~in_response] = lists["prompt_tokens"].flatten().to_numpy()
    return LoadedShard(
        name=path.name,
        file_crc32=zlib.crc32(data),
        metadata=metadata,
        trajectory_ids=tuple(table["trajectory_id"].to_pylist()),
        rows=rows,
        cu_seqlens=cu_seqlens,
        tokens=tokens,
        loss_mask=packed("loss_mask"),
        rollout_logprobs=packed("rollout_logprobs"),
    )


def read_trajectories(path: Path) -> list[Trajectory]:
    """The rows of a shard as records, for tools. Raises as `read_shard` does, but does not check values."""
    table, _ = _read_table(path, path.read_bytes())
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        row["version_spans"] = tuple(VersionSpan(**span) for span in row["version_spans"])
        row.update({name: np.array(row[name], dtype=dtype) for name, dtype in _TOKEN_COLUMNS.items()})
    return [Trajectory(**row) for row in rows]
