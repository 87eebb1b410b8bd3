"""Whole or not at all, on disks that are full and disks that fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.durable import append, fsync, write_json, write_text
from tests.small_disk import SmallDisk, fill

PAGE = 4096  # what a tmpfs gives out at once


def fail(*_: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def told(error: OSError) -> tuple[int | None, str]:
    return error.errno, str(error)


def append_on_a_full_disk(disk: Path) -> dict[str, Any]:
    path = disk / "lines"
    with path.open("ab", buffering=0) as file:
        append(file, b"a" * (PAGE - 10))
        ballast = fill(disk, leave_kb=0)
        append(file, b"b" * 4)  # in the page that the file has already
        with pytest.raises(OSError) as caught:
            append(file, b"c" * 20)  # the first six bytes fit
        size = path.stat().st_size
        ballast.unlink()
        append(file, b"d" * 20, sync=True)
    return {"told": told(caught.value), "size": size, "tail": path.read_bytes()[PAGE - 10 :].decode()}


def test_an_append_on_a_full_disk_leaves_the_file_as_it_was(small_disk: SmallDisk) -> None:
    found = small_disk.call(append_on_a_full_disk, size_kb=64, timeout_s=30)
    path = small_disk.mount_point / "lines"
    assert found["told"] == [errno.ENOSPC, f"[Errno 28] not written: No space left on device: '{path}'"]
    assert found["size"] == PAGE - 6
    assert found["tail"] == "bbbb" + "d" * 20


def test_an_append_that_cannot_be_synced_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    with path.open("ab", buffering=0) as file:
        append(file, b"one\n", sync=True)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"not written: Input/output error: '.*lines'"):
            append(file, b"two\n", sync=True)
    assert path.read_bytes() == b"one\n"


def replace_on_a_full_disk(disk: Path) -> dict[str, Any]:
    path = disk / "state.json"
    write_text(path, "old")
    ballast = fill(disk, leave_kb=4)
    with pytest.raises(OSError) as caught:
        write_json(path, {"new": "x" * 2 * PAGE})
    kept = path.read_text()
    names = sorted(os.listdir(disk))
    ballast.unlink()
    write_text(path, "new")
    return {"told": told(caught.value), "kept": kept, "names": names, "after": path.read_text()}


def test_a_replacement_on_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk: SmallDisk) -> None:
    found = small_disk.call(replace_on_a_full_disk, size_kb=64, timeout_s=30)
    path = small_disk.mount_point / "state.json"
    assert found["told"] == [errno.ENOSPC, f"[Errno 28] not written: No space left on device: '{path}'"]
    assert (found["kept"], found["after"]) == ("old", "new")
    assert found["names"] == ["ballast", "state.json"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_whatever_fails_in_a_replacement_is_told_by_the_name_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "state.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"not written: Input/output error: '.*/state\.json'"):
            write_text(path, "new")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_fsync_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        fsync(tmp_path)
    assert told(caught.value) == (errno.EIO, f"[Errno 5] Input/output error: '{tmp_path}'")
