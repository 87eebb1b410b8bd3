"""What a disk may hold after a power cut: file operations are recorded, and any prefix of them is played again.

`record` writes down what Python code does to files below a directory. `Recording.after(length, choice)` is a state that
a crash after `length` operations may leave: what was fsynced by then is there; of the rest each operation is there or
not, as `choice` has it, whatever the order. Data go to the disk by an fsync of the file, names by one of the directory.
A rename is a new name and an old one that goes; a crash may show both, never neither. Writing what a crash loses may
also leave zeros, or its first half.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

Fate = Literal["kept", "lost", "zeros", "half"]
Choice = Callable[["Operation"], Fate]


@dataclass(frozen=True)
class Operation:
    number: int
    kind: Literal["write", "truncate", "name", "unname", "mkdir", "sync", "ack"]
    path: str = ""  # relative: of a name or a directory
    file: int = -1  # which file, whatever its name is now
    offset: int = 0
    data: bytes = b""
    needs: int = -1  # the operation without which this one is not: a rename's new name before its old one goes
    ack: Any = None  # what was promised from here on

    @property
    def is_data(self) -> bool:
        return self.kind in ("write", "truncate")

    @property
    def folder(self) -> str:
        return _folder(self.path)


@dataclass
class Recording:
    root: Path
    operations: list[Operation] = field(default_factory=list)
    _files: dict[str, int] = field(default_factory=dict)  # by name as it is now
    _num_files: int = 0

    def add(self, kind: Any, **fields: Any) -> Operation:
        operation = Operation(len(self.operations), kind, **fields)
        self.operations.append(operation)
        return operation

    def promise(self, what: Any) -> None:
        """From now on a crash must not take this away."""
        self.add("ack", ack=what)

    def promised(self, length: int) -> list[Any]:
        return [each.ack for each in self.operations[:length] if each.kind == "ack"]

    # ------------------------------------------------------------ while it happens

    def inside(self, path: Any) -> str | None:
        text = os.path.abspath(os.fsdecode(path))
        return str(Path(text).relative_to(self.root)) if Path(text).is_relative_to(self.root) else None

    def opened(self, name: str, *, is_new: bool, is_emptied: bool) -> int:
        if is_new:
            self._num_files += 1
            self._files[name] = self._num_files
            self.add("name", path=name, file=self._num_files)
        elif is_emptied:
            self.add("truncate", file=self._files[name], offset=0)
        return self._files[name]

    def renamed(self, source: str, target: str) -> None:
        file = self._files.pop(source)
        self._files[target] = file
        new = self.add("name", path=target, file=file)
        self.add("unname", path=source, file=file, needs=new.number)

    def synced(self, name: str) -> None:
        if (self.root / name).is_dir():
            self.add("sync", path=name)
        else:
            self.add("sync", file=self._files[name])

    # ------------------------------------------------------------ afterwards

    def _is_durable(self, operation: Operation, length: int) -> bool:
        later = (each for each in self.operations[operation.number : length] if each.kind == "sync")
        if operation.is_data:
            return any(each.file == operation.file for each in later)
        return any(each.path == operation.folder for each in later)

    def after(self, length: int, choice: Choice) -> Tree:
        """What a crash after `length` operations may leave."""
        names: dict[str, int] = {}
        folders = {"."}
        contents: dict[int, bytearray] = {}
        applied: set[int] = set()
        for operation in self.operations[:length]:
            fate: Fate = "kept" if self._is_durable(operation, length) else choice(operation)
            is_possible = operation.needs < 0 or operation.needs in applied
            if fate == "lost" or not is_possible or operation.kind in ("sync", "ack"):
                continue
            applied.add(operation.number)
            content = contents.setdefault(operation.file, bytearray())
            match operation.kind:
                case "write":
                    _write(content, operation, fate)
                case "truncate":
                    del content[operation.offset :]
                case "name":
                    names[operation.path] = operation.file
                case "unname":
                    if names.get(operation.path) == operation.file:
                        del names[operation.path]
                case "mkdir":
                    folders.add(operation.path)
        whole = {folder for folder in folders if all(str(parent) in folders for parent in Path(folder).parents)}
        files = {name: bytes(contents.get(file, b"")) for name, file in names.items()}
        return Tree(frozenset(whole), tuple(sorted(item for item in files.items() if _folder(item[0]) in whole)))


@dataclass(frozen=True)
class Tree:
    """Folders and files, by relative names."""

    folders: frozenset[str]
    files: tuple[tuple[str, bytes], ...]

    def make(self, target: Path) -> None:
        """A directory that is not there yet."""
        target.mkdir(parents=True)
        for folder in sorted(self.folders):
            (target / folder).mkdir(exist_ok=True)
        for name, content in self.files:
            (target / name).write_bytes(content)


def _folder(path: str) -> str:
    return str(Path(path).parent)


def _write(content: bytearray, operation: Operation, fate: Fate) -> None:
    data = {"zeros": bytes(len(operation.data)), "half": operation.data[: len(operation.data) // 2]}.get(
        fate, operation.data
    )
    content.extend(bytes(max(operation.offset - len(content), 0)))
    content[operation.offset : operation.offset + len(data)] = data


@contextlib.contextmanager
def record(root: Path) -> Iterator[Recording]:
    """What this process does to files below `root`, a directory, by Python's own functions (pyarrow's are not seen)."""
    recording = Recording(root)
    opening, fsync, mkdir = io.open, os.fsync, os.mkdir

    class File(io.FileIO):
        def __init__(self, path: Any, mode: str, name: str) -> None:
            is_new = not os.path.exists(path)
            super().__init__(path, mode)
            self.file = recording.opened(name, is_new=is_new, is_emptied="w" in mode)

        def write(self, data: Any) -> int:
            written = super().write(data)
            start = self.tell() - written
            recording.add("write", file=self.file, offset=start, data=bytes(memoryview(data).cast("B")[:written]))
            return written

        def truncate(self, size: int | None = None) -> int:
            recording.add("truncate", file=self.file, offset=self.tell() if size is None else size)
            return super().truncate(size)

    def open_recorded(path: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        name = None if isinstance(path, int) else recording.inside(path)
        if name is None or not set(mode) & set("wax+"):
            return opening(path, mode, buffering, *rest, **options)
        assert "b" in mode, "text is not needed so far"
        raw = File(path, mode.replace("b", ""), name)
        return raw if buffering == 0 else io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def fsync_recorded(descriptor: int) -> None:
        fsync(descriptor)
        name = recording.inside(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name is not None:
            recording.synced(name)

    def mkdir_recorded(path: Any, *rest: Any, **options: Any) -> None:
        mkdir(path, *rest, **options)
        recording.add("mkdir", path=recording.inside(path))

    def moved(original: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any) -> None:
            original(source, target)
            recording.renamed(str(recording.inside(source)), str(recording.inside(target)))

        return move

    def removed(original: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Any) -> None:
            original(path)
            name = str(recording.inside(path))
            recording.add("unname", path=name, file=recording._files.pop(name))

        return remove

    patches = {"fsync": fsync_recorded, "mkdir": mkdir_recorded}
    patches |= {name: moved(getattr(os, name)) for name in ("rename", "replace")}
    patches |= {name: removed(getattr(os, name)) for name in ("unlink", "remove")}
    with mock.patch.object(io, "open", open_recorded), mock.patch.multiple(os, **patches):
        yield recording


def choices() -> dict[str, Choice]:
    """What may become of operations that were not fsynced: from all of it to nothing, and mixtures."""

    def mixed(seed: int) -> Choice:
        fates: list[Fate] = ["kept", "lost", "zeros", "half"]
        return lambda operation: fates[hash((seed, operation.number)) % (4 if operation.kind == "write" else 2)]

    fixed: dict[str, tuple[Fate, Fate]] = {  # of data, of names
        "all": ("kept", "kept"),
        "nothing": ("lost", "lost"),
        "names only": ("lost", "kept"),
        "names and zeros": ("zeros", "kept"),
        "names and halves": ("half", "kept"),
        "data only": ("kept", "lost"),
    }
    found: dict[str, Choice] = {
        name: lambda operation, data=data, names=names: data if operation.is_data else names
        for name, (data, names) in fixed.items()
    }
    found["mixture"] = mixed(0)
    # what a truncation becomes is there or not: zeros and halves are of writes
    return {
        name: lambda operation, choice=choice: (
            fate if (fate := choice(operation)) in ("kept", "lost") or operation.kind == "write" else "lost"
        )
        for name, choice in found.items()
    }


def states(recording: Recording) -> Iterator[tuple[int, str, Tree]]:
    """(length of the prefix, what became of the rest, what is left), for every prefix and choice that make one."""
    before: set[Tree] = set()
    for length in range(len(recording.operations) + 1):
        if length and recording.operations[length - 1].kind == "ack":
            before = set()  # more is promised now, of the same states too
        for name, choice in choices().items():
            tree = recording.after(length, choice)
            if tree not in before:
                before.add(tree)
                yield length, name, tree
