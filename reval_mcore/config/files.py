"""Files that a user names: what is wrong with one, in words. Everything may import this, so everyone says it alike."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PERMISSIONS = "change its permissions or those of its directory, or give another path"
_REMEDIES: Mapping[int, str] = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "part of this path is a file; check it",
    errno.EEXIST: "a file is in the way; give another path",
    errno.EISDIR: "give a file",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "give a path on another filesystem",
    errno.ESTALE: "its network filesystem has lost it; mount that again",
    errno.EMFILE: "raise the limit with ulimit -n",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, then give the same command again"),
}
_GIT_LFS = b"version https://git-lfs"


def in_words(error: OSError) -> str:
    """Place, what is wrong, remedy: "[Errno 13] Permission denied: 'x'" reads like a bug, and has no remedy."""
    if error.errno is None:  # a library's own, in words
        return str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    return f"{place}{error.strerror}{remedy}"


def check_readable(path: Path) -> None:
    """Raises ValueError where a file cannot be opened, or is what Git LFS leaves in place of one not fetched yet.

    Libraries open files in code of their own and tell less: safetensors says "no such file" of one without permission.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_GIT_LFS))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise ValueError(in_words(error)) from None
    if start == _GIT_LFS:
        raise ValueError(f"{path}: is a pointer of Git LFS, not the file itself; fetch that with git lfs pull")


def read_text(path: Path) -> str:
    """Raises ValueError where the file cannot be read, or is not UTF-8."""
    check_readable(path)
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); save it as UTF-8"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file is not there, or holds something else."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: is not JSON ({place}: {error.msg}); the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is JSON but no object; the file is damaged, fetch it again")
    return value
