"""What a run directory says in the end, as one tree of values, and where two such trees differ.

What is a time is left out (`time`, `seconds`, `collected_at`), and so are names that count attempts: shards, logs.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing

from reval_mcore.replay.journal import Admit, Index, Journal
from reval_mcore.replay.shards import SHARDS, TMP, read_trajectories
from reval_mcore.run_directory import MANIFEST, WEIGHTS

_COUNTED = (
    "logs/",
    "tensorboard/",
    "replay/shards/",
    "replay/tmp/",
)  # names there hold the number of an attempt, or the time


def outcome(run: Path) -> dict[str, Any]:
    """All that must be the same at the end of a run that was killed. For a process with an open topology.

    The file names are part of it: a run that was killed leaves nothing lying about either.
    """
    checkpoints = sorted((run / "checkpoints").iterdir())
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    return {
        "names": {name: "there" for name in names if not name.startswith(_COUNTED)},
        "metrics": records(run),
        "summary": _without_times(json.loads((run / "summary.json").read_text())),
        "exit": json.loads((run / "control" / "exit.json").read_text()),
        "latest": str((run / "checkpoints" / "latest").readlink()),
        "checkpoints": {path.name: checkpoint(path) for path in checkpoints if not path.is_symlink()},
        "replay": _replay(run / "replay"),
    }


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [_without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(path: Path) -> dict[str, Any]:
    """By file, and the weights by tensor. Whether the manifest fits the files is for the run to find out."""
    tree: dict[str, Any] = {}
    for file in sorted(path.iterdir()):
        match file.suffix:
            case _ if file.name == WEIGHTS:
                tree[WEIGHTS] = dist_checkpointing.load_plain_tensors(str(file))
            case _ if file.name == MANIFEST:
                tree[MANIFEST] = sorted(json.loads(file.read_text()))
            case ".json":
                tree[file.name] = _without_times(json.loads(file.read_text()))
            case ".npz":
                with np.load(file) as arrays:
                    tree[file.name] = dict(arrays)
            case ".toml":
                tree[file.name] = tomllib.loads(file.read_text())
                del tree[file.name]["run"]["directory"]
            case _:
                tree[file.name] = file.read_bytes()
    return tree


def _replay(replay: Path) -> dict[str, Any]:
    """The journal without names and checksums of shards, and every trajectory that is still on disk."""
    journal = Journal(replay / "journal.jsonl")
    index = Index.of(journal.events)
    on_disk = {path.name for path in (replay / SHARDS).iterdir()}
    return {
        "journal": [_nameless(event) for event in journal.events],
        "first_live_row": index.first_live_row,
        "shards": {
            f"rows {admit.first_row} to {admit.end_row - 1}": _trajectories(replay / SHARDS / name)
            for name, admit in index.admitted.items()
            if name in on_disk
        },
        "not admitted": sorted(on_disk - set(index.admitted)),
        "unfinished": [path.name for path in (replay / TMP).rglob("*") if path.is_file()],
    }


def _nameless(event: Any) -> dict[str, Any]:
    fields = asdict(event)
    if isinstance(event, Admit):
        del fields["shard"], fields["file_crc32"]
    return fields


def _trajectories(shard: Path) -> list[dict[str, Any]]:
    trajectories = [asdict(trajectory) for trajectory in read_trajectories(shard)]
    for trajectory in trajectories:
        del trajectory["collected_at"]
    return trajectories


def _without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("time", "seconds") and not k.startswith("seconds/")}


def differences(left: Any, right: Any, place: str = "") -> Iterator[str]:
    """Where two trees differ, bit for bit: NaN is NaN, and 0.0 is not -0.0."""
    if type(left) is not type(right):
        yield f"{place}: {type(left).__name__}, not {type(right).__name__}"
    elif isinstance(left, Mapping):
        for key in [*left, *(key for key in right if key not in left)]:
            if key not in left or key not in right:
                yield f"{place}/{key}: {'missing' if key in right else 'too much'}"
            else:
                yield from differences(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, Sequence) and not isinstance(left, str | bytes):
        if len(left) != len(right):
            yield f"{place}: {len(left)} items, not {len(right)}: {_short(left)}, not {_short(right)}"
        for index, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from differences(one, other, f"{place}/{index}")
    elif isinstance(left, np.ndarray | torch.Tensor):
        if (left.dtype, left.shape, _bytes(left)) != (right.dtype, right.shape, _bytes(right)):
            yield f"{place}: {_short(left)}, not {_short(right)}"
    elif repr(left) != repr(right):
        yield f"{place}: {_short(left)}, not {_short(right)}"


def told(found: Iterator[str], limit: int = 20) -> str:
    """The first differences, a line each; "" where there are none."""
    return "\n".join(itertools.islice(found, limit))


def _bytes(array: Any) -> bytes:
    if isinstance(array, torch.Tensor):
        array = array.detach().contiguous().view(torch.uint8).numpy() if array.dim() else array.numpy()
    return array.tobytes()


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
