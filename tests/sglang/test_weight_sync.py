"""New weights on real servers are the trainer's, whatever its layout and whichever way they went."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.rollout.sglang_server import SGLangServer
from tests.builders import save_like
from tests.distributed.launch import run_distributed
from tests.forks import Forks
from tests.sglang.conftest import Servers
from tests.sglang.servers import API_KEY


def held_checksums(url: str) -> dict[str, str]:
    """By tensor."""

    async def ask() -> dict[str, str]:
        server = SGLangServer(url, API_KEY)
        try:
            return await server.checksums(60.0)
        finally:
            await server.close()

    found = asyncio.run(ask())
    return {name.removeprefix("/0/checksums/"): value for name, value in found.items() if "/checksums/" in name}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "parallel", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["tp2", "pp2"]
)
def test_servers_get_what_the_trainer_has(
    forks: Forks, servers: Servers, tiny_model: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    hf_path = save_like(tiny_model, tmp_path / "model", seed=0)
    arguments = {"hf_path": str(hf_path), "directory": str(tmp_path), "urls": servers(2), "parallel": parallel}
    said = run_distributed(forks, "tests.sglang.sync_cases:train_and_sync", 2, 400.0, arguments)
    trained = {way: json.loads((tmp_path / f"{way}.json").read_text()) for way in ("disk", "distributed")}
    assert trained["disk"] != trained["distributed"]
    for url in servers(2):  # what came last
        held = held_checksums(url)
        assert {name: held[name] for name in trained["distributed"]} == trained["distributed"]
    for line in re.findall(r"weights v.*bytes/s.*", said[0]):
        print(line)
    assert len(re.findall(r"bytes/s.*; 2 of 2 servers have them", said[0])) == 2
