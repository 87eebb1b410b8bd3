"""Shards in memory: whole and verified, or the few columns that the index keeps of every row; and a bound on them.

When what is verified:

- at admission the whole file is read: page checksums, the CRC32 in the footer, the values, and the file's own CRC32,
  which goes to the journal;
- whenever a shard is read again, the same, and the file's CRC32 against the journal's;
- when a buffer is opened, of each live shard only the columns in INDEX_DTYPE and the ids, by the checksums of their
  pages. Damage elsewhere in the file is found when its rows are wanted. A million trajectories are 8 GB: reading all of
  it to begin would cost minutes, and vouch for nothing that the next read does not check again.
"""

from __future__ import annotations

import errno
import itertools
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reval_mcore.replay.shards import (
    FINISH_REASONS,
    REWARDS,
    SCHEMA,
    TOKEN_COLUMNS,
    VERDICTS,
    CorruptShardError,
    ShardMetadata,
    cumulative,
    parse_metadata,
    read_table,
)

GONE = (errno.ENOENT, errno.ESTALE)  # another node has unlinked it: read as evicted

INDEX_DTYPE = np.dtype([
    ("policy_version", np.int64),  # of the first response token
    ("reward", np.float32),
    ("group_reward_mean", np.float32),
    ("group_reward_std", np.float32),
    ("has_verdict", np.bool_),
])  # fmt: skip
ROW_DTYPE = np.dtype([
    ("length", np.int64),  # prompt plus response tokens
    ("prompt_length", np.int64),
    *((name, INDEX_DTYPE[name]) for name in INDEX_DTYPE.names or ()),
    ("finish_reason", f"U{max(map(len, FINISH_REASONS))}"),
])  # fmt: skip
_INDEX_COLUMNS = ("trajectory_id", "version_spans.list.element.version", *REWARDS, "verdict")


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

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        return sum(a.nbytes for a in (self.rows, self.cu_seqlens, self.tokens, self.loss_mask, self.rollout_logprobs))

    def without(self, skipped: Sequence[int]) -> LoadedShard:
        """The same shard less the rows at these places; `metadata` goes on describing the file."""
        if not skipped:
            return self
        keep = kept_places(len(self), skipped)
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


def kept_places(num_rows: int, skipped: Sequence[int]) -> np.ndarray:
    """bool [num_rows]: False at the skipped places."""
    keep = np.ones(num_rows, dtype=np.bool_)
    keep[list(skipped)] = False
    return keep


# ---------------------------------------------------------------- whole


def _check_values(table: pa.Table, lengths: dict[str, np.ndarray]) -> None:
    """Checksums vouch for what was written; this is for what another program wrote wrongly."""
    if any((each < 1).any() for each in lengths.values()):
        raise CorruptShardError("an empty prompt, response or list of version spans")
    if any((lengths["response_tokens"] != lengths[name]).any() for name in ("loss_mask", "rollout_logprobs")):
        raise CorruptShardError("loss_mask or rollout_logprobs are not as long as response_tokens")
    if any(not np.isfinite(table[name].to_numpy()).all() for name in REWARDS):
        raise CorruptShardError(f"not finite: one of {', '.join(REWARDS)}")
    if len(table["trajectory_id"].unique()) < len(table):
        raise CorruptShardError("a trajectory_id more than once")
    for name, known in (("finish_reason", FINISH_REASONS), ("verdict", VERDICTS)):
        if unknown := set(table[name].unique().to_pylist()) - known:
            raise CorruptShardError(f"unknown {name}: {sorted(unknown)}")


