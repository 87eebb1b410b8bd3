"""Replay shards: immutable Parquet files of whole groups, one row a trajectory.

    shards/<writer>-<incarnation>-<seq>.parquet   complete; a rename brings them here
    tmp/<writer>-<incarnation>/                   unfinished writes; the folder claims the name for one process
    quarantine/                                   shards that failed a check

Page checksums are written and verified, which catches any damage to the data; with only one of the two, flipped bits
are read silently. They do not cover the footer, so what matters is a column, the footer's own values carry a CRC32, and
the CRC32 of the whole file goes to the journal at admission. Files are read whole and never mapped: a mapped file that
another node unlinks or truncates kills the reader with SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reval_mcore.durable import NO_SPACE, fsync, make_directory
from reval_mcore.records import FinishReason, Trajectory, VerdictReason, VersionSpan

logger = logging.getLogger(__name__)

SHARDS, TMP, QUARANTINE = "shards", "tmp", "quarantine"
_RETRY_S = 1.0
SCHEMA_VERSION = 1
_METADATA_KEY, _METADATA_CRC_KEY = b"reval_mcore.shard", b"reval_mcore.shard.crc32"
REWARDS = ("reward", "group_reward_mean", "group_reward_std")


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
TOKEN_COLUMNS = {
    "prompt_tokens": np.dtype(np.int32),
    "response_tokens": np.dtype(np.int32),
    "loss_mask": np.dtype(np.bool_),
    "rollout_logprobs": np.dtype(np.float32),
}
FINISH_REASONS, VERDICTS = frozenset(get_args(FinishReason)), frozenset(get_args(VerdictReason))
_LARGEST = float(np.finfo(np.float32).max)


class CorruptShardError(Exception):
    """The bytes of a shard are not what a shard writer wrote; says how. Failures to read them at all stay OSError."""


class ShardName(NamedTuple):
    """Who wrote a shard, and its place in that writer's order. Tuple order is the order of admission."""

    writer: str
    incarnation: int  # a higher one at every start of the writer, so that no name is ever used twice
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


def cumulative(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n ragged rows begins, and the total."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


# ---------------------------------------------------------------- writing


def _check_trajectory(trajectory: Trajectory) -> None:
    name, length = trajectory.trajectory_id, len(trajectory.response_tokens)
    for column, dtype in TOKEN_COLUMNS.items():
        array = getattr(trajectory, column)
        expected = len(trajectory.prompt_tokens) if column == "prompt_tokens" else length
        assert array.dtype == dtype, f"{name}: {column} is {array.dtype}, not {dtype}"
        assert array.shape == (expected,), f"{name}: {column} has shape {array.shape}, not {(expected,)}"
        assert expected >= 1, f"{name}: {column} is empty"
    ends = [0, *(span.end for span in trajectory.version_spans)]
    assert [span.start for span in trajectory.version_spans] == ends[:-1], f"{name}: version_spans leave a gap"
    assert ends == sorted(set(ends)), f"{name}: empty version span"
    assert ends[-1] == length, f"{name}: version_spans end at {ends[-1]} of {length} tokens"
    numbers = [getattr(trajectory, column) for column in REWARDS]
    assert all(abs(number) <= _LARGEST for number in numbers), f"{name}: reward or statistics {numbers} not finite"
    assert trajectory.finish_reason in FINISH_REASONS, f"{name}: finish_reason {trajectory.finish_reason!r}"
    assert trajectory.verdict in VERDICTS, f"{name}: verdict {trajectory.verdict!r}"


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
    if name in TOKEN_COLUMNS:  # end to end: token by token, as Python objects, is far slower
        offsets = cumulative(np.array([len(value) for value in values]))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(values)), type=kind)
    if name == "version_spans":
        offsets = cumulative(np.array([len(spans) for spans in values]))
        table = np.array([(s.version, s.start, s.end) for spans in values for s in spans], dtype=np.int64)
        spans = pa.StructArray.from_arrays([pa.array(column) for column in table.T.copy()], fields=list(_SPAN))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), spans, type=kind)
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
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
        # nobody asks for those of tokens; pyarrow takes names too, its annotation says bool alone
        write_statistics=[name for name in SCHEMA.names if name not in TOKEN_COLUMNS],  # pyright: ignore[reportArgumentType]
    )
    return sink.getvalue()


