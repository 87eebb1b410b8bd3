"""Speed and memory of the replay buffer: CPU seconds, so that a busy machine does not change the figures much.

    python -m tools.bench.replay --out tools/bench/results/replay_<date>_<machine>.json

Appends are durable (fsync of file and directory), loads are verified (page checksums, values, CRC32 of the file). In
the same run Arrow IPC files with a CRC32 and, where torchrl is installed, its LazyMemmapStorage, which has no fsync and
no checksum. CPU time is that of the whole process, kernel and threads included; each figure is the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from reval_mcore.durable import fsync
from reval_mcore.records import Trajectory, VersionSpan
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.loading import read_shard
from reval_mcore.replay.samplers import PrioritizedSampler
from reval_mcore.replay.shards import ShardWriter

GROUP, PER_SHARD, BATCH = 8, 1000, 256
SAMPLER = PrioritizedSampler(beta=0.02, exponent=0.6, epsilon=0.01, tau_versions=250.0)


def make_trajectories(count: int, mean_tokens: int) -> list[Trajectory]:
    """Prompts of a fifth of `mean_tokens`; responses of between 0.3 and 1.3 times it. Random tokens."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        prompt = max(mean_tokens // 5, 1)
        length = int(rng.integers(max(3 * mean_tokens // 10, 1), 13 * mean_tokens // 10 + 1))
        group = f"{index // GROUP:06d}-prompt"
        made.append(
            Trajectory(
                trajectory_id=f"{group}-{index % GROUP}",
                prompt_id="prompt",
                group_id=group,
                sample_index=index % GROUP,
                prompt_tokens=rng.integers(0, 150_000, prompt, dtype=np.int32),
                response_tokens=rng.integers(0, 150_000, length, dtype=np.int32),
                loss_mask=np.ones(length, bool),
                rollout_logprobs=-rng.random(length, dtype=np.float32),
                version_spans=(VersionSpan(index // PER_SHARD, 0, length),),
                reward=float(index % 2),
                group_reward_mean=0.5,
                group_reward_std=0.5,
                group_size=GROUP,
                finish_reason="stop",
                verdict="correct" if index % 2 else "wrong",
                verifier_version="1",
                answer="42",
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                collected_at=0.0,
            )
        )
    return made


def cpu_s(action: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of the process."""

    def timed() -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    return min(timed() for _ in range(repeats))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_writer(directory: Path) -> ShardWriter:
    return ShardWriter(directory, writer="bench", incarnation=0, tokenizer_hash="t", template_hash="t")


# ---------------------------------------------------------------- shards and batches


def measure_shards(directory: Path, shards: Sequence[list[Trajectory]], repeats: int) -> dict[str, float]:
    count = len(shards) * PER_SHARD
    payload = sum(8 * (len(t.prompt_tokens) + len(t.response_tokens)) for shard in shards for t in shard)
    writer = make_writer(directory)
    names: list[str] = []

    def append() -> None:
        names[:] = [writer.write(shard) for shard in shards]

    append_s = cpu_s(append, repeats)
    paths = [directory / "shards" / name for name in names]
    load_s = cpu_s(lambda: [read_shard(path) for path in paths], repeats)
    return {
        "num_trajectories": count,
        "appended_durably_per_cpu_s": count / append_s,
        "loaded_and_verified_per_cpu_s": count / load_s,
        "bytes_over_payload": sum(path.stat().st_size for path in paths) / payload,
    }


def measure_batches(directory: Path, repeats: int) -> dict[str, float]:
    buffer = ReplayBuffer(directory, capacity=10**9, seed=0)
    before = resident_bytes()
    buffer.admit()
    rows = [np.random.default_rng(seed).choice(len(buffer), BATCH, replace=False) for seed in range(20)]
    warm_s = cpu_s(lambda: [buffer.batch(each) for each in rows], repeats) / len(rows)
    figures = {
        "warm_batch_of_256_ms": 1e3 * warm_s,
        "resident_bytes_a_trajectory": (resident_bytes() - before) / len(buffer),
    }
    cold = ReplayBuffer(directory, capacity=10**9, seed=0, max_memory_bytes=1)
    return figures | {"cold_batch_of_256_ms": 1e3 * cpu_s(lambda: cold.batch(rows[0]), 1)}


# ---------------------------------------------------------------- the index


def fill_index(directory: Path, count: int) -> None:
    """Shards of 1,000 short trajectories: what opening and sampling cost does not depend on their tokens."""
    writer, base = make_writer(directory), make_trajectories(PER_SHARD, 8)
    for number in range(count // PER_SHARD):
        first = number * PER_SHARD // GROUP
        shard = []
        for index, each in enumerate(base):
            group = f"{first + index // GROUP:06d}-prompt"
            spans = (VersionSpan(number, 0, len(each.response_tokens)),)
            name = f"{group}-{index % GROUP}"
            shard.append(replace(each, trajectory_id=name, group_id=group, version_spans=spans))
        writer.write(shard)
    buffer = ReplayBuffer(directory, capacity=10**9, seed=0, max_memory_bytes=1 << 20)
    buffer.admit()
    assert len(buffer) == count


def measure_index(directory: Path, repeats: int) -> dict[str, float]:
    def opened() -> ReplayBuffer:
        return ReplayBuffer(directory, capacity=10**9, seed=0, sampler=SAMPLER)

    before, start = resident_bytes(), time.perf_counter()
    buffer = opened()
    figures = {
        "num_trajectories": len(buffer),
        "open_index_wall_s": time.perf_counter() - start,
        "resident_bytes_a_trajectory": (resident_bytes() - before) / len(buffer),
        "open_index_s": cpu_s(opened, repeats),
    }
    rng = np.random.default_rng(0)
    buffer.set_residuals(buffer.live_rows, rng.normal(0.0, 25.0, len(buffer)))
    weights = buffer._current_weights()
    streams = [np.random.default_rng(seed) for seed in range(10)]
    draw_s = cpu_s(lambda: [SAMPLER.draw(weights, BATCH, stream) for stream in streams], repeats) / len(streams)
    rows = buffer.live_rows[SAMPLER.draw(weights, BATCH, streams[0])]
    residuals = rng.normal(0.0, 25.0, BATCH)
    update_s = cpu_s(lambda: [buffer.record_update(rows, residuals) for _ in range(10)], repeats) / 10

    def rebuild() -> None:
        buffer._weights = None
        buffer._current_weights()

    def whole() -> None:  # without reading tokens: a batch is measured above
        live = buffer._current_weights()
        places = SAMPLER.draw(live, BATCH, streams[0])
        _ = live[places] * len(buffer) / live.sum()
        buffer.record_update(buffer.live_rows[places], residuals)

    return figures | {
        "prioritized_draw_of_256_ms": 1e3 * draw_s,
        "priority_update_of_256_ms": 1e3 * update_s,
        "prioritized_sample_and_update_ms": 1e3 * cpu_s(lambda: [whole() for _ in range(10)], repeats) / 10,
        "weights_after_admission_ms": 1e3 * cpu_s(rebuild, repeats),
        "statistics_ms": 1e3 * cpu_s(lambda: buffer.statistics(0), repeats),
    }


# ---------------------------------------------------------------- others, in the same run


def measure_arrow(directory: Path, shards: Sequence[list[Trajectory]], repeats: int) -> dict[str, float]:
    """Arrow IPC with tokens, masks and log-probabilities only, and a CRC32 of the file that is checked at loading."""
    columns = ("prompt_tokens", "response_tokens", "loss_mask", "rollout_logprobs")
    paths = [directory / f"{number}.arrow" for number in range(len(shards))]
    crc32s: dict[Path, int] = {}

    def column(shard: Sequence[Trajectory], name: str) -> pa.Array:
        arrays = [getattr(trajectory, name) for trajectory in shard]
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))

    def append() -> None:
        for shard, path in zip(shards, paths, strict=True):
            table = pa.table({name: column(shard, name) for name in columns})
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            data = sink.getvalue()
            crc32s[path] = zlib.crc32(data)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fsync(directory)

    def load() -> None:
        for path in paths:
            data = path.read_bytes()
            assert zlib.crc32(data) == crc32s[path]
            pa.ipc.open_file(data).read_all()

    count = len(shards) * PER_SHARD
    append_s = cpu_s(append, repeats)
    return {
        "appended_durably_per_cpu_s": count / append_s,
        "loaded_and_verified_per_cpu_s": count / cpu_s(load, repeats),
    }


def measure_torchrl(directory: Path, shards: Sequence[list[Trajectory]], mean_tokens: int) -> dict[str, Any]:
    """Rows padded to the longest, as its storage wants them. Its prioritized sampler depends on one torch version."""
    try:
        import torch
        import torchrl  # pyright: ignore[reportMissingImports]
        import torchrl.data as peers  # pyright: ignore[reportMissingImports]
        from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return {"absent": str(error)}
    rows = [t for shard in shards for t in shard]
    width = max(len(t.prompt_tokens) + len(t.response_tokens) for t in rows)
    storage = peers.LazyMemmapStorage(len(rows), scratch_dir=str(directory))
    peer = peers.ReplayBuffer(storage=storage, batch_size=BATCH)

    def append() -> None:
        for shard in shards:
            tokens = np.zeros((len(shard), width), np.int32)
            logprobs = np.zeros((len(shard), width), np.float32)
            for place, t in enumerate(shard):
                whole = np.concatenate([t.prompt_tokens, t.response_tokens])
                tokens[place, : len(whole)] = whole
                logprobs[place, len(t.prompt_tokens) : len(whole)] = t.rollout_logprobs
            arrays = {"tokens": torch.from_numpy(tokens), "logprobs": torch.from_numpy(logprobs)}
            peer.extend(TensorDict(arrays, batch_size=len(shard)))

    append_s = cpu_s(append, 1)
    return {
        "version": torchrl.__version__,
        "appended_without_fsync_per_cpu_s": len(rows) / append_s,
        "warm_batch_of_256_ms": 1e3 * cpu_s(lambda: [peer.sample() for _ in range(20)], 2) / 20,
        "padded_bytes_over_payload": width / mean_tokens,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    made = make_trajectories(PER_SHARD * options.shards, options.mean_tokens)
    shards = [made[start : start + PER_SHARD] for start in range(0, len(made), PER_SHARD)]
    result: dict[str, Any] = {"mean_tokens": options.mean_tokens}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folders = [Path(name) / each for each in ("replay", "batches", "arrow", "torchrl")]
        for folder in folders:
            folder.mkdir()
        result["shards"] = measure_shards(folders[0], shards, options.repeats)
        writer = make_writer(folders[1])
        for shard in shards:
            writer.write(shard)
        result["batches"] = measure_batches(folders[1], options.repeats)
        result["arrow_ipc_crc32"] = measure_arrow(folders[2], shards, options.repeats)
        result["torchrl_lazy_memmap"] = measure_torchrl(folders[3], shards, options.mean_tokens)
    for count in options.index:
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            fill_index(Path(name), count)
            result[f"index_{count}"] = measure_index(Path(name), options.repeats)
    result["peak_resident_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.replay", description="Speed of the replay buffer.")
    parser.add_argument("--mean-tokens", type=int, default=1000, help="of a trajectory, prompt included")
    parser.add_argument("--shards", type=int, default=5, help="of 1,000 trajectories, for appends, loads and batches")
    parser.add_argument("--index", type=int, nargs="*", default=[100_000, 1_000_000], help="sizes of the index")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    options = parser.parse_args(arguments)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
        "load_average": os.getloadavg()[0],
        **measure(options),
    }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
