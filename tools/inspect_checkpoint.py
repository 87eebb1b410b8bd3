"""What is in a checkpoint, and how two differ: `python -m tools.inspect_checkpoint DIR [OTHER]`.

DIR and OTHER are of either kind: a directory in Hugging Face format, or a megatron-core checkpoint (a run, one of its
checkpoints, a converted model). Tensors are compared under Hugging Face names, to the last bit. Exit status as of diff:
0 the same, 1 different, 2 an error of the user.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tools.conversion import add_debug, progress, run

if TYPE_CHECKING:
    from reval_mcore.conversion.compare import Weights
    from reval_mcore.conversion.to_hf import Which

_MAX_SHOWN = 20
Entry = tuple[str, tuple[int, ...], str, int]  # name, shape, type, bytes of one such tensor


def _is_hf(directory: Path) -> bool:
    return any(directory.glob("*.safetensors"))


def _open(directory: Path, arguments: argparse.Namespace) -> Weights:
    from reval_mcore.conversion.compare import CheckpointWeights, HFWeights
    from reval_mcore.conversion.sources import find_checkpoint

    which: Which = arguments.which
    if _is_hf(directory):
        return HFWeights(directory)
    return CheckpointWeights(find_checkpoint(directory, arguments.hf), which=which)


# ---------------------------------------------------------------- one


def _hf_entries(directory: Path) -> Iterator[Entry]:
    import torch

    from reval_mcore.mcore.weight_files import WeightFiles

    reader = WeightFiles(directory)
    for name in reader:
        tensor = reader[name]
        itemsize = int(re.sub(r"\D", "", tensor.dtype) or 8) // 8 or 1
        yield name, tensor.shape, tensor.dtype, torch.Size(tensor.shape).numel() * itemsize


def _checkpoint_entries(weights: Path) -> Iterator[Entry]:
    from reval_mcore.conversion.tensors import dtype_name
    from reval_mcore.mcore.weight_checkpoint import WeightCheckpoint

    for name, entry in WeightCheckpoint(weights).entries.items():
        dtype = entry.properties.dtype
        yield name, tuple(entry.size), dtype_name(dtype), entry.size.numel() * dtype.itemsize


def _collapsed(entries: Iterator[Entry]) -> Iterator[tuple[str, str, str, int]]:
    """(name, shape, type, bytes), the same tensor of all layers on one line."""
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, int]]] = {}
    for name, shape, dtype, num_bytes in entries:
        number = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name if number is None else name.replace(number[0], ".layers.{}.")
        groups.setdefault((pattern, shape, dtype), []).append((int(number[1]) if number else -1, num_bytes))
    for (pattern, shape, dtype), members in groups.items():
        numbers = sorted(number for number, _ in members)
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        shown = f"{{{numbers[0]}..{numbers[-1]}}}" if whole else str(numbers)
        yield pattern.replace("{}", shown), str(list(shape)), dtype, sum(size for _, size in members)


def _describe(directory: Path, hf: Path | None) -> None:
    from reval_mcore.architecture import read_spec
    from reval_mcore.conversion.sources import find_checkpoint
    from reval_mcore.plan.parameters import num_model_parameters

    if _is_hf(directory):
        kind, place, entries = "Hugging Face format", directory, _hf_entries(directory)
    else:
        source = find_checkpoint(directory, hf)
        kind, place, entries = "megatron-core checkpoint", source.hf, _checkpoint_entries(source.weights)
        state = source.weights.parent / "trainer.json"
        if state.is_file():
            counters = json.loads(state.read_text(encoding="utf-8"))
            kind += f" of a run, after iteration {counters['iteration']}, {counters['num_updates']} updates"
    spec = read_spec(place)
    print(f"{directory}: {kind}; {spec.model_type}, {num_model_parameters(spec):,} parameters")
    rows = list(_collapsed(entries))
    width = max(len(name) for name, *_ in rows)
    for name, shape, dtype, num_bytes in rows:
        print(f"  {name:{width}}  {shape:>22}  {dtype:>9}  {_human(num_bytes):>10}")
    print(f"  {'all':{width}}  {'':>22}  {'':>9}  {_human(sum(row[3] for row in rows)):>10}")


def _human(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    raise AssertionError


# ---------------------------------------------------------------- two


def _differing_fields(left: Weights, right: Weights) -> Mapping[str, tuple[object, object]]:
    one, other = (vars(weights.spec) for weights in (left, right))
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def _compare(arguments: argparse.Namespace) -> int:
    from reval_mcore.conversion.compare import differences, num_elements
    from reval_mcore.mcore.hf_mapping import hf_shapes

    left, right = (_open(directory, arguments) for directory in (arguments.directory, arguments.other))
    fields = _differing_fields(left, right)
    for name, (one, other) in fields.items():
        print(f"config.json: {name}: {one} and {other}")
    if hf_shapes(left.spec).keys() != hf_shapes(right.spec).keys():
        print("these are models with other tensors")
        return 1
    with progress("compare", num_elements(right.spec) * right.dtype.itemsize) as advance:
        found = list(differences(left, right, on_progress=advance))
    for difference in sorted(found, key=lambda each: -each.largest)[:_MAX_SHOWN]:
        print(f"{difference.name}: {difference.says}")
    if len(found) > _MAX_SHOWN:
        print(f"... and {len(found) - _MAX_SHOWN} more")
    num_tensors = len(hf_shapes(left.spec))
    print(
        f"{len(found)} of {num_tensors} tensors differ" if found else f"{num_tensors} tensors, all the same to the bit"
    )
    return int(bool(found or fields))


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.other is not None:
        return _compare(arguments)
    _describe(arguments.directory, arguments.hf)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="inspect_checkpoint", description="what is in a checkpoint; how two differ")
    parser.add_argument("directory", type=Path, metavar="DIR", help="in Hugging Face format, or of megatron-core")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="likewise; compared tensor by tensor")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="config.json of a megatron-core checkpoint without one")
    parser.add_argument(
        "--which",
        choices=("policy", "reference"),
        default="policy",
        help="of a run, to compare (default: policy)",
    )
    add_debug(parser)
    return run("inspect_checkpoint", parser, _inspect)


if __name__ == "__main__":
    sys.exit(main())
