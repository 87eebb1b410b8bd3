"""What `reval replay` does: a look into a replay buffer, also while a run is going on."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reval_mcore.config import load
from reval_mcore.durable import fsync
from reval_mcore.replay.reuse import times_sampled_histogram
from reval_mcore.replay.rows import STATES
from reval_mcore.replay.shards import CorruptShardError
from reval_mcore.replay.view import JOURNAL, View, read_columns
from reval_mcore.run_directory import REPLAY_STATE, RunDirectory, read_arrays

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_DAMAGED = 1  # exit status of `verify`
_FACTS = ("trajectory_id", "reward", "verdict", "finish_reason", "version_spans")


@dataclass(frozen=True)
class Place:
    """A replay directory, and the run that it is of, if there is one."""

    replay: Path
    run: RunDirectory | None

    @classmethod
    def find(cls, path: Path) -> Place:
        """`path` is a run directory or a replay directory. Raises ValueError where it is neither."""
        if (path / "replay" / JOURNAL).is_file():
            return cls(path / "replay", RunDirectory(path))
        if (path / JOURNAL).is_file():
            return cls(path, RunDirectory(path.parent) if (path.parent / "config.toml").is_file() else None)
        raise ValueError(f"{path}: no replay buffer in it; give a run directory, for example runs/demo")

    def checkpoint(self) -> tuple[str, dict[str, np.ndarray]] | None:
        """(name, states of rows by name) of the latest one, None where there is none."""
        latest = self.run.latest_checkpoint() if self.run is not None else None
        return None if latest is None else (latest.name, read_arrays(latest / REPLAY_STATE))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ValueError where the run, or its model, is not there."""
        if self.run is None:
            raise ValueError(f"{self.replay}: not in a run directory, so nothing says which tokenizer it is of")
        from reval_mcore.prompts import load_tokenizer

        return load_tokenizer(load(self.run.path / "config.toml").model.hf_path)


def run(arguments: argparse.Namespace) -> int:
    """Exit status. `arguments` are those of replay_cli.py. Raises ValueError and OSError of what the user gave."""
    actions = {"stats": _stats, "verify": _verify, "show": _show, "export": _export}
    try:
        return actions[arguments.action](arguments, Place.find(arguments.directory))
    except CorruptShardError as error:
        raise ValueError(f"{error}; reval replay verify {arguments.directory} tells all damage") from None


# ---------------------------------------------------------------- stats


def _stats(arguments: argparse.Namespace, place: Place) -> int:
    found = statistics(place)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            shown = "  ".join(f"{key}: {each}" for key, each in value.items()) if isinstance(value, dict) else value
            print(f"{name:26s} {shown}")
    return 0


def statistics(place: Place) -> dict[str, Any]:
    """What `reval replay stats` tells, by name."""
    view = View.of(place.replay)
    tables = list(view.live_tables(_FACTS))
    rewards = np.concatenate([np.empty(0), *(table["reward"].to_numpy() for table in tables)])
    versions = np.array([spans[0]["version"] for table in tables for spans in table["version_spans"].to_pylist()])
    tokens = np.array([spans[-1]["end"] for table in tables for spans in table["version_spans"].to_pylist()])

    def counts(name: str) -> dict[str, int]:
        values = (value for table in tables for value in table[name].to_pylist())
        return dict(sorted(Counter(values).items()))

    index = view.index
    live = {admit.shard for admit in view.live}
    return {
        "directory": str(place.replay),
        "live trajectories": len(rewards),
        "rows": f"{index.first_live_row} to {index.next_row - 1}" if index.next_row else "none yet",
        "admitted, all": index.next_row,
        "shards": {
            "live": len(live),
            "evicted, on disk": sum(name in index.admitted and name not in live for name in view.sizes),
            "pending": len(view.pending),
            "quarantined": len(index.quarantined),
        },
        "MiB on disk": round(sum(view.sizes.values()) / 2**20, 3),
        "response tokens": {"mean": round(float(tokens.mean()), 1), "max": int(tokens.max())} if len(tokens) else "-",
        "policy versions": f"{versions.min()} to {versions.max()}" if len(versions) else "-",
        "reward mean": round(float(rewards.mean()), 4) if len(rewards) else "-",
        "verdicts": counts("verdict"),
        "finish reasons": counts("finish_reason"),
        **_reuse(place),
    }


