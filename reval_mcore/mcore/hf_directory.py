"""A directory in Hugging Face format as the model's weights: judged by its headers, and read slice by slice."""

from __future__ import annotations

from pathlib import Path

import torch

from reval_mcore.architecture import ModelSpec
from reval_mcore.mcore.hf_mapping import global_names, hf_names, hf_shapes, to_shard
from reval_mcore.mcore.weight_files import SAFETENSORS_DTYPES, WeightFiles

_MAX_PROBLEMS_SHOWN = 8


def check_weights(directory: Path, spec: ModelSpec) -> WeightFiles:
    """The files, where they fit the spec. Raises ValueError with all that does not, from their headers alone.

    A tensor too many is refused as well: where config.json has fewer layers than the weights, all the others fit.
    """
    reader, shapes = WeightFiles(directory), hf_shapes(spec)
    problems: list[str] = []
    for name, shape in shapes.items():
        if name not in reader:
            problems.append(f"{name}: is missing")
        elif reader[name].shape != shape:
            found = f"has shape {list(reader[name].shape)} in {reader.file_of(name)}"
            problems.append(f"{name}: {found}, config.json asks for {list(shape)}")
        elif reader[name].dtype not in SAFETENSORS_DTYPES:
            found = f"is of type {reader[name].dtype} in {reader.file_of(name)}"
            problems.append(f"{name}: {found}; F32, F16 and BF16 can be trained")
    # some writers save these though nobody reads them
    unread = {"lm_head.weight"} | {name for name in reader if name.endswith(".rotary_emb.inv_freq")}
    for name in sorted({*reader} - {*shapes} - unread):
        problems.append(f"{name}: is in {reader.file_of(name)}, and config.json has no place for it")
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS_SHOWN} more"] if len(problems) > _MAX_PROBLEMS_SHOWN else []
        start = f"{directory}: the weights do not fit config.json; fetch both again, from the same model"
        raise ValueError("\n  ".join([start, *problems[:_MAX_PROBLEMS_SHOWN], *more]))
    return reader


@torch.no_grad()
def load_weights(model: torch.nn.Module, directory: Path, spec: ModelSpec, *, tp_size: int, tp_rank: int) -> None:
    """Fill this rank's parameters from an HF directory, reading only the slices that it holds.

    Raises ValueError where weights and spec do not fit: see `check_weights`.
    """
    reader = check_weights(directory, spec)
    for name, parameter in global_names(model):
        layout, sources = hf_names(name, spec)
        shard = to_shard(layout, [reader[source] for source in sources], spec, tp_size=tp_size, tp_rank=tp_rank)
        assert shard.shape == parameter.shape, f"{name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
        parameter.copy_(shard)
