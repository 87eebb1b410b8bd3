"""From a configuration to its rollout engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from reval_mcore.architecture import read_spec
from reval_mcore.config import Config
from reval_mcore.control import read_servers
from reval_mcore.mcore.topology import Topology
from reval_mcore.ranks import Ranks
from reval_mcore.rollout.embedded import EmbeddedEngine
from reval_mcore.rollout.engine import RolloutEngine
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_broadcast import BroadcastSync
from reval_mcore.rollout.weight_sync import DiskSync, WeightSync
from reval_mcore.run_directory import RunDirectory


def make_engine(config: Config, topology: Topology, ranks: Ranks, directory: RunDirectory) -> RolloutEngine:
    """Raises ValueError where there is no server that can be used; waits for the first of those that announce
    themselves."""
    if config.rollout.engine == "sglang":
        engine = _connect_servers(config, topology, ranks, directory)
        try:
            ranks.share(engine.check)
        except BaseException:
            engine.close()
            raise
        return engine
    return embed_engine(config, topology)


def embed_engine(config: Config, topology: Topology) -> EmbeddedEngine:
    return EmbeddedEngine(
        config.model.hf_path,
        dtype=torch.bfloat16 if config.model.precision == "bf16" else torch.float32,
        device=topology.device,
        max_batch_size=config.rollout.max_batch_size,
        has_weights=not config.model.has_checkpoint,
    )


def _connect_servers(config: Config, topology: Topology, ranks: Ranks, directory: RunDirectory) -> SGLangEngine:
    rollout, hf_path = config.rollout, config.model.hf_path
    sync: WeightSync
    timeout_s, control_timeout_s = rollout.weight_sync_timeout_s, rollout.control_timeout_s
    if rollout.weight_sync == "disk":
        sync = DiskSync(directory.weights, companions=hf_path, timeout_s=timeout_s, control_timeout_s=control_timeout_s)
    else:
        backend = "nccl" if topology.device.type == "cuda" else "gloo"
        sync = BroadcastSync(backend=backend, timeout_s=timeout_s, control_timeout_s=control_timeout_s)
    return connect(config, ranks, sync, directory.control)


def connect(config: Config, ranks: Ranks, sync: WeightSync, control: Path, *, collector: str = "") -> SGLangEngine:
    """To the servers that are named, else to those that announce themselves in `control`; a collector, to its own."""
    rollout, told = config.rollout, set[str]()
    return SGLangEngine(
        rollout.servers or (lambda: own_servers(read_servers(control, told=told), collector)),
        sync,
        vocab_size=read_spec(config.model.hf_path).vocab_size,
        api_key=Path(rollout.api_key_file).read_text().strip() if rollout.api_key_file else "",
        max_concurrent_requests=rollout.max_concurrent_requests,
        timeout_s=rollout.request_timeout_s,
        control_timeout_s=rollout.control_timeout_s,
        patience_s=rollout.server_patience_s,
        ranks=ranks,
    )


def own_servers(announced: Mapping[str, str], collector: str) -> list[str]:
    """URLs of the servers, by name, that are called as the collector is, or so with a dot and more; all for ""."""
    return [url for name, url in announced.items() if not collector or f"{name}.".startswith(f"{collector}.")]
