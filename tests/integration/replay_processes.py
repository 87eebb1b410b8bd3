"""Writers, a trainer and readers of one replay directory, as processes of their own that can be killed.

What a trajectory holds is a function of its id, so whoever reads it knows whether it is what was written. As a program
this is the process that they are forks of: `python -m tests.integration.replay_processes`, commands on stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from reval_mcore.records import Trajectory, VersionSpan
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.samplers import PrioritizedSampler
from reval_mcore.replay.shards import ShardWriter
from reval_mcore.replay.view import View

_ROOT = Path(__file__).parents[2]
_ANSWER_LIMIT_S = 120.0
_GROUP, _GROUPS = 3, 4  # trajectories a group, groups a shard
SAMPLER = PrioritizedSampler(beta=0.5, exponent=0.6, epsilon=0.01, tau_versions=5.0)


def make_trajectory(name: str, index: int) -> Trajectory:
    """Of group `name`; tokens, log-probabilities and reward are a function of the id."""
    trajectory_id = f"{name}-{index}"
    rng = np.random.default_rng(zlib.crc32(trajectory_id.encode()))
    length = int(rng.integers(1, 40))
    return Trajectory(
        trajectory_id=trajectory_id,
        prompt_id=name,
        group_id=name,
        sample_index=index,
        prompt_tokens=rng.integers(0, 50_000, size=5, dtype=np.int32),
        response_tokens=rng.integers(0, 50_000, size=length, dtype=np.int32),
        loss_mask=np.ones(length, bool),
        rollout_logprobs=-rng.random(length, dtype=np.float32),
        version_spans=(VersionSpan(int(rng.integers(0, 9)), 0, length),),
        reward=float(rng.integers(0, 2)),
        group_reward_mean=0.5,
        group_reward_std=0.5,
        group_size=_GROUP,
        finish_reason="stop",
        verdict="correct",
        verifier_version="1",
        answer="",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        collected_at=0.0,
    )


def shard_ids(shard: str) -> list[str]:
    """Of the trajectories that `write` puts into a shard of this name."""
    stem = shard.removesuffix(".parquet")
    return [f"{stem}.{group}-{index}" for group in range(_GROUPS) for index in range(_GROUP)]


def _tell(log: str, value: Any) -> None:
    """One line, at once: nothing of it is lost in a kill."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (json.dumps(value) + "\n").encode())
    os.close(descriptor)


def write(directory: str, log: str, writer: str, incarnation: int, seconds: float, pause_s: float) -> None:
    """Shards without end, or for so long; each is told once `write` has returned."""
    shards = ShardWriter(Path(directory), writer=writer, incarnation=incarnation, tokenizer_hash="t", template_hash="t")
    deadline, seq = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        name = f"{writer}-{incarnation:04d}-{seq:06d}"
        groups = [f"{name}.{group}" for group in range(_GROUPS)]
        _tell(log, shards.write([make_trajectory(group, index) for group in groups for index in range(_GROUP)]))
        seq += 1
        time.sleep(pause_s)


def open_buffer(directory: Path, capacity: int) -> ReplayBuffer:
    return ReplayBuffer(directory, capacity=capacity, seed=0, sampler=SAMPLER, max_memory_bytes=50_000)


def train(directory: str, log: str, capacity: int, checkpoint: str, seconds: float) -> None:
    """Admit, sample, note, save, unlink; from the checkpoint where there is one. Tells what it has admitted."""
    buffer, path = open_buffer(Path(directory), capacity), Path(checkpoint)
    if path.exists():
        with np.load(path) as state:
            buffer.load_state_dict(dict(state))
    kept, deadline, update = buffer.first_live_row, time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        buffer.admit()
        _tell(log, [buffer.journal_position, buffer.first_live_row])
        batch = buffer.sample(16, update)
        check_batch(batch.tokens, batch.cu_seqlens, batch.rollout_logprobs)
        buffer.record_update(batch.rows, np.sin(batch.rows + update))
        update += 1
        if update % 5 == 0:
            with path.with_suffix(".tmp").open("wb") as file:
                np.savez(file, allow_pickle=False, **dict[str, Any](buffer.state_dict()))
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".tmp").rename(path)
            buffer.unlink_evicted(kept)  # what the checkpoint before this one may need stays, should this one be torn
            kept = buffer.first_live_row
        time.sleep(0.002)


_KNOWN: dict[bytes, bytes] = {}  # tokens of a trajectory that was seen -> its log-probabilities


def check_batch(tokens: np.ndarray, cu_seqlens: np.ndarray, logprobs: np.ndarray) -> None:
    """Prompt tokens tell nothing of the id, so that one row's numbers must agree with each other over time."""
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        key, value = tokens[start:end].tobytes(), logprobs[start:end].tobytes()
        assert _KNOWN.setdefault(key, value) == value


def read(directory: str, log: str, seconds: float) -> None:
    """What a person's tools do meanwhile: every live trajectory is what was written. Tells how many it has seen."""
    deadline, seen = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        for table in View.of(Path(directory)).live_tables():
            for row in table.select(["trajectory_id", "prompt_tokens", "response_tokens", "reward"]).to_pylist():
                group, _, index = row["trajectory_id"].rpartition("-")
                wanted = make_trajectory(group, int(index))
                assert row["response_tokens"] == wanted.response_tokens.tolist()
                assert row["prompt_tokens"] == wanted.prompt_tokens.tolist()
                assert row["reward"] == wanted.reward
                seen += 1
        _tell(log, seen)
        time.sleep(0.05)


# ---------------------------------------------------------------- starting and ending them


class Nursery:
    """A context manager: the process whose forks they are. It ends them all when it ends, whatever happens."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def start(self, role: str, errors: Path, *arguments: Any) -> int:
        """The process id; a traceback goes to `errors`."""
        return int(self._ask(["start", role, str(errors), *arguments]))

    def kill(self, pid: int) -> None:
        """SIGKILL; it is gone when this returns."""
        self._ask(["kill", pid])

    def wait(self, pid: int) -> None:
        self._ask(["wait", pid])

    def _ask(self, command: Sequence[Any]) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_LIMIT_S)
        assert ready, f"no answer to {command} in {_ANSWER_LIMIT_S} s"
        return self._process.stdout.readline()


def _fork(role: str, errors: str, arguments: Sequence[Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            {"write": write, "train": train, "read": read}[role](*arguments)
        except BaseException:
            Path(errors).write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    return pid


def _serve() -> None:
    for line in sys.stdin:
        match json.loads(line):
            case ["start", role, errors, *arguments]:
                answer = _fork(role, errors, arguments)
            case ["kill", pid]:
                os.kill(pid, signal.SIGKILL)
                answer = os.waitpid(pid, 0)[1]
            case ["wait", pid]:
                answer = os.waitpid(pid, 0)[1]
            case command:
                raise AssertionError(command)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
