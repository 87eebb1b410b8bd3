"""Weights for servers on disk: the newest, and nothing that a process which was killed left there."""

from __future__ import annotations

from pathlib import Path

import torch

from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_sync import DiskSync


def test_only_the_newest_version_is_left(tmp_path: Path) -> None:
    companions, weights = tmp_path / "model", tmp_path / "weights"
    companions.mkdir()
    (companions / "config.json").write_text("{}")
    for leftover in ("v000001-dead", ".writing_v000002-dead", ".removing_v000000-dead"):
        (weights / leftover).mkdir(parents=True)
        (weights / leftover / "model-00001.safetensors").write_bytes(b"part of it")
    engine = SGLangEngine([], DiskSync(weights, companions=companions, timeout_s=5.0), vocab_size=8)
    try:
        for version in (3, 4):
            engine.update_weights({"weight": torch.ones(3)}.items, version=version)
            assert [path.name for path in weights.iterdir()] == [f"v{version:06d}-{engine.attempt}"]
    finally:
        engine.close()
