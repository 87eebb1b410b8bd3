"""`reval train` on two SGLang servers learns as it does with the embedded engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.conftest import Servers
from tests.sglang.servers import API_KEY, ROOT


def reval(*arguments: str, timeout_s: float = 1200.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reval_mcore.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


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


@pytest.fixture(scope="module")
def half_way(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model after one iteration: it is right half of the time."""
    run = tmp_path_factory.mktemp("half_way")
    done = reval("train", *settings(tiny_model, tiny_model, run / "run"), "run.num_iterations=1")
    assert done.returncode == 0, done.stderr
    done = reval("export", str(run / "run"), "--out", str(run / "model"))
    assert done.returncode == 0, done.stderr
    return run / "model"


def train(tiny_model: Path, half_way: Path, run: Path, *overrides: str) -> dict[str, Any]:
    done = reval("train", *settings(tiny_model, half_way, run), "run.num_iterations=15", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((run / "summary.json").read_text())


def on_servers(urls: list[str], directory: Path) -> tuple[str, ...]:
    key = directory / "key"
    key.write_text(f"{API_KEY}\n")
    return ("rollout.engine=sglang", f"rollout.servers={json.dumps(urls)}", f"rollout.api_key_file={key}")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_training_on_servers_gains_what_it_gains_in_one_process(
    servers: Servers, tiny_model: Path, half_way: Path, tmp_path: Path
) -> None:
    embedded = train(tiny_model, half_way, tmp_path / "embedded")
    assert 0.4 <= embedded["accuracy_before"] <= 0.6
    run = tmp_path / "sglang"
    summary = train(tiny_model, half_way, run, *on_servers(servers(2), tmp_path))
    evaluation = summary["evaluation"]
    assert evaluation["num_prompts"] * evaluation["num_samples"] == 512
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.10
    assert abs(summary["accuracy_after"] - embedded["accuracy_after"]) <= 0.05
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 15
    assert max(line["mismatch/logprob_abs_max"] for line in lines) < 1e-3
    assert [path.name.partition("-")[0] for path in (run / "weights").iterdir()] == ["v000015"]


def test_servers_that_cannot_be_used_are_named(servers: Servers, tiny_model: Path, tmp_path: Path) -> None:
    """Before anything is trained."""
    (url,) = servers(1)
    overrides = on_servers([url], tmp_path)
    wrong_key = tmp_path / "wrong_key"
    wrong_key.write_text("another")
    for changes, message in (
        (
            ["rollout.servers=['http://127.0.0.1:9']"],
            "none answers; start them first: http://127.0.0.1:9: no connection",
        ),
        ([f"rollout.api_key_file={wrong_key}"], f"{url}/server_info: HTTP 401"),
    ):
        done = reval("train", *settings(tiny_model, tiny_model, tmp_path / "run"), *overrides, *changes)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
