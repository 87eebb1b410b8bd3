"""Conversions against megatron-core's own checkpoints and safetensors' own reading; cut off, damaged."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from reval_mcore.architecture import read_spec
from reval_mcore.conversion.compare import CheckpointWeights, HFWeights, differences
from reval_mcore.conversion.sources import find_checkpoint
from reval_mcore.conversion.to_hf import convert_to_hf
from reval_mcore.conversion.to_mcore import convert_to_mcore
from reval_mcore.mcore import weight_checkpoint
from reval_mcore.mcore.model import build_model
from tests.builders import (
    FAMILY_FIELDS,
    edit_config,
    make_config,
    same_tensors,
    save_model,
    save_qwen2,
    source_tensors,
)

if TYPE_CHECKING:
    from reval_mcore.mcore.topology import Topology


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("conversion") / "hf", vocab_size=301)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- right


@pytest.mark.parametrize(("family", "tied"), [(family, tied) for family in FAMILY_FIELDS for tied in (False, True)])
def test_a_converted_checkpoint_is_what_megatron_core_writes(
    family: str, tied: bool, topology: Topology, tmp_path: Path
) -> None:
    """The same tensors, cut in the same way; and megatron-core loads it, strictly, into the same weights."""
    from megatron.core import dist_checkpointing

    directory = save_model(family, tmp_path / "hf", vocab_size=301, tie_word_embeddings=tied)
    convert_to_mcore(directory, tmp_path / "converted")
    model = build_model(make_config(directory).model, read_spec(directory), topology)
    (tmp_path / "own").mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path / "own"))
    own, converted = (
        pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("own", "converted/weights")
    )
    assert converted.state_dict_metadata == own.state_dict_metadata
    assert converted.storage_data.keys() == own.storage_data.keys()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path / "converted/weights"))
    assert isinstance(state, dict)
    model.load_state_dict(state)
    assert same_tensors({name: parameter.detach() for name, parameter in model.named_parameters()}, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_a_round_trip_is_the_same_to_the_last_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save_model(family, tmp_path / "hf", dtype=dtype)
    convert_to_mcore(directory, tmp_path / "mcore")
    convert_to_hf(find_checkpoint(tmp_path / "mcore"), tmp_path / "back", max_shard_bytes=30_000)
    assert same_tensors(source_tensors(tmp_path / "back"), source_tensors(directory))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert read_spec(tmp_path / "back") == read_spec(directory)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_tables_are_cut_into_rows(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of large models are, so that no reader holds one whole."""
    monkeypatch.setattr(weight_checkpoint, "_ROWS_OF_TABLE", 50)
    convert_to_mcore(hf, tmp_path / "mcore")
    entry = weight_checkpoint.WeightCheckpoint(tmp_path / "mcore" / "weights").entries["output_layer.weight"]
    assert [tuple(chunk.sizes) for chunk in entry.chunks] == [(50, 32)] * 7 + [(34, 32)]
    convert_to_hf(find_checkpoint(tmp_path / "mcore"), tmp_path / "back")
    assert same_tensors(source_tensors(tmp_path / "back"), source_tensors(hf))


def test_the_manifest_vouches_for_every_source_tensor(hf: Path, tmp_path: Path) -> None:
    convert_to_mcore(hf, tmp_path / "mcore")
    manifest = json.loads((tmp_path / "mcore" / "manifest.json").read_text())
    expected = {name: f"{zlib.crc32(tensor.numpy().tobytes()):08x}" for name, tensor in source_tensors(hf).items()}
    assert {name: entry["crc32"] for name, entry in manifest["source"].items()} == expected
    weights = tmp_path / "mcore" / "weights"
    files = {f"weights/{path.name}": zlib.crc32(path.read_bytes()) for path in weights.iterdir()}
    assert manifest["crc32"] == files


def test_another_type_is_one_rounding(hf: Path, tmp_path: Path) -> None:
    convert_to_mcore(hf, tmp_path / "mcore", dtype="bfloat16")
    convert_to_hf(find_checkpoint(tmp_path / "mcore"), tmp_path / "back", dtype="float32")
    rounded = {name: tensor.bfloat16().float() for name, tensor in source_tensors(hf).items()}
    assert same_tensors(source_tensors(tmp_path / "back"), rounded)
    one, other = HFWeights(hf), CheckpointWeights(find_checkpoint(tmp_path / "mcore"))
    assert list(differences(one, other, cast=True)) == []
    assert len(list(differences(one, other))) == len(rounded)


