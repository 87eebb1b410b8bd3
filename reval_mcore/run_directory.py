"""The run directory: where things lie in it, and how they get there whole.

config.toml   metrics.jsonl   tensorboard/   replay/   summary.json   curve.png   control/exit.json
logs/attempt_000/             what each start of the run had to say; logs/latest is a link to the last
checkpoints/step_000200/      a distributed checkpoint (weights/), trainer.json, replay.npz; config.toml, inputs.json,
                              versions.json: what it was made with; manifest.json: CRC32s of all of these
weights/v000012-<attempt>/    in HF format, for servers to load (rollout.weight_sync = "disk")
evaluation/v000012-<attempt>/ while collectors evaluate that version: who answers which part, and the answers
checkpoints/latest            a link to the newest complete one; what is not linked from here does not count
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from reval_mcore.config import Config, ConfigError, compare_configs, compare_inputs, dumps, in_words, load
from reval_mcore.durable import crc32, fsync, write_json, write_text

logger = logging.getLogger(__name__)

# the parts of a checkpoint
WEIGHTS, TRAINER_STATE, REPLAY_STATE, MANIFEST = "weights", "trainer.json", "replay.npz", "manifest.json"
CONFIG, INPUTS, VERSIONS = "config.toml", "inputs.json", "versions.json"

TRAINER_LOG = "rank_"  # what the log of each trainer process begins with, in logs/attempt_000/

_LOCK_PATIENCE_S = 2.0  # a process that was just killed may hold its lock for a moment more
_DECIDING_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")  # whose version may change a number


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, and how the configuration now differs from the one that it was made with."""

    checkpoint: Path
    changes: tuple[str, ...]  # all of them accepted
    had_other_settings: bool  # at this start or any before it: shards left behind may be of those


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.replay = path / "replay"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.control = path / "control"
        self.exit_record = self.control / "exit.json"
        self.stop_request = self.control / "stop"  # made by whoever wants the run to stop; the reason is in it
        self.had_other_settings = path / "control" / "had_other_settings"  # a mark; stays once it is there
        self.attempts = path / "logs"
        self._lock: IO[str] | None = None

    # ------------------------------------------------------------ starting

    def open(self, config: Config, *, inputs: Mapping[str, str], allow_changed: Collection[str] = ()) -> Found | None:
        """Make the directory, or find the checkpoint to go on from; None to start from the first iteration.

        `inputs` has a hash of the contents behind each setting that names files. Raises ValueError where another
        process trains here, where the checkpoint is damaged, and where a run that keeps no checkpoints lies here.
        Raises ConfigError with all settings and inputs that changed and decide what is learned, unless
        `allow_changed` names them. A refused start leaves the run as it was.
        """
        self._refuse_what_is_no_run()
        self._take_lock()
        latest = self.latest_checkpoint()
        changes: tuple[str, ...] = ()
        if latest is not None:
            self._verify(latest, only_small=True)
            changes = self._check_changes(latest, config, inputs, allow_changed)
            self._verify(latest)
        elif self.metrics.exists() and self.metrics.stat().st_size > 0:
            self._check_restart(config, allow_changed)
        for directory in (self.checkpoints, self.exit_record.parent):
            directory.mkdir(parents=True, exist_ok=True)
        self._config, self._inputs = dumps(config), dict(inputs)
        if changes:
            write_text(self.had_other_settings, "\n".join(changes) + "\n")
        write_text(self.path / CONFIG, self._config)  # before anything goes: where nothing can be written, nothing does
        self._sweep(latest)
        return None if latest is None else Found(latest, changes, self.had_other_settings.exists())

    def _refuse_what_is_no_run(self) -> None:
        """Raises ValueError where files lie in the places of a run's, and no run: a start would sweep them away."""
        if (self.path / CONFIG).exists():
            return
        places = (self.checkpoints, self.replay, self.metrics, self.summary)
        found = next((path for place in places for path in (place, *place.rglob("*")) if path.is_file()), None)
        if found is not None:
            raise ValueError(
                f"run.directory = {self.path}: holds {found.relative_to(self.path)} and no run; give a new directory"
            )

    def _take_lock(self) -> None:
        """Keep other processes out for as long as this one lives. Raises ValueError where one is at work here."""
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(f"run.directory = {in_words(error)}") from None
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"run.directory = {self.path}: another process trains here; wait for it, or give another "
                        f"directory"
                    ) from None
                time.sleep(0.1)
            except OSError as error:  # a shared filesystem mounted without locks
                logger.warning("%s: no lock (%s); see to it that only one process trains here", self.path, error)
                return

    def _check_changes(
        self, checkpoint: Path, config: Config, inputs: Mapping[str, str], allow_changed: Collection[str]
    ) -> tuple[str, ...]:
        """Accepted changes since the checkpoint, which are logged too. Raises ConfigError with the refused ones."""
        settings = compare_configs(load(checkpoint / CONFIG), config, allowed=allow_changed)
        named = {problem.path for problem in settings.refused}
        contents = compare_inputs(_read_object(checkpoint / INPUTS), inputs, config, allowed=allow_changed)
        refused = [*settings.refused, *(problem for problem in contents.refused if problem.path not in named)]
        if refused:
            raise ConfigError(f"run.directory = {self.path}", refused)
        changes = settings.accepted + contents.accepted
        if changes:
            logger.warning("going on with other settings than before: %s", "; ".join(changes))
        old, new = _read_object(checkpoint / VERSIONS), versions()
        other = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if other:
            logger.warning("going on with other versions, so numbers may differ in their last digits: %s", other)
        return changes

    def _check_restart(self, config: Config, allow_changed: Collection[str]) -> None:
        """A run was here and left no checkpoint: it may start over where it would have left one, as the same run."""
        before = load(self.path / CONFIG)
        if before.checkpoint.interval == "never":
            raise ValueError(
                f"run.directory = {self.path}: holds a run that kept no checkpoints (checkpoint.interval = "
                f'"never"), so it cannot go on; remove it, or give another directory'
            )
        changes = compare_configs(before, config, allowed=allow_changed)
        if changes.refused:
            raise ConfigError(f"run.directory = {self.path}", changes.refused)
        logger.warning("%s: ended before its first checkpoint; starting over", self.path)

    def _sweep(self, latest: Path | None) -> None:
        """Remove what an earlier attempt left behind and what does not count: see the top of this file."""
        for leftover in self.checkpoints.glob(".writing_*"):
            shutil.rmtree(leftover)
        for path in self.kept_checkpoints():
            if latest is None or path.name > latest.name:
                self._remove(path)
        if latest is None:  # start from an empty buffer
            shutil.rmtree(self.replay, ignore_errors=True)
        for stale in (self.exit_record, self.summary):
            stale.unlink(missing_ok=True)

    def begin_attempt(self) -> Path:
        """A new directory for the logs of this start; logs/latest is a link to it."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        path = self.attempts / f"attempt_{len(self._attempts()):03d}"
        path.mkdir()
        link = self.attempts / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(self.attempts / "latest")
        return path

    def join_attempt(self) -> Path:
        """The attempt that a launcher has begun for this start of the trainer; else a new one."""
        begun = self._attempts()
        if begun and not any(begun[-1].glob(f"{TRAINER_LOG}*")):
            return begun[-1]
        return self.begin_attempt()

    def _attempts(self) -> list[Path]:
        return sorted(self.attempts.glob("attempt_*"))

    def cut_metrics(self, first_iteration: int) -> None:
        """Drop what an abandoned future wrote: lines of `first_iteration` and later, and a torn last line."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["iteration"] < first_iteration]
            write_text(self.metrics, "".join(kept))

    # ------------------------------------------------------------ checkpoints

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
        """A directory to write a checkpoint into, invisible until published; what it is made with is in it already."""
        path = self.checkpoints / f".writing_{iteration:06d}"
        shutil.rmtree(path, ignore_errors=True)
        try:
            (path / WEIGHTS).mkdir(parents=True)
            write_text(path / CONFIG, self._config)
            write_json(path / INPUTS, self._inputs)
            write_json(path / VERSIONS, versions())
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path

    def publish_checkpoint(self, written: Path, *, crc32s: Mapping[str, int]) -> Path:
        """Make a written checkpoint the latest.

        `crc32s` has what is known already, by path in the checkpoint: large files are not read again here.
        """
        files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
        manifest = {name: crc32s[name] if name in crc32s else crc32(written / name) for name in files}
        write_json(written / MANIFEST, {"crc32": manifest, "crc32_of_these": _crc32_of(manifest)})
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
        return final

    def remove_checkpoints(self, *, keep: int) -> None:
        """All but the newest `keep`."""
        for old in self.kept_checkpoints()[:-keep]:
            self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Out of sight at once, so that a half-removed one is never taken for one."""
        hidden = checkpoint.with_name(f".writing_old_{checkpoint.name}")
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)

    def _verify(self, checkpoint: Path, *, only_small: bool = False) -> None:
        """Read a checkpoint, whole or all but its weights. Raises ValueError that names its damaged files."""
        try:
            content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            manifest: dict[str, int] = content["crc32"]
            is_whole = content["crc32_of_these"] == _crc32_of(manifest)
        except (OSError, ValueError, KeyError):
            is_whole, manifest = False, {}
        if not is_whole:
            raise self._damage(checkpoint, [MANIFEST])
        files = {name: checkpoint / name for name in manifest if not (only_small and name.startswith(f"{WEIGHTS}/"))}
        damaged = [name for name, path in files.items() if not path.is_file() or crc32(path) != manifest[name]]
        if damaged:
            raise self._damage(checkpoint, damaged)

    def _damage(self, checkpoint: Path, names: Sequence[str]) -> ValueError:
        """The error that names the files, and the checkpoint before this one."""
        older = [path.name for path in self.kept_checkpoints() if path.name < checkpoint.name]
        remedy = "there is no older one; start another run directory"
        if older:
            remedy = f"go on from the one before it: ln -sfn {older[-1]} {self.checkpoints / 'latest'}"
        return ValueError(f"{checkpoint}: damaged ({', '.join(names)}); {remedy}")


def _crc32_of(manifest: Mapping[str, int]) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def versions() -> dict[str, str]:
    """Of this program and of what else decides its numbers."""
    packages = {name: importlib.metadata.version(name) for name in ("reval_mcore", *_DECIDING_PACKAGES)}
    return {"python": platform.python_version(), **packages}


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
