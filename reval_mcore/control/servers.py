"""Rollout servers that announce themselves: control/servers/<name>.json, a file each, written by whoever starts one.

A file says where a server is meant to be, and not that it answers. One that was killed leaves its file behind; it is
replaced where a server of that name starts again.
"""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

from reval_mcore.durable import make_directory, write_json

logger = logging.getLogger(__name__)

SERVERS = "servers"


def announce_server(control: Path, name: str, url: str) -> None:
    """A server of this name is at `url` from now on, wherever it was before. Raises ValueError, OSError.

    Before it answers or after; trainers and collectors look whether it does.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url = {url!r}: is no URL; write it as http://HOST:PORT")
    path = _path(control, name)
    make_directory(path.parent)
    write_json(path, {"name": name, "url": url.rstrip("/"), "announced_at": time.time()})


def withdraw_server(control: Path, name: str) -> None:
    """There is no server of this name any more, if there was one. Raises ValueError, OSError."""
    _path(control, name).unlink(missing_ok=True)


def read_servers(control: Path, *, told: set[str] | None = None) -> dict[str, str]:
    """URLs of the announced servers by name, ascending. Raises OSError where the folder cannot be read.

    A damaged file is skipped with a warning; one that is in `told` is not given again, and is put there.
    """
    found: dict[str, str] = {}
    told = set() if told is None else told
    for path in sorted((control / SERVERS).glob("*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            name, url = fields["name"], fields["url"]
            if name != path.stem or not isinstance(url, str):
                raise ValueError(f"is of {name!r} at {url!r}")
        except FileNotFoundError:  # withdrawn meanwhile
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            warning = f"{path}: announces no server: {error!r}; remove it, or announce the server again"
            if warning not in told:
                logger.warning("%s", warning)
                told.add(warning)
            continue
        found[name] = url
    return dict(sorted(found.items()))


def _path(control: Path, name: str) -> Path:
    if re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is None:
        raise ValueError(f"name = {name!r}: names a file; give letters, digits, '.', '_' and '-', the first no '.'")
    return control / SERVERS / f"{name}.json"
