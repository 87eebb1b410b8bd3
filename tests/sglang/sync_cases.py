"""What each rank of a trainer does in test_weight_sync.py."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reval_mcore.architecture import read_spec
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.topology import open_topology
from reval_mcore.ranks import Ranks
from reval_mcore.rollout.engine import GenerationRequest, SamplingParams
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_broadcast import BroadcastSync
from reval_mcore.rollout.weight_sync import DiskSync, WeightSync
from tests.builders import make_batch, make_config, train
from tests.sglang.servers import API_KEY


def train_and_sync(hf_path: str, directory: str, urls: list[str], parallel: dict[str, Any]) -> None:
    """Both ways, two updates apart; what a new version generates must be what the learner scores. Prints seconds."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    torch.set_num_threads(1)
    model = Path(hf_path)
    config = make_config(model, parallel=parallel)
    vocab_size = read_spec(model).vocab_size
    with open_topology(config.parallel) as topology:
        ranks = Ranks(topology.rank, topology.world_size)
        learner = Learner(config, topology)
        ways: dict[str, WeightSync] = {
            "disk": DiskSync(Path(directory) / "weights", companions=model, timeout_s=60.0),
            "distributed": BroadcastSync(backend="gloo", timeout_s=60.0, max_bucket_bytes=100_000),
        }
        for number, (way, sync) in enumerate(ways.items()):
            train(learner, config, 2, seed=50 + number)
            engine = SGLangEngine(urls, sync, vocab_size=vocab_size, api_key=API_KEY, ranks=ranks)
            try:
                weights = partial(learner.export_weights, wanted=engine.wants_weights)
                engine.update_weights(weights, version=7 + number)
                _check(engine, learner, vocab_size, version=7 + number, rank=ranks.rank)
            finally:
                engine.close()
            checksums = _fused_checksums(dict(learner.export_weights()))
            if ranks.is_first:
                (Path(directory) / f"{way}.json").write_text(json.dumps(checksums))


def _check(engine: SGLangEngine, learner: Learner, vocab_size: int, *, version: int, rank: int) -> None:
    """Every rank asks for itself; scoring is collective, so the prompts are the same on all."""
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(0, vocab_size, 1 + i).tolist()) for i in range(6)]
    sampling = SamplingParams(max_response_tokens=8, stop_token_ids=(7,), temperature=0.0)
    responses = engine.generate([GenerationRequest(prompt, 0) for prompt in prompts], sampling)
    batch = make_batch(1)
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = np.array([*prompt, *response.token_ids], np.int32)
        one = replace(
            batch,
            tokens=tokens,
            cu_seqlens=np.array([0, len(tokens)]),
            prompt_lengths=np.array([len(prompt)]),
            loss_mask=np.arange(len(tokens)) >= len(prompt),
            rollout_logprobs=np.zeros(len(tokens), np.float32),
        )
        scored = learner.score(one).logprobs[len(prompt) :]
        np.testing.assert_allclose(response.logprobs, scored, atol=1e-4, err_msg=f"rank {rank}")
        assert [span.version for span in response.version_spans] == [version]


def _fused_checksums(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """As a server on a CPU tells them: the first 8 bytes of SHA-256, of tensors fused as SGLang fuses them."""
    fused: dict[str, torch.Tensor] = {}
    embedding = tensors["model.embed_tokens.weight"]
    padding = embedding.new_zeros(-len(embedding) % 64, embedding.shape[1])  # SGLang's own
    tensors = tensors | {"model.embed_tokens.weight": torch.cat([embedding, padding])}
    for name, tensor in tensors.items():
        for parts, whole in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
            if parts[0] in name:
                tensor = torch.cat([tensors[name.replace(parts[0], part)] for part in parts])
                name = name.replace(parts[0], whole)
        if not any(part in name for part in (".k_proj", ".v_proj", ".up_proj")):
            fused[name] = tensor
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, tensor in fused.items()
    }
