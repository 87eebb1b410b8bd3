"""Files that survive a power cut and a full disk: written whole, or not there at all."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, a full quota and a limit on files say


def not_written(path: object, error: OSError) -> OSError:
    """The same error with the file in it: writing through a descriptor leaves the name out."""
    return OSError(error.errno, f"not written: {error.strerror or error}", str(path))


def fsync(path: Path) -> None:
    """Flush a file; or, of a directory, the renames, creations and removals in it. Raises OSError that names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, where they are not there, and have their names outlive a power cut."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing or [path]:  # made a moment ago by a process that was killed, it may not be on the disk yet
        fsync(each.parent)


def crc32(path: Path) -> int:
    """CRC32 of a whole file, read in pieces into one buffer: fresh memory for each costs more than reading it."""
    value = 0
    piece = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(piece):
            value = zlib.crc32(piece[:num_bytes], value)
    return value


def raise_if_full(directory: Path) -> None:
    """Raises OSError where a small file cannot be written: the reason that some libraries' writers do not tell."""
    probe = directory / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error
    finally:
        probe.unlink(missing_ok=True)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """To an unbuffered file, which takes what it can at a time: 2 GiB, or what a disk that fills up has room for."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def append(file: FileIO, data: bytes, *, sync: bool = False) -> None:
    """Write all of `data` at the end of `file`, or nothing; with `sync`, all of it on the disk.

    `file` is opened with mode "ab" and buffering=0: a buffer would try again at closing what failed here. Raises
    OSError that names the file, which is then as long as it was.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        write_all(file, data)
        if sync:
            os.fsync(file.fileno())
    except OSError as error:
        file.truncate(size)
        raise not_written(file.name, error) from error


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: temporary file, fsync, rename, fsync of the directory.

    Raises OSError that names `path`, and leaves no temporary file. What was at `path` is still there then, unless only
    the last fsync failed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
