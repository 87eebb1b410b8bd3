"""A directory that appears whole: made beside its final place, part by part, and renamed when it is complete.

    .NAME.converting/progress.jsonl    what it is made from, then a line for each part that is on the disk

A part counts once its line is written. So a run that was killed is taken up where it was, if it would still make the
same; otherwise it starts over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from reval_mcore.config import in_words
from reval_mcore.durable import append, fsync

PROGRESS = "progress.jsonl"


def check_is_new(directory: Path) -> None:
    """Raises ValueError where something is in it already, OSError where it is no directory."""
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: is not empty; give a new directory")


class Staging:
    """`path` is where the parts go; `done` has what was noted of those that are there."""

    def __init__(self, path: Path, final: Path, source: Mapping[str, Any]) -> None:
        """Take up what lies at `path`, or start from nothing."""
        self.path = path
        self._final = final
        self.done: list[dict[str, Any]] = []
        header = json.loads(json.dumps({"source": source}))
        lines = self._lines()
        if lines and lines[0] == header:
            self.done = lines[1:]
            self._sweep({PROGRESS, *(part["file"] for part in self.done)})
        else:
            self._sweep(set())
            self._append(header)

    def _sweep(self, keep: Collection[str]) -> None:
        """Remove all files but those of these names: parts that did not count, and what libraries left of theirs."""
        for entry in self.path.rglob("*"):
            if entry.is_file() and entry.name not in keep:
                entry.unlink()

    def _lines(self) -> list[dict[str, Any]]:
        """Whole lines: a torn one is of a part that did not count."""
        progress = self.path / PROGRESS
        if not progress.exists():
            return []
        data = progress.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        with progress.open("r+b") as file:
            file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, file: Path, part: Mapping[str, Any]) -> None:
        """A part is whole; part["file"] is its name. Returns when it is on the disk. Raises OSError."""
        fsync(file)
        fsync(file.parent)
        self._append(part)
        self.done.append(json.loads(json.dumps(part)))  # as it would be read: the same files, cut off or not

    def _append(self, line: Mapping[str, Any]) -> None:
        with (self.path / PROGRESS).open("ab", buffering=0) as file:
            append(file, json.dumps(line).encode() + b"\n", sync=True)

    def publish(self) -> None:
        (self.path / PROGRESS).unlink()
        for entry in (*self.path.rglob("*"), self.path):
            fsync(entry)
        if self._final.exists():  # empty, or the rename fails
            self._final.rmdir()
        self.path.rename(self._final)
        fsync(self._final.parent)


@contextlib.contextmanager
def staged(final: Path, source: Mapping[str, Any]) -> Iterator[Staging]:
    """Within it, parts are made; call `publish` last. An OSError leaves the parts that are done, for the next time.

    `source` says all that decides the result. Raises ValueError where `final` is not empty, cannot be made, or is being
    made by another process.
    """
    check_is_new(final)
    path = final.parent / f".{final.name}.converting"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (final.parent / f".{final.name}.lock").open("w")
    except OSError as error:
        raise ValueError(in_words(error)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{final}: another process is making it; wait for it, or give another directory") from None
        yield Staging(path, final, source)
        Path(lock.name).unlink()
