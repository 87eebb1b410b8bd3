"""`reval replay stats | verify | show | export`: what may be given. What they do is in inspection.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_replay_parser(commands: Any) -> argparse.ArgumentParser:
    """`commands` is argparse's special object for subcommands."""
    replay = commands.add_parser("replay", help="look into a replay buffer")
    actions = replay.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text)
        parser.add_argument("directory", type=Path, metavar="DIR", help="a run directory, or a replay directory")
        return parser

    stats = action("stats", "how many trajectories, how old, how often used")
    stats.add_argument("--json", action="store_true", help="as one JSON object")
    action("verify", "check every checksum, and journal against directory; status 1 on damage")
    show = action("show", "one trajectory as text, with what is known about it")
    show.add_argument("id", metavar="ID", help="a trajectory_id, or the number of a row")
    show.add_argument("--tokens", action="store_true", help="token ids instead of text: needs no tokenizer")
    export = action("export", "write live trajectories to one file")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file: *.parquet or *.jsonl")
    export.add_argument("--verdict", action="append", help="only these (may be given several times)")
    export.add_argument("--finish-reason", action="append", help="only these")
    export.add_argument("--prompt-id", action="append", help="only these")
    export.add_argument("--min-reward", type=float, metavar="R")
    export.add_argument("--max-reward", type=float, metavar="R")
    export.add_argument("--min-version", type=int, metavar="V", help="of the policy at the first response token")
    export.add_argument("--max-version", type=int, metavar="V")
    export.add_argument("--limit", type=int, metavar="N", help="at most N, the newest")
    export.add_argument("--text", action="store_true", help="prompt and response as text too")
    return replay