def _reuse(place: Place) -> dict[str, Any]:
    """From the latest checkpoint: use is noted there, and nowhere else on disk."""
    found = place.checkpoint()
    if found is None:
        return {"reuse": "no checkpoint has noted any"}
    name, states = found
    times = states["times_sampled"]
    return {
        "reuse, by checkpoint": name,
        "replay ratio": round(float(states["num_uses"]) / max(int(states["next_row"]), 1), 3),
        "times sampled": times_sampled_histogram(times),
        "evicted, never sampled": f"{int(states['num_evicted_unsampled'])} of {int(states['num_evicted'])}",
    }


# ---------------------------------------------------------------- verify


def _verify(arguments: argparse.Namespace, place: Place) -> int:
    view = View.of(place.replay)
    findings = list(view.verify())
    for finding in findings:
        print(finding)
    for shard, reason in view.reasons.items():
        print(f"note: {shard} went to quarantine before: {reason}")
    if view.has_torn_line:
        print(f"note: {place.replay / JOURNAL} ends in a torn line; a run in progress, or killed, leaves one")
    problems = "no damage" if not findings else f"{len(findings)} damaged or missing"
    print(f"{len(view.sizes)} shards, {sum(view.sizes.values())} bytes read: {problems}")
    return _DAMAGED if findings else 0


# ---------------------------------------------------------------- show


def _show(arguments: argparse.Namespace, place: Place) -> int:
    view = View.of(place.replay)
    shard, record = _find(view, arguments.id)
    prompt, response = record.pop("prompt_tokens"), record.pop("response_tokens")
    mask, logprobs = record.pop("loss_mask"), record.pop("rollout_logprobs")
    if arguments.tokens:
        texts = [" ".join(map(str, tokens)) for tokens in (prompt, response)]
    else:
        tokenizer = place.tokenizer()
        texts = [str(tokenizer.decode(tokens, skip_special_tokens=False)) for tokens in (prompt, response)]
    print(f"--- prompt, {len(prompt)} tokens\n{texts[0]}\n--- response, {len(response)} tokens\n{texts[1]}\n---")
    spans = record.pop("version_spans")
    for name, value in record.items():
        print(f"{name:22s} {value}")
    versions = ", ".join(f"{span['version']} (tokens {span['start']} to {span['end'] - 1})" for span in spans)
    print(f"{'policy versions':22s} {versions}")
    print(f"{'tokens in the loss':22s} {sum(mask)}")
    print(f"{'engine logprob, sum':22s} {sum(logprobs):.6g}")
    for name, value in _history(view, place, shard, record.get("row")).items():
        print(f"{name:22s} {value}")
    return 0


def _find(view: View, wanted: str) -> tuple[str, dict[str, Any]]:
    """(shard, the row as a record). Live trajectories first, then what is still on disk. Raises ValueError."""
    admitted = [view.index.admitted[name] for name in view.sizes if name in view.index.admitted]
    for admit in reversed(admitted):  # the newest first: an id that was evicted may have come back
        if wanted.isdecimal() and not admit.first_row <= int(wanted) < admit.end_row:
            continue
        ids = view.rows(admit, ["trajectory_id"])
        if ids is None:
            continue
        column = ids["row"] if wanted.isdecimal() else ids["trajectory_id"]
        place = column.index(int(wanted) if wanted.isdecimal() else wanted).as_py()
        table = view.rows(admit) if place >= 0 else None
        if table is not None:
            return admit.shard, table.slice(place, 1).to_pylist()[0]
    for name in view.pending:
        table = read_columns(view.path(name))
        place = -1 if table is None else table["trajectory_id"].index(wanted).as_py()
        if table is not None and place >= 0:
            return name, table.slice(place, 1).to_pylist()[0]
    raise ValueError(
        f"{wanted}: no such trajectory on disk in {view.directory}; it may be evicted and unlinked. "
        'Ids are in the column trajectory_id: duckdb -c "select trajectory_id from '
        f"'{view.directory}/shards/*.parquet'\""
    )