class ShardWriter:
    """Writes the shards of one collector. Each writer owns its names, so that any number of them need no lock."""

    def __init__(
        self,
        directory: Path,
        *,
        writer: str,
        incarnation: int,
        tokenizer_hash: str,
        template_hash: str,
        max_disk_bytes: int | None = None,
        full_disk_patience_s: float = 0.0,
    ) -> None:
        """`directory` is the replay directory; `max_disk_bytes` bounds it, over all writers, give or take a shard each.

        The name is claimed by making tmp/<writer>-<incarnation>, which one process can do. Raises ValueError where it,
        or a later incarnation of this writer, has been here before. Unfinished writes of earlier ones are removed, with
        their folders: should one of them live after all, it finds no place to write to.
        """
        self._next = ShardName(writer, incarnation, 0)
        assert ShardName.parse(str(self._next)) == self._next, f"not usable in a file name: {writer!r}, {incarnation}"
        self.incarnation = incarnation
        self._hashes = {"tokenizer_hash": tokenizer_hash, "template_hash": template_hash}
        self._directory, self._shards = directory, directory / SHARDS
        self._max_disk_bytes, self._patience_s = max_disk_bytes, full_disk_patience_s
        make_folders(directory)
        before = [(name, path) for name, path in _traces(directory) if name.writer == writer]
        for name, path in before:
            if name.incarnation >= incarnation:
                raise _not_new(path, writer, incarnation)
        self._tmp = directory / TMP / f"{writer}-{incarnation:04d}"
        try:
            self._tmp.mkdir()
        except FileExistsError:  # made since: another process was started with the same name
            raise _not_new(self._tmp, writer, incarnation) from None
        for _, path in before:
            if path.parent.name == TMP:
                shutil.rmtree(path, ignore_errors=True)

    def write(self, trajectories: Sequence[Trajectory]) -> str:
        """Write one shard of whole groups and return its name; readers see all of it or nothing.

        Where the disk, a quota or the bound is full, tries again for `full_disk_patience_s`: others may make room.
        Raises OSError with the errno of the failure and leaves nothing in tmp/. Writing the same trajectories again is
        safe then, under a new name: should the failed shard be visible after all, because only the fsync after its
        rename failed, admission skips trajectories that it has already.
        """
        name, self._next = self._next, self._next._replace(seq=self._next.seq + 1)
        data = serialize(trajectories, name=name, **self._hashes)
        deadline = time.monotonic() + self._patience_s
        has_told = False
        while True:
            try:
                self._check_bound(data.size)
                self._publish(str(name), data)
                return str(name)
            except OSError as error:
                reason = f"replay shard of {data.size} bytes not written: {error.strerror}"
                left_s = deadline - time.monotonic()
                if error.errno not in NO_SPACE or left_s <= 0.0:
                    raise OSError(error.errno, reason, str(self._shards / str(name))) from error
                if not has_told:
                    logger.warning("%s: %s; trying again for %g s", name, reason, self._patience_s)
                    has_told = True
                time.sleep(min(_RETRY_S, left_s))

    def _check_bound(self, num_bytes: int) -> None:
        if self._max_disk_bytes is None:
            return
        used = disk_usage_bytes(self._directory)
        if used + num_bytes > self._max_disk_bytes:
            raise OSError(
                errno.EDQUOT,
                f"the replay directory has {used} of at most {self._max_disk_bytes} bytes (replay.max_disk_gib); raise "
                "that, or lower replay.capacity or checkpoint.keep",
            )

    def _publish(self, name: str, data: pa.Buffer) -> None:
        tmp, final = self._tmp / name, self._shards / name
        try:
            with tmp.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                tmp.rename(final)
            except FileNotFoundError:  # NFS says so of a rename that it did, and was asked for twice
                if not (final.exists() and final.stat().st_size == data.size):
                    raise
            fsync(self._shards)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise


def make_folders(directory: Path) -> None:
    """The folders of a replay directory, on the disk with their own names."""
    for folder in (SHARDS, TMP, QUARANTINE):
        make_directory(directory / folder)


def disk_usage_bytes(directory: Path) -> int:
    """Bytes of the files in a replay directory. What goes while it is counted is not counted."""
    total = 0
    for folder in (directory, *(directory / name for name in (SHARDS, QUARANTINE)), *(directory / TMP).glob("*")):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size if entry.is_file() else 0
    return total


def _traces(directory: Path) -> list[tuple[ShardName, Path]]:
    """What writers have left: their shards, and their folders in tmp/ (with seq 0)."""
    found = []
    for folder in (SHARDS, TMP, QUARANTINE):
        for path in (directory / folder).glob("*"):
            name = ShardName.parse(path.name if folder != TMP else f"{path.name}-000000.parquet")
            if name is not None:
                found.append((name, path))
    return found


def next_incarnation(directory: Path) -> int:
    """Higher than that of any writer that has been here."""
    return 1 + max((name.incarnation for name, _ in _traces(directory)), default=-1)


def _not_new(path: Path, writer: str, incarnation: int) -> ValueError:
    return ValueError(
        f"{path}: incarnation {incarnation} of writer {writer!r} is not new here; give every start of a writer a name "
        f"of its own and a higher incarnation"
    )


# ---------------------------------------------------------------- reading


def parse_metadata(path: Path, footer: dict[bytes, bytes]) -> ShardMetadata:
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


def read_table(path: Path, data: bytes) -> tuple[pa.Table, ShardMetadata]:
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            metadata = parse_metadata(path, file.metadata.metadata or {})
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # from bytes in memory: the disk did not fail
        raise CorruptShardError(str(error)) from error
    if not table.schema.equals(SCHEMA) or len(table) != metadata.num_trajectories:
        raise CorruptShardError("columns or number of rows are not those of the schema and the metadata")
    return table, metadata


def read_trajectories(path: Path) -> list[Trajectory]:
    """The rows of a shard as records, for tools. Raises as `read_shard` does, but does not check values."""
    table, _ = read_table(path, path.read_bytes())
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        row["version_spans"] = tuple(VersionSpan(**span) for span in row["version_spans"])
        row.update({name: np.array(row[name], dtype=dtype) for name, dtype in TOKEN_COLUMNS.items()})
    return [Trajectory(**row) for row in rows]