def test_a_difference_of_one_bit_is_found_and_named(hf: Path, tmp_path: Path) -> None:
    convert_to_mcore(hf, tmp_path / "mcore")
    tensors = source_tensors(hf)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name].view(torch.int32)[3, 5] ^= 1
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_bytes((hf / "config.json").read_bytes())
    found = list(differences(CheckpointWeights(find_checkpoint(tmp_path / "mcore")), HFWeights(other)))
    assert [difference.name for difference in found] == [name]
    assert 0 < found[0].largest < 1e-6


def test_companions_come_along(hf: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for path in hf.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    texts = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "generation_config.json": '{"eos_token_id": 7}'}
    for name, text in texts.items():
        (source / name).write_text(text)
    convert_to_mcore(source, tmp_path / "mcore")
    convert_to_hf(find_checkpoint(tmp_path / "mcore"), tmp_path / "back")
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text
    assert not (tmp_path / "back" / "manifest.json").exists()


# ---------------------------------------------------------------- cut off


class Cut(Exception):
    pass


def cut_at(tensor: str) -> Callable[[int, str], None]:
    def on_progress(num_bytes: int, name: str) -> None:
        if name == tensor:
            raise Cut

    return on_progress


PLACES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_a_conversion_that_was_cut_off_goes_on_and_ends_the_same(
    place: int, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice cut, and a source tensor that is cut into rows in between. Nothing is published before the end."""
    monkeypatch.setattr("reval_mcore.conversion.to_mcore._FILE_BYTES", 10_000)
    monkeypatch.setattr(weight_checkpoint, "_ROWS_OF_TABLE", 100)
    convert_to_mcore(hf, tmp_path / "whole")
    back = tmp_path / "whole_back"
    convert_to_hf(find_checkpoint(tmp_path / "whole"), back, max_shard_bytes=20_000)
    source = find_checkpoint(tmp_path / "whole")
    for tensor in (PLACES[place], PLACES[max(place, 2)]):
        with pytest.raises(Cut):
            convert_to_mcore(hf, tmp_path / "again", on_progress=cut_at(tensor))
        with pytest.raises(Cut):
            convert_to_hf(source, tmp_path / "back", max_shard_bytes=20_000, on_progress=cut_at(tensor))
        assert not (tmp_path / "again").exists()
        assert not (tmp_path / "back").exists()
        for name in ("again", "back"):  # as a library leaves it that writes beside a file first
            (tmp_path / f".{name}.converting" / ".tmpX7").write_bytes(b"half of a part")
    convert_to_mcore(hf, tmp_path / "again")
    convert_to_hf(source, tmp_path / "back", max_shard_bytes=20_000)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert contents(tmp_path / "back") == contents(back)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole_back", "again", "back"}


def test_what_was_left_of_another_source_is_not_taken_up(hf: Path, tmp_path: Path) -> None:
    other = save_qwen2(tmp_path / "other", seed=5, vocab_size=301)
    with pytest.raises(Cut):
        convert_to_mcore(other, tmp_path / "mcore", on_progress=cut_at("lm_head.weight"))
    convert_to_mcore(hf, tmp_path / "mcore")
    assert list(differences(HFWeights(hf), CheckpointWeights(find_checkpoint(tmp_path / "mcore")))) == []


def test_what_was_left_of_another_checkpoint_is_not_taken_up(hf: Path, tmp_path: Path) -> None:
    """Its .metadata is the same to the last byte: only the weights differ."""
    other = save_qwen2(tmp_path / "other_hf", seed=5, vocab_size=301)
    for source, name in ((other, "other"), (hf, "mcore")):
        convert_to_mcore(source, tmp_path / name)
    one, another = (find_checkpoint(tmp_path / name) for name in ("mcore", "other"))
    with pytest.raises(Cut):
        convert_to_hf(another, tmp_path / "back", max_shard_bytes=20_000, on_progress=cut_at("lm_head.weight"))
    convert_to_hf(one, tmp_path / "back", max_shard_bytes=20_000)
    assert same_tensors(source_tensors(tmp_path / "back"), source_tensors(hf))


def test_no_part_that_is_made_from_a_damaged_file_counts(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is mended, its time and size the same, and the conversion goes on with what was right."""
    monkeypatch.setattr("reval_mcore.conversion.to_mcore._FILE_BYTES", 10_000)
    convert_to_mcore(hf, tmp_path / "mcore")
    file = tmp_path / "mcore" / "weights" / "__4_0.distcp"
    data, times = file.read_bytes(), file.stat()
    flipped(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    source = find_checkpoint(tmp_path / "mcore")
    with pytest.raises(ValueError, match=r"__4_0\.distcp: damaged, its CRC32"):
        convert_to_hf(source, tmp_path / "back", max_shard_bytes=5_000)
    assert (tmp_path / ".back.converting" / "progress.jsonl").read_text().count("\n") > 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    convert_to_hf(source, tmp_path / "back", max_shard_bytes=5_000)
    assert same_tensors(source_tensors(tmp_path / "back"), source_tensors(hf))


# ---------------------------------------------------------------- wrong


def truncated(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-100])


def without_a_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def retyped(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = source_tensors(directory)
        save_file({**tensors, name: tensors[name].to(dtype)}, directory / "model.safetensors")

    return change


def with_another(directory: Path) -> None:
    save_file({**source_tensors(directory), "model.norm.bias": torch.zeros(32)}, directory / "model.safetensors")


def without_one(directory: Path) -> None:
    tensors = source_tensors(directory)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")


WRONG: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing shard": (without_a_shard, ("model.safetensors.index.json", "model-00002", "fetch the model again")),
    "truncated": (truncated, ("model-00003-of-", "no whole safetensors file")),
    "integers": (retyped("model.norm.weight", torch.int8), ("model.norm.weight", "I8", "model.safetensors")),
    "two types": (
        retyped("model.norm.weight", torch.bfloat16),
        ("model.safetensors: model.norm.weight is of type BF16, others are of F32", "--dtype bfloat16"),
    ),
    "missing tensor": (without_one, ("model.layers.1.mlp.up_proj.weight: is missing",)),
    "extra tensor": (with_another, ("model.norm.bias: is in model.safetensors, and config.json has no place",)),
    "unknown scaling": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
        ("config.json: rope_type = 'yarn'",),
    ),
    "another config": (
        lambda d: edit_config(d, intermediate_size=96),
        ("mlp.gate_proj.weight: has shape [80, 32] in model-0000", "config.json asks for [96, 32]"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_source_is_refused_by_file_and_tensor(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one message, nothing published."""
    from tools import convert_hf_to_mcore

    directory = save_qwen2(tmp_path / "hf")
    spoil, named = WRONG[case]
    spoil(directory)
    arguments = ["convert_hf_to_mcore", "--hf", str(directory), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    assert convert_hf_to_mcore.main() == 2
    told = capsys.readouterr().err
    assert told.startswith(f"convert_hf_to_mcore: {directory}") or "\nconvert_hf_to_mcore: " in told
    for words in named:
        assert words in told
    assert not (tmp_path / "out").exists()


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no checkpoint": (lambda d: (d / "weights" / ".metadata").unlink(), ("no checkpoint in it",)),
    "torn metadata": (
        lambda d: cut(d / "weights" / ".metadata", 500),
        (".metadata: cannot be read", "damaged"),
    ),
    "truncated": (
        lambda d: cut(d / "weights" / "__0_0.distcp", 9000),
        ("__0_0.distcp: damaged, it is missing or ends too early",),
    ),
    "missing file": (
        lambda d: (d / "weights" / "__0_0.distcp").unlink(),
        ("__0_0.distcp: damaged, it is missing or ends too early",),
    ),
    "a flipped bit": (lambda d: flipped(d / "weights" / "__0_0.distcp"), ("__0_0.distcp: damaged",)),
    "another config": (lambda d: edit_config(d, intermediate_size=96), ("mlp.linear_fc1.weight: has shape",)),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused_by_file_and_tensor(
    case: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import convert_mcore_to_hf

    convert_to_mcore(hf, tmp_path / "mcore")
    spoil, named = WRONG_CHECKPOINTS[case]
    spoil(tmp_path / "mcore")
    arguments = ["convert_mcore_to_hf", "--checkpoint", str(tmp_path / "mcore"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    assert convert_mcore_to_hf.main() == 2
    told = capsys.readouterr().err
    for words in named:
        assert words in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--hf", "{}/nothing"), "--hf {}/nothing: there is no such directory; check the path"),
        (("--hf", "{}/hf", "--prompts", "{}/x", "--verify"), "--prompts {}/x: there is no such file; check the path"),
        (("--hf", "{}/hf", "--prompts", "{}/hf/config.json"), "--prompts: is for --verify; add that, or leave it out"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_done(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tools import convert_hf_to_mcore

    save_qwen2(tmp_path / "hf")
    given = [each.format(tmp_path) for each in arguments]
    monkeypatch.setattr("sys.argv", ["convert_hf_to_mcore", *given, "--out", str(tmp_path / "out")])
    assert convert_hf_to_mcore.main() == 2
    assert capsys.readouterr().err.endswith(f"convert_hf_to_mcore: {told.format(tmp_path)}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
