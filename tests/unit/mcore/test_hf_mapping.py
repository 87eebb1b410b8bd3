"""Models read from an HF directory against transformers: logits, exported tensors, key sets, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from reval_mcore.architecture import in_both_forms, read_spec
from reval_mcore.mcore.hf_directory import check_weights
from reval_mcore.mcore.hf_mapping import from_shards, hf_shapes, to_shard
from reval_mcore.mcore.model import build_model, forward_logits
from reval_mcore.mcore.packing import build_micro_batch
from reval_mcore.mcore.weight_export import export_weights
from tests.builders import (
    FAMILY_FIELDS,
    edit_config,
    hf_logits,
    load_hf,
    make_batch,
    make_config,
    same_tensors,
    save_model,
    save_qwen2,
    source_tensors,
)

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from reval_mcore.mcore.topology import Topology


def build(directory: Path, topology: Topology, precision: str = "fp32") -> GPTModel:
    config = make_config(directory, model={"precision": precision})
    return build_model(config.model, read_spec(directory), topology)


def logit_difference(model: GPTModel, directory: Path, topology: Topology) -> float:
    """Largest difference to transformers over ragged sequences of up to 90 tokens."""
    batch = make_batch(5, max_prompt=30, max_response=60, seed=4)
    spec = read_spec(directory)
    micro_batch = build_micro_batch(batch, torch.arange(len(batch)).numpy(), topology.device)
    with torch.no_grad():
        found = forward_logits(model, micro_batch)[0, :, : spec.vocab_size].float().cpu()
        expected = torch.cat(hf_logits(load_hf(directory), batch))
    assert expected.std() > 0.5  # a flat model would agree with anything
    return float((found - expected).abs().max())


def export(model: GPTModel, directory: Path, topology: Topology) -> dict[str, torch.Tensor]:
    weights = export_weights(model, read_spec(directory), topology.groups, bucket_bytes=1 << 14)
    return {name: tensor.cpu() for name, tensor in weights}


FAMILIES = [(family, tied) for family in FAMILY_FIELDS for tied in (False, True)]


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_every_family_has_the_logits_of_transformers_and_exports_its_source(
    family: str, tied: bool, topology: Topology, tmp_path: Path
) -> None:
    """One after the other in this process: nothing of a family's mapping leaks into the next."""
    directory = save_model(family, tmp_path, tie_word_embeddings=tied)
    model = build(directory, topology)
    assert logit_difference(model, directory, topology) < 1e-4
    assert same_tensors(export(model, directory, topology), source_tensors(directory))


def test_an_attention_window_is_a_limit_of_length(topology: Topology, tmp_path: Path) -> None:
    """Mistral 7B v0.1: within its window, attention is what it would be without one."""
    directory = save_model("mistral", tmp_path, sliding_window=90)
    assert read_spec(directory).max_position_embeddings == 90
    assert logit_difference(build(directory, topology), directory, topology) < 1e-4
    assert read_spec(save_model("mistral", tmp_path / "wide", sliding_window=4096)).max_position_embeddings == 128


