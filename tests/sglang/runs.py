"""Runs of `reval` on the demo's task, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.forks import Fork, Forks
from tests.sglang.servers import API_KEY

_REVAL = "reval_mcore.cli"


def reval(forks: Forks, *arguments: str, timeout_s: float = 1200.0) -> subprocess.CompletedProcess[str]:
    return forks.run(_REVAL, *arguments, timeout_s=timeout_s)


def settings(tiny_model: Path, hf_path: Path, run: Path) -> list[str]:
    prompts = tiny_model / "prompts"
    return [
        "configs/demo.toml",
        f"model.hf_path={hf_path}",
        f"prompts.train={prompts}/train.jsonl",
        f"prompts.held_out={prompts}/held_out.jsonl",
        f"run.directory={run}",
        "optimizer.lr=3e-4",  # three times the demo's: 15 iterations must do
        "evaluation.interval='never'",
        "evaluation.max_prompts=256",
        "evaluation.greedy=false",
        "logging.tensorboard=false",
    ]


def on_servers(urls: list[str], directory: Path) -> tuple[str, ...]:
    key = directory / "key"
    key.write_text(f"{API_KEY}\n")
    return ("rollout.engine=sglang", f"rollout.servers={json.dumps(urls)}", f"rollout.api_key_file={key}")


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_iterations(run: Path, number: int, process: Fork) -> None:
    deadline = time.monotonic() + 900.0
    while lines_of(run) < number:
        assert process.poll() is None, "the trainer ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Processes:
    """Of one run; whatever is left is killed at the end."""

    def __init__(self, forks: Forks, directory: Path) -> None:
        self._forks = forks
        self._directory = directory
        self._all: list[Fork] = []

    def start(self, name: str, *arguments: str) -> Fork:
        with (self._directory / f"{name}.log").open("ab") as log:
            process = self._forks.start(_REVAL, *arguments, stdout=log)
        self._all.append(process)
        return process

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text()

    def train(self, *arguments: str, timeout_s: float = 1200.0) -> None:
        """With two collectors beside it; all of them end well."""
        collectors = {name: self.start(name, "collect", *arguments, "--name", name) for name in ("one", "two")}
        trainer = self.start("trainer", "train", *arguments)
        assert trainer.wait(timeout_s) == 0, self.log("trainer")
        for name, collector in collectors.items():
            assert collector.wait(120.0) == 0, self.log(name)

    def kill(self) -> None:
        for process in self._all:
            process.kill()
