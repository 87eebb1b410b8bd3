"""README's way from a cluster file to a submitted run: its commands as they stand, the last one as a dry run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launchers.cluster import REPOSITORY


def test_the_three_commands_of_the_readme(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    block = re.search(r"## On Slurm.*?```bash\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    commands = [line.partition("#")[0].strip() for line in block[1].splitlines()]
    assert len(commands) == 3
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("launchers", "reval_mcore", "configs", "slurm"):
        shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    commands[2] += " --dry-run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    told = [
        subprocess.run(
            ["bash", "-c", command],
            cwd=clone,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    ]
    assert told[1] == told[2]
    for expected in (
        "7,615,616,512",
        "#SBATCH --nodes=2",
        "-m launchers.supervisor",
        "nothing speaks against this plan",
    ):
        assert expected in told[1]