def read_shard(path: Path) -> LoadedShard:
    """Read a shard whole and verify it.

    Raises CorruptShardError where the bytes are damaged, ValueError where the schema version is unknown (every shard
    will be so: stop, do not quarantine), OSError where the file cannot be read.
    """
    data = path.read_bytes()
    table, metadata = read_table(path, data)
    lists = {name: table[name].combine_chunks() for name in (*TOKEN_COLUMNS, "version_spans")}
    lengths = {name: np.diff(array.offsets.to_numpy()).astype(np.int64) for name, array in lists.items()}
    _check_values(table, lengths)
    rows = np.empty(len(table), dtype=ROW_DTYPE)
    rows["prompt_length"] = lengths["prompt_tokens"]
    rows["length"] = lengths["prompt_tokens"] + lengths["response_tokens"]
    rows["finish_reason"] = table["finish_reason"].to_pylist()
    _fill_index_columns(rows, table, lists["version_spans"].flatten().field("version"), lengths["version_spans"])
    cu_seqlens = cumulative(rows["length"])
    # prompt and response of each row in turn: True where the token is the response's
    turns = np.stack([lengths["prompt_tokens"], lengths["response_tokens"]], axis=1).ravel()
    in_response = np.repeat(np.tile([False, True], len(table)), turns)

    def packed(name: str) -> np.ndarray:
        array = np.zeros(len(in_response), dtype=TOKEN_COLUMNS[name])
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


def _fill_index_columns(rows: np.ndarray, table: pa.Table, versions: pa.Array, num_spans: np.ndarray) -> None:
    """`versions` [spans] of all rows, `num_spans` int64 [rows]."""
    rows["policy_version"] = versions.to_numpy()[cumulative(num_spans)[:-1]]
    rows["has_verdict"] = [verdict != "unverified" for verdict in table["verdict"].to_pylist()]
    for name in REWARDS:
        rows[name] = table[name].to_numpy()


# ---------------------------------------------------------------- what the index keeps


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """What is known of every row of a shard without its tokens."""

    trajectory_ids: tuple[str, ...]  # [rows]
    rows: np.ndarray  # INDEX_DTYPE [rows]

    @classmethod
    def of(cls, shard: LoadedShard) -> IndexedShard:
        rows = np.empty(len(shard), dtype=INDEX_DTYPE)
        for name in INDEX_DTYPE.names or ():
            rows[name] = shard.rows[name]
        return cls(shard.trajectory_ids, rows)

    def without(self, skipped: Sequence[int]) -> IndexedShard:
        if not skipped:
            return self
        keep = kept_places(len(self.rows), skipped)
        return IndexedShard(tuple(itertools.compress(self.trajectory_ids, keep)), self.rows[keep])


def read_index(path: Path) -> IndexedShard:
    """The columns in INDEX_DTYPE and the ids; see above for what is verified. Raises as `read_shard` does."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            metadata = parse_metadata(path, file.metadata.metadata or {})
            if not file.schema_arrow.equals(SCHEMA) or file.metadata.num_rows != metadata.num_trajectories:
                raise CorruptShardError("columns or number of rows are not those of the schema and the metadata")
            table = file.read(columns=list(_INDEX_COLUMNS), use_threads=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; a checksum's has no number
            raise
        raise CorruptShardError(str(error)) from error
    spans = table["version_spans"].combine_chunks()
    num_spans = np.diff(spans.offsets.to_numpy()).astype(np.int64)
    if (num_spans < 1).any():
        raise CorruptShardError("an empty list of version spans")
    rows = np.empty(len(table), dtype=INDEX_DTYPE)
    _fill_index_columns(rows, table, spans.flatten().field("version"), num_spans)
    return IndexedShard(tuple(table["trajectory_id"].to_pylist()), rows)


# ---------------------------------------------------------------- as many as there is room for


class ShardCache:
    """Loaded shards by name, those used last, as many as `max_bytes` hold; the one used last in any case."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._shards: OrderedDict[str, LoadedShard] = OrderedDict()  # used last: at the end
        self.num_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def get(self, name: str) -> LoadedShard | None:
        shard = self._shards.get(name)
        if shard is not None:
            self._shards.move_to_end(name)
        return shard

    def put(self, shard: LoadedShard) -> None:
        self.drop(shard.name)
        self._shards[shard.name] = shard
        self.num_bytes += shard.num_bytes
        while self.num_bytes > self._max_bytes and len(self._shards) > 1:
            self.num_bytes -= self._shards.popitem(last=False)[1].num_bytes

    def drop(self, name: str) -> None:
        shard = self._shards.pop(name, None)
        if shard is not None:
            self.num_bytes -= shard.num_bytes
