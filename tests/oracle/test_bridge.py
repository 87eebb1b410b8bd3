"""Converted checkpoints against megatron-bridge 0.3.1, which shares no code with this project but megatron-core.

A round trip cannot find an error that is made in both directions; another converter can. It runs in an environment of
its own, as it cannot be installed beside transformers 5.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from reval_mcore.architecture import ModelSpec, read_config_json
from reval_mcore.conversion.to_mcore import convert_to_mcore
from reval_mcore.mcore.weight_checkpoint import WEIGHTS, WeightCheckpoint
from tests.builders import FAMILY_FIELDS, save_model

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".bridge_oracle" / "bin" / "python"
_DEADLINE_S = 200.0  # about 15 s of CPU

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS = [f"{family}-{tying}-{dtype}" for dtype in DTYPES for family in FAMILY_FIELDS for tying in ("untied", "tied")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every model hf/NAME, converted/NAME, bridge/NAME.safetensors, and saved/NAME.json, which transformers 5 wrote.

    One process for all, as imports are slow.
    """
    if not PYTHON.exists():
        reason = "no megatron-bridge; make its environment (150 MB): bash tools/bridge_oracle/install.sh"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("bridge")
    for name in ("bridge", "saved"):
        (root / name).mkdir()
    for seed, name in enumerate(MODELS):
        family, tying, dtype = name.split("-")
        save_model(family, root / "hf" / name, seed=seed, dtype=DTYPES[dtype], tie_word_embeddings=tying == "tied")
        convert_to_mcore(root / "hf" / name, root / "converted" / name)
        # transformers 4 reads a config.json of version 5 wrongly, but not the one that is published with the checkpoint
        (root / "hf" / name / "config.json").rename(root / "saved" / f"{name}.json")
        shutil.copyfile(root / "converted" / name / "config.json", root / "hf" / name / "config.json")
    command = [PYTHON, ROOT / "tools" / "bridge_oracle" / "export.py", root / "bridge"]
    done = subprocess.run(
        ["nice", *command, *(root / "hf" / name for name in MODELS)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout
    return root


def converted_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(global name of a parameter, the parameter), by the checkpoint alone: a tensor has one of all layers."""
    checkpoint = WeightCheckpoint(directory / WEIGHTS)
    for key in checkpoint.entries:
        match = re.fullmatch(r"decoder\.layers\.(.*)", key)
        if match is None:
            yield key, checkpoint.read(key, None, 0, checkpoint.shape(key)[0])
        else:
            num_layers, num_rows, *_ = checkpoint.shape(key)
            for layer in range(num_layers):
                yield f"decoder.layers.{layer}.{match[1]}", checkpoint.read(key, layer, 0, num_rows)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_that_of_megatron_bridge(name: str, root: Path) -> None:
    with safe_open(root / "bridge" / f"{name}.safetensors", "pt") as file:
        bridge = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    ours = dict(converted_tensors(root / "converted" / name))
    assert ours.keys() == bridge.keys()
    for key, expected in bridge.items():
        found = ours[key]
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):  # the bridge does not pad them
            assert not found[len(expected) :].any(), key
            found = found[: len(expected)]
        assert found.dtype == expected.dtype, key
        assert torch.equal(raw(found), raw(expected)), key


def as_megatron_core_calls_it(spec: ModelSpec) -> dict[str, object]:
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "vocab_size": spec.vocab_size,
        "seq_length": spec.max_position_embeddings,
        "layernorm_epsilon": spec.norm_epsilon,
        "rotary_base": spec.rope.theta,
        "rope_scaling": spec.rope.scaling_factor != 1.0,
        "rope_scaling_factor": spec.rope.scaling_factor,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "add_qkv_bias": spec.family.qkv_bias,
        "qk_layernorm": spec.family.qk_layernorm,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_config_says_what_megatron_bridge_reads_in_it(name: str, root: Path) -> None:
    with safe_open(root / "bridge" / f"{name}.safetensors", "pt") as file:
        bridge = json.loads(file.metadata()["config"])
    assert as_megatron_core_calls_it(read_config_json(root / "saved" / f"{name}.json")) == bridge
