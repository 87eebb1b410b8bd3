"""How fast a model is converted, and in how much memory: `python -m tools.bench.conversion --help`.

Makes a model of Qwen2.5-Math-7B's shapes with random bf16 weights (as many layers as asked for), converts it both ways,
each in a process of its own, and compares the last result with the first. Before and after each conversion its source
is copied file by file, each fsynced as the tools do it. All of them begin with the source in the page cache, which is
when a copy is fastest. What does not depend on the machine: the ratio to the two copies, and the peak of anonymous
memory (sampled).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SHAPES: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
_FULL_LAYERS = 28
_SAMPLE_S = 0.005
_READ_BYTES = 1 << 24
_COPY = """
import os, pathlib, shutil, sys
def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, target / path.name)
    fsync(target / path.name)
fsync(target)
fsync(target.parent)
"""


@dataclass(frozen=True)
class Step:
    seconds: float  # wall
    cpu_seconds: float
    cpu_seconds_of_others: float  # of the whole machine in that time: other programs, and the kernel's writing to disk
    peak_anonymous_bytes: int


def make_model(directory: Path, num_layers: int) -> tuple[int, int]:
    """Random weights; returns their bytes, and what they were with all layers. One file a layer: little memory."""
    import torch
    from safetensors.torch import save_file

    from reval_mcore.architecture import read_spec
    from reval_mcore.mcore.hf_mapping import hf_shapes

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_SHAPES | {"num_hidden_layers": num_layers}))
    spec = read_spec(directory)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in hf_shapes(spec).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else name
        groups.setdefault(part, {})[name] = shape
    index: dict[str, str] = {}
    total = 0
    for number, (_, shapes) in enumerate(groups.items()):
        file = f"model-{number:05d}.safetensors"
        # random bits of the mantissa and sign under a fixed exponent: as good as a normal distribution here, and fast
        tensors = {
            name: torch.randint(0x3C00, 0x3CFF, shape, dtype=torch.int16).view(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file)
        index |= dict.fromkeys(shapes, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    full = hf_shapes(dataclasses.replace(spec, num_layers=_FULL_LAYERS))
    return total, sum(math.prod(shape) for shape in full.values()) * torch.bfloat16.itemsize


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def _busy_seconds() -> float:
    """CPU time of the machine so far, without idling and waiting."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def measure(*command: str) -> Step:
    """Run a command of this interpreter's. Raises CalledProcessError where it fails."""
    before, busy = os.times(), _busy_seconds()
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_S):
            peak = max(peak, _anonymous_bytes(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    status = process.wait()
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    if status != 0:
        raise subprocess.CalledProcessError(status, command)
    after, others = os.times(), _busy_seconds() - busy
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Step(round(seconds, 2), round(cpu, 2), round(others - cpu, 2), peak)


def _fill_memory(filler: Path) -> None:
    """Have the page cache take all memory that is free, as it is on any machine after a while.

    The pages of new files then take the place of old ones. Memory that is free may have gone back to the host of a
    virtual machine, and costs ten times as much to write to: whoever came first would pay. So nothing is removed, and
    no memory given back, before the last step is done.
    """
    with filler.open("w+b", buffering=0) as file:
        file.truncate(_free_bytes())  # takes no room on the disk
        while file.read(_READ_BYTES):
            pass


def _warm(source: Path) -> None:
    """Nothing is on its way to the disk any more, and the files are in the page cache."""
    os.sync()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))


def _beside_copies(source: Path, *command: str) -> tuple[Step, list[Step]]:
    """(a conversion of the files in `source`, a copy of them before it and one after it)."""

    def copied(name: str) -> Step:
        _warm(source)
        return measure("-c", _COPY, str(source), str(source.with_name(f"{source.name}_copy_{name}")))

    before = copied("before")
    _warm(source)
    step = measure(*command)
    return step, [before, copied("after")]


def _figures(num_bytes: int, step: Step, copies: Sequence[Step], start_s: float, full_bytes: int) -> dict[str, Any]:
    """With all layers: as long for each byte, and once the start of the process."""
    copy_s = sum(copy.seconds for copy in copies) / len(copies)
    full = full_bytes / num_bytes
    return {
        **asdict(step),
        "mb_per_second": round(num_bytes / step.seconds / 1e6),
        "copies": [asdict(copy) for copy in copies],
        "of_the_copy": round(copy_s / step.seconds, 2),
        "of_the_copy_all_layers_extrapolated": round(copy_s * full / (start_s + (step.seconds - start_s) * full), 2),
    }


def run(directory: Path, num_layers: int) -> dict[str, Any]:
    hf, mcore, back = (directory / name for name in ("hf", "mcore", "back"))
    num_bytes, full_bytes = make_model(hf, num_layers)
    _fill_memory(directory / "filler")
    start = measure("-c", "import reval_mcore.conversion.to_hf, reval_mcore.conversion.to_mcore")
    to_mcore = _beside_copies(hf, "-m", "tools.convert_hf_to_mcore", "--hf", str(hf), "--out", str(mcore))
    to_hf = _beside_copies(
        mcore / "weights", "-m", "tools.convert_mcore_to_hf", "--checkpoint", str(mcore), "--out", str(back)
    )
    compare = measure("-m", "tools.inspect_checkpoint", str(hf), str(back))  # fails where a bit differs
    return {
        "device": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "model": f"Qwen2.5-Math-7B's shapes, {num_layers} of {_FULL_LAYERS} layers, bfloat16",
        "num_bytes": num_bytes,
        "page_cache": "the source is in it before every step, conversion or copy; other files filled memory before",
        "start": asdict(start),
        "hf_to_mcore": _figures(num_bytes, *to_mcore, start.seconds, full_bytes),
        "mcore_to_hf": _figures(num_bytes, *to_hf, start.seconds, full_bytes),
        "compare": asdict(compare),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.conversion", description="conversion of a 7B model")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new directory; takes seven times the model")
    parser.add_argument("--num-layers", type=int, default=_FULL_LAYERS, metavar="N", help="of 28 (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    try:
        figures = run(arguments.directory, arguments.num_layers)
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)
    text = json.dumps(figures | {"date": time.strftime("%Y-%m-%d")}, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
