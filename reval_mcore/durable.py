"""Files that survive a power cut: written whole, or not there at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Flush a file; or, of a directory, the renames, creations and removals in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """CRC32 of a whole file, read in pieces."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