def _history(view: View, place: Place, shard: str, row: int | None) -> dict[str, Any]:
    if row is None:
        return {"shard": f"{shard}, not admitted yet"}
    is_live = row >= view.index.first_live_row
    told: dict[str, Any] = {
        "shard": shard,
        "admitted": f"at journal position {view.positions[shard]}",
        "state": "live" if is_live else f"evicted: rows from {view.index.first_live_row} on are live",
    }
    found = place.checkpoint()
    if found is None:
        return told
    name, states = found
    first, end = int(states["first_live_row"]), int(states["next_row"])
    if not first <= row < end:
        return told | {"checkpoint": f"{name} has rows {first} to {end - 1}"}
    return told | {"checkpoint": name} | {state: states[state][row - first] for state in STATES}


# ---------------------------------------------------------------- export


def _export(arguments: argparse.Namespace, place: Place) -> int:
    out: Path = arguments.out
    if out.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--out {out}: give a name that ends in .parquet or .jsonl")
    if out.exists():
        raise ValueError(f"--out {out}: is there already; give a new file")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: give a number >= 1")
    import pyarrow as pa

    tables = [_selected(table, arguments) for table in View.of(place.replay).live_tables()]
    table = pa.concat_tables(tables) if tables else None
    if table is None or not len(table):
        raise ValueError(f"{place.replay}: no live trajectory is selected; nothing is written")
    if arguments.limit is not None:
        table = table.slice(max(len(table) - arguments.limit, 0))
    if arguments.text:
        table = _with_text(table, place.tokenizer())
    _write(table, out)
    print(f"{out}: {len(table)} trajectories")
    return 0


def _selected(table: pa.Table, arguments: argparse.Namespace) -> pa.Table:
    import pyarrow as pa

    keep = np.ones(len(table), dtype=np.bool_)
    for name in ("verdict", "finish_reason", "prompt_id"):
        wanted = vars(arguments)[name]
        if wanted:
            keep &= np.isin(table[name].to_pylist(), wanted)
    versions = np.array([spans[0]["version"] for spans in table["version_spans"].to_pylist()])
    for values, name in ((table["reward"].to_numpy(), "reward"), (versions, "version")):
        low, high = vars(arguments)[f"min_{name}"], vars(arguments)[f"max_{name}"]
        keep &= values >= low if low is not None else True
        keep &= values <= high if high is not None else True
    return table.filter(pa.array(keep))


def _with_text(table: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    import pyarrow as pa

    for name in ("prompt", "response"):
        texts = tokenizer.batch_decode(table[f"{name}_tokens"].to_pylist(), skip_special_tokens=False)
        table = table.append_column(f"{name}_text", pa.array(texts, pa.string()))
    return table


def _write(table: pa.Table, out: Path) -> None:
    """Whole, or not at all. Raises OSError."""
    import pyarrow.parquet as pq

    temporary = out.with_name(f".{out.name}.tmp")
    try:
        if out.suffix == ".parquet":
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        else:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(_lines(table.to_pylist()))
        fsync(temporary)
        os.rename(temporary, out)
        fsync(out.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """JSON has no word for nan and infinities; shards hold none but in rollout_logprobs, where they are null here."""
    for record in records:
        logprobs = [value if np.isfinite(value) else None for value in record["rollout_logprobs"]]
        yield json.dumps({**record, "rollout_logprobs": logprobs}, ensure_ascii=False, allow_nan=False) + "\n"