def test_scaling_of_the_rotary_embedding_would_be_missed(topology: Topology, tmp_path: Path) -> None:
    directory = save_model("llama", tmp_path / "scaled")
    assert read_spec(directory).rope.scaling_factor == 8.0
    plain = save_model("llama", tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert logit_difference(build(plain, topology), directory, topology) > 1e-2


MODELS: Mapping[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "theta_5e5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "one_group": {"num_key_value_heads": 1},
    "no_grouping": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 24},
    "odd_sizes": {"vocab_size": 1003, "hidden_size": 40, "intermediate_size": 66, "num_hidden_layers": 3},
    "large_epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_and_export_equals_the_source(name: str, topology: Topology, tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path, **MODELS[name])
    model = build(directory, topology)
    assert logit_difference(model, directory, topology) < 1e-4
    assert same_tensors(export(model, directory, topology), source_tensors(directory))


def test_tied_untied_and_tied_again_in_one_process(topology: Topology, tmp_path: Path) -> None:
    """Nothing of one model's mapping leaks into the next; each export has the key set of its own source."""
    for step, tied in enumerate([True, False, True]):
        directory = save_qwen2(tmp_path / str(step), seed=step, tie_word_embeddings=tied)
        model = build(directory, topology)
        assert logit_difference(model, directory, topology) < 1e-4
        found = export(model, directory, topology)
        assert ("lm_head.weight" in found) is (not tied)
        assert same_tensors(found, source_tensors(directory))


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_source_is_exported_bit_for_bit(tied: bool, topology: Topology, tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied)
    found = export(build(directory, topology, "bf16"), directory, topology)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert same_tensors(found, source_tensors(directory))


def test_fp32_source_is_rounded_to_bf16_once(topology: Topology, tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path)
    rounded = {name: tensor.bfloat16() for name, tensor in source_tensors(directory).items()}
    assert same_tensors(export(build(directory, topology, "bf16"), directory, topology), rounded)


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("theta", [1e6, 5e5])
def test_config_of_transformers_4_and_5_give_the_same_model(theta: float, topology: Topology, tmp_path: Path) -> None:
    version_5 = save_qwen2(tmp_path / "5", rope_parameters={"rope_type": "default", "rope_theta": theta})
    version_4 = save_qwen2(tmp_path / "4", rope_parameters={"rope_type": "default", "rope_theta": theta})
    edit_config(
        version_4,
        rope_parameters=None,
        layer_types=None,
        dtype=None,
        rope_theta=theta,
        torch_dtype="float32",
        transformers_version="4.57.6",
    )
    assert "rope_parameters" in (version_5 / "config.json").read_text(encoding="utf-8")
    assert read_spec(version_4) == read_spec(version_5)
    assert read_spec(version_4).rope.theta == theta
    # transformers is shown the version 5 file: the reference must not depend on what it makes of the other
    assert logit_difference(build(version_4, topology), version_5, topology) < 1e-4


def test_the_default_rope_theta_would_be_noticed(topology: Topology, tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path / "right")
    wrong = save_qwen2(tmp_path / "wrong")
    edit_config(wrong, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert logit_difference(build(wrong, topology), directory, topology) > 1e-2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba'"),
        ({"model_type": None}, "model_type is missing"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type = 'yarn'"),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type = 'linear'",
        ),
        ({"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0: give a number > 0"),
        ({"hidden_size": "32"}, "hidden_size = '32': give a whole number > 0"),
        ({"vocab_size": True}, "vocab_size = True: give a whole number > 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: does not divide num_attention_heads = 4"),
        ({"num_attention_heads": 6}, "num_attention_heads = 6: does not divide hidden_size = 32"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_interleave": True}, "rope_interleave = True: is not understood"),
        ({"mlp_bias": True}, "mlp_bias = True: is not understood"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures"),
        ({"rope_theta": 1e4}, "contradicts rope_theta = 10000.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 2.0}}, "factor = 2.0"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "factor = None of rope_type = 'llama3'"),
        (
            {"rope_parameters": {**FAMILY_FIELDS["llama"]["rope_parameters"], "low_freq_factor": 2.0}},
            "low_freq_factor = 2.0 of rope_type = 'llama3': is not supported; give a model with 1.0",
        ),
    ],
)
def test_configs_that_would_give_another_model_are_refused_by_field(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    directory = save_qwen2(tmp_path)
    edit_config(directory, **fields)
    with pytest.raises(ValueError) as caught:
        read_spec(directory)
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window = '4096'"),
    ],
)
def test_what_a_family_does_not_have_here_is_refused(
    family: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    directory = save_model(family, tmp_path)
    edit_config(directory, **fields)
    with pytest.raises(ValueError) as caught:
        read_spec(directory)
    assert named in str(caught.value)


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_both_forms_of_config_json_say_what_one_said(family: str, tmp_path: Path) -> None:
    """Also without the form of transformers 5, as version 4 would see it; and transformers 5 reads both as before."""
    from transformers import AutoConfig

    directory = save_model(family, tmp_path)
    spec, before = read_spec(directory), AutoConfig.from_pretrained(directory)
    both = in_both_forms(json.loads((directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(both))
    assert read_spec(directory) == spec
    assert AutoConfig.from_pretrained(directory).rope_parameters == before.rope_parameters
    edit_config(directory, rope_parameters=None)
    assert read_spec(directory) == spec
    again = in_both_forms(json.loads((directory / "config.json").read_text()))
    assert {key: again.get(key) for key in both} == both


def test_a_directory_without_config_or_weights_is_refused(topology: Topology, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_spec(tmp_path)
    assert "no config.json" in str(caught.value)
    directory = save_qwen2(tmp_path / "model")
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError) as caught:
        build(directory, topology)
    assert "no *.safetensors" in str(caught.value)


def test_weights_of_another_shape_or_with_a_tensor_missing_are_refused(topology: Topology, tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path / "narrow")
    edit_config(directory, intermediate_size=96)
    with pytest.raises(ValueError) as caught:
        build(directory, topology)
    assert "mlp.gate_proj.weight" in str(caught.value)
    tied = save_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    edit_config(tied, tie_word_embeddings=False)
    with pytest.raises(ValueError) as caught:
        build(tied, topology)
    assert "lm_head.weight: is missing" in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_the_expected_tensors_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path, **MODELS[name])
    found = {name: tuple(tensor.shape) for name, tensor in source_tensors(directory).items()}
    assert hf_shapes(read_spec(directory)) == found
    check_weights(directory, read_spec(directory))


def one_file(directory: Path, **more: torch.Tensor) -> Path:
    """The same weights, and others, in model.safetensors, which counts more than an index."""
    save_file({**source_tensors(directory), **more}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (
            "model.layers.2.mlp.up_proj.weight",
            torch.zeros(80, 32),
            "is in model.safetensors, and config.json has no place for it",
        ),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int8), "is of type I8 in model.safetensors; F32"),
        ("model.norm.weight", torch.zeros(31), "has shape [31] in model.safetensors, config.json asks for [32]"),
        ("lm_head.weight", torch.zeros(3), None),  # tied, so nobody reads it
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4), None),
    ],
)
def test_weights_are_judged_by_their_headers(name: str, tensor: torch.Tensor, says: str | None, tmp_path: Path) -> None:
    directory = one_file(save_qwen2(tmp_path, tie_word_embeddings=True), **{name: tensor})
    if says is None:
        check_weights(directory, read_spec(directory))
        return
    with pytest.raises(ValueError) as caught:
        check_weights(directory, read_spec(directory))
    start, problem = str(caught.value).split("\n  ")
    assert start.startswith(f"{directory}: the weights do not fit config.json; ")
    assert problem.startswith(f"{name}: {says}")


