"""The run directory: where things lie in it, and how they get there whole.

config.toml   metrics.jsonl   tensorboard/   replay/   summary.json   curve.png   control/exit.json
inputs.json                   hashes of what the run was given: prompts, tokenizer, model configuration
checkpoints/step_000200/      a distributed checkpoint (weights/), trainer.json, replay.npz; manifest.json: CRC32s
checkpoints/latest            a link to the newest complete one; what is not linked from here does not count
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from reval_mcore.config import Config, check_changes, dumps, load
from reval_mcore.durable import crc32, fsync, write_json, write_text

logger = logging.getLogger(__name__)

# the parts of a checkpoint
WEIGHTS, TRAINER_STATE, REPLAY_STATE, MANIFEST = "weights", "trainer.json", "replay.npz", "manifest.json"


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.replay = path / "replay"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.inputs = path / "inputs.json"
        self.exit_record = path / "control" / "exit.json"
        self._lock: IO[str] | None = None

    def open(self, config: Config, *, inputs: Mapping[str, str], allow_changed: Collection[str] = ()) -> Path | None:
        """Make the directory, or find the checkpoint to go on from; None to start afresh.

        `inputs` has a hash of the contents behind each setting that names files. Raises ValueError where a run without
        a checkpoint lies here (going on is impossible, starting over would mix two runs), where the checkpoint is
        damaged, and where inputs changed. Raises ConfigError where settings changed that decide what is learned.
        `allow_changed` names settings that may; other changes are logged.
        """
        self._take_lock()
        latest = self.latest_checkpoint()
        if latest is None and self.metrics.exists() and self.metrics.stat().st_size > 0:
            raise ValueError(
                f"run.directory = {self.path}: holds a run without a checkpoint; remove it, or give another directory"
            )
        if latest is not None:
            resolved = self.path / "config.toml"
            for change in check_changes(load(resolved), config, allowed=allow_changed, source=str(resolved)):
                logger.warning("going on with another setting than before: %s", change)
            self._check_inputs(inputs, allow_changed)
            self.verify(latest)
        for directory in (self.checkpoints, self.exit_record.parent):
            directory.mkdir(parents=True, exist_ok=True)
        self._sweep(latest)
        write_text(self.path / "config.toml", dumps(config))
        write_json(self.inputs, inputs)
        return latest

    def _take_lock(self) -> None:
        """Keep other processes out for as long as this one lives. Raises ValueError where one is at work here."""
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run.directory = {self.path}: another process trains here; wait for it, or give another directory"
            ) from None
        except OSError as error:  # a shared filesystem mounted without locks
            logger.warning("%s: no lock (%s); see to it that only one process trains here", self.path, error.strerror)

    def _sweep(self, latest: Path | None) -> None:
        """Remove what an earlier attempt left behind and what does not count: see the top of this file."""
        for leftover in self.checkpoints.glob(".writing_*"):
            shutil.rmtree(leftover)
        for path in self.kept_checkpoints():
            if latest is None or path.name > latest.name:
                self._remove(path)
        if latest is None:  # no iteration was finished: start from an empty buffer
            shutil.rmtree(self.replay, ignore_errors=True)
        for stale in (self.exit_record, self.summary):
            stale.unlink(missing_ok=True)

    def _remove(self, checkpoint: Path) -> None:
        """Out of sight at once, so that a half-removed one is never taken for one."""
        hidden = checkpoint.with_name(f".writing_old_{checkpoint.name}")
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)

    def latest_checkpoint(self) -> Path | None:
        link = self.checkpoints / "latest"
        return self.checkpoints / os.readlink(link) if link.is_symlink() else None

    def has_checkpoint(self, iteration: int) -> bool:
        """Whether the latest checkpoint is the one of this iteration."""
        latest = self.latest_checkpoint()
        return latest is not None and latest.name == f"step_{iteration:06d}"

    def kept_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step_*"))

    def begin_checkpoint(self, iteration: int) -> Path:
        """An empty directory to write a checkpoint into, invisible until published."""
        path = self.checkpoints / f".writing_{iteration:06d}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def publish_checkpoint(self, written: Path, *, keep: int) -> Path:
        """Make a written checkpoint the latest, then remove the oldest above `keep`."""
        files = sorted(path for path in written.rglob("*") if path.is_file())
        write_json(written / MANIFEST, {str(path.relative_to(written)): crc32(path) for path in files})
        for path in (*written.rglob("*"), written):
            fsync(path)
        final = self.checkpoints / written.name.replace(".writing_", "step_")
        written.rename(final)
        fsync(self.checkpoints)
        link = self.checkpoints / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.rename(self.checkpoints / "latest")
        fsync(self.checkpoints)
        for old in self.kept_checkpoints()[:-keep]:
            self._remove(old)
        return final

    def verify(self, checkpoint: Path) -> None:
        """Read a checkpoint whole. Raises ValueError that names its damaged files, and the checkpoint before it."""
        manifest = _read_object(checkpoint / MANIFEST)
        damaged = [
            name
            for name, expected in manifest.items()
            if not (checkpoint / name).is_file() or crc32(checkpoint / name) != expected
        ]
        if not damaged:
            return
        older = [path.name for path in self.kept_checkpoints() if path.name < checkpoint.name]
        remedy = "there is no older one; start another run directory"
        if older:
            remedy = f"go on from the one before it: ln -sfn {older[-1]} {self.checkpoints / 'latest'}"
        raise ValueError(f"{checkpoint}: damaged ({', '.join(damaged)}); {remedy}")

    def _check_inputs(self, inputs: Mapping[str, str], allow_changed: Collection[str]) -> None:
        """Raises ValueError where files that a setting names hold something else than when the run began."""
        before = _read_object(self.inputs)
        refused = [name for name in inputs if before[name] != inputs[name] and name not in allow_changed]
        if refused:
            allow = " ".join(f"--allow-changed {name}" for name in refused)
            raise ValueError(
                f"run.directory = {self.path}: other contents than when this run began, behind {', '.join(refused)}; "
                f"put them back, start another run directory, or accept the change with {allow}"
            )

    def cut_metrics(self, first_iteration: int) -> None:
        """Drop what an abandoned future wrote: lines of `first_iteration` and later, and a torn last line."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["iteration"] < first_iteration]
            write_text(self.metrics, "".join(kept))


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the run directory is damaged") from None


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises ValueError where there is none."""
    path = checkpoint / TRAINER_STATE
    if not path.is_file():
        raise ValueError(f"{checkpoint}: not a checkpoint of a run; give RUN/checkpoints/step_... or .../latest")
    return _read_object(path)
