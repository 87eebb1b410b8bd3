"""One real Slurm for the session: slurmctld and four virtual nodes, each a slurmd; nothing of it is left at its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.job import ENDED

ROOT = Path(__file__).parents[2]
MINI = ROOT / "slurm" / "mini" / "mini_slurm.py"
CLUSTER = ROOT / "slurm" / "clusters" / "mini.toml"
SMALL = (  # a run of the demo's task in seconds an iteration
    "rollout.num_prompts=4",
    "rollout.num_responses=4",
    "replay.capacity=64",
    "updates.batch_size=16",
    "updates.per_iteration=1",
    "evaluation.interval='never'",
    "evaluation.max_prompts=4",
    "evaluation.greedy=false",
    "checkpoint.interval=1",
    "logging.tensorboard=false",
    "launch.time_limit_minutes=30",
    "launch.stop_before_s=60",
)


def reason_to_skip() -> str | None:
    if os.geteuid() != 0:
        return "the mini Slurm needs root"
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        return "no Slurm; on Debian: bash slurm/mini/install.sh"
    return None


def processes(*wanted: str) -> list[int]:
    """Living ones with all of these in their environment or command line."""
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        try:
            told = (path / "environ").read_bytes() + (path / "cmdline").read_bytes().replace(b"\0", b" ")
            state = (path / "stat").read_text().rpartition(") ")[2][0]
        except OSError:
            continue
        if state != "Z" and all(word.encode() in told for word in wanted):
            found.append(int(path.name))
    return found


class MiniSlurm:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def mini(self, verb: str, *arguments: str) -> None:
        subprocess.run([sys.executable, str(MINI), verb, str(self.directory), *arguments], check=True, timeout=60)

    def run(self, *command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Any command, as somebody who works on this cluster."""
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def launch(
        self, *arguments: str, program: str = "slurm", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", f"launchers.{program}", *arguments, timeout_s=timeout_s)

    def submit(self, *arguments: str) -> None:
        done = self.launch(*arguments, "--cluster", str(CLUSTER))
        assert done.returncode == 0, done.stdout + done.stderr

    def queue(self) -> str:
        return self.run("squeue", "-h", "-o", "%i %T %N").stdout

    def of(self, run: Path) -> list[int]:
        """Processes of a run that live."""
        return processes(str(run), f"SLURM_CONF={self.directory}/slurm.conf")


@pytest.fixture(scope="session")
def slurm() -> Iterator[MiniSlurm]:
    if (reason := reason_to_skip()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    mini = MiniSlurm(directory)
    try:
        mini.mini("up", "--nodes", "4")
        yield mini
    finally:
        mini.mini("down")
        left = processes(str(directory))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)
    assert not left, "the cluster has left processes behind"


class Run:
    """A run directory, watched from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def settings(self, model: Path, tiny_model: Path) -> tuple[str, ...]:
        return (
            "configs/demo.toml",
            f"run.directory={self.path}",
            f"model.hf_path={model}",
            f"prompts.train={tiny_model}/prompts/train.jsonl",
            f"prompts.held_out={tiny_model}/prompts/held_out.jsonl",
        )

    @property
    def log(self) -> str:
        path = self.path / "launch" / "job.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "launch" / "state.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def iterations(self) -> list[int]:
        return [line["iteration"] for line in self.metrics()]

    def attempts(self) -> list[str]:
        return sorted(path.name for path in (self.path / "logs").glob("attempt_*"))

    def wait(self, what: str, is_so: Callable[[], object], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, f"waited in vain until {what}\n{self.told()}"
            time.sleep(0.2)

    def wait_for_log(self, pattern: str, timeout_s: float = 120.0) -> None:
        self.wait(f"{pattern!r} is in the log", lambda: re.search(pattern, self.log), timeout_s)

    def wait_for_iterations(self, number: int, timeout_s: float = 120.0) -> None:
        self.wait(f"{number} iterations are done", lambda: len(self.iterations()) >= number, timeout_s)

    def wait_for_end(self, standing: str, timeout_s: float = 180.0) -> None:
        self.wait("the run has ended", lambda: self.state["standing"] in ENDED, timeout_s)
        assert self.state["standing"] == standing, self.told()

    def told(self) -> str:
        logs = sorted((self.path / "logs" / "latest").glob("*.log"))
        tails = [f"--- {log.name}\n" + log.read_text(errors="replace")[-1500:] for log in logs]
        return "\n".join([self.log[-4000:], *tails])


@pytest.fixture
def run(slurm: MiniSlurm, tmp_path: Path) -> Iterator[Run]:
    """None of its jobs is left at the end of a test, whatever came of it."""
    run = Run(tmp_path / "run")
    yield run
    slurm.run("scancel", "--user=root")
    run.wait("no job is left", lambda: slurm.queue() == "", timeout_s=60)