def test_a_name_in_the_index_alone_is_no_tensor(tmp_path: Path) -> None:
    directory = save_qwen2(tmp_path, tie_word_embeddings=True)
    edit_config(directory, tie_word_embeddings=False)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        check_weights(directory, read_spec(directory))
    assert "lm_head.weight: is missing" in str(caught.value)


# ---------------------------------------------------------------- layouts


def test_fused_layouts_are_as_megatron_core_reads_them(tmp_path: Path) -> None:
    """Rows labelled by origin: query heads of a group, its key, its value; gate then up; cut over two ranks."""
    spec = read_spec(save_qwen2(tmp_path))  # 4 heads of 8 channels in 2 groups, 80 rows in the MLP, hidden size 32
    query = torch.arange(32.0)[:, None].expand(32, 32)
    key, value = 100.0 + torch.arange(16.0)[:, None].expand(16, 32), 200.0 + torch.arange(16.0)[:, None].expand(16, 32)
    gate, up = torch.arange(80.0)[:, None].expand(80, 32), 300.0 + torch.arange(80.0)[:, None].expand(80, 32)
    row = torch.arange(32.0)[None].expand(5, 32)
    for rank in range(2):
        group = slice(16 * rank, 16 * rank + 16), slice(8 * rank, 8 * rank + 8)
        shard = to_shard("qkv", [query, key, value], spec, tp_size=2, tp_rank=rank)
        assert torch.equal(shard, torch.cat([query[group[0]], key[group[1]], value[group[1]]]))
        shard = to_shard("gate_up", [gate, up], spec, tp_size=2, tp_rank=rank)
        assert torch.equal(shard, torch.cat([gate[40 * rank : 40 * rank + 40], up[40 * rank : 40 * rank + 40]]))
        shard = to_shard("row", [row], spec, tp_size=2, tp_rank=rank)
        assert torch.equal(shard, row[:, 16 * rank : 16 * rank + 16])
        assert shard.is_contiguous()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_vocabulary_padding_is_zero_and_stands_at_the_end(tp_size: int, tmp_path: Path) -> None:
    spec = read_spec(save_qwen2(tmp_path, vocab_size=301))
    whole = 1.0 + torch.rand(301, 32)
    shards = [to_shard("vocabulary", [whole], spec, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size)]
    padded = torch.cat(shards)
    assert len(padded) == {1: 384, 2: 512}[tp_size]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(padded[:301], whole)
    assert not padded[301:].any()
    assert torch.equal(from_shards("vocabulary", shards, spec)[0], whole)
