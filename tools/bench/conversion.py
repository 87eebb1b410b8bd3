"""How fast a model is converted, and in how much memory: `python -m tools.bench.conversion --help`.

Makes a model of Qwen2.5-Math-7B's shapes with random bf16 weights (as many layers as asked for), copies its files,
converts them both ways, each in a process of its own, and compares the last result with the first. What does not depend
on the machine: the ratio to the copy in the same run, and the peak of anonymous memory (sampled).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
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
_COPY = """
import os, pathlib, shutil, sys
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, target / path.name)
    with (target / path.name).open("rb") as file:
        os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Step:
    seconds: float  # wall
    cpu_seconds: float
    peak_anonymous_bytes: int

    def speed(self, num_bytes: int) -> float:
        """Bytes of weights a second."""
        return num_bytes / self.seconds


def make_model(directory: Path, num_layers: int) -> int:
    """Random weights; returns their bytes. One file a layer, so that making them takes little memory."""
    import torch
    from safetensors.torch import save_file

    from reval_mcore.architecture import read_spec
    from reval_mcore.mcore.hf_mapping import hf_shapes

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_SHAPES | {"num_hidden_layers": num_layers}))
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in hf_shapes(read_spec(directory)).items():
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
    return total


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def measure(*command: str) -> Step:
    """Run a command of this interpreter's. Raises CalledProcessError where it fails."""
    before = os.times()
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
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Step(round(seconds, 2), round(cpu, 2), peak)


def run(directory: Path, num_layers: int) -> dict[str, Any]:
    hf, copy, mcore, back = (directory / name for name in ("hf", "copy", "mcore", "back"))
    num_bytes = make_model(hf, num_layers)
    os.sync()
    steps: dict[str, Step] = {}
    steps["copy"] = measure("-c", _COPY, str(hf), str(copy))
    shutil.rmtree(copy)
    steps["hf_to_mcore"] = measure("-m", "tools.convert_hf_to_mcore", "--hf", str(hf), "--out", str(mcore))
    steps["mcore_to_hf"] = measure("-m", "tools.convert_mcore_to_hf", "--checkpoint", str(mcore), "--out", str(back))
    steps["compare"] = measure("-m", "tools.inspect_checkpoint", str(hf), str(back))  # fails where a bit differs
    return {
        "device": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "model": f"Qwen2.5-Math-7B's shapes, {num_layers} of {_FULL_LAYERS} layers, bfloat16",
        "num_bytes": num_bytes,
        "steps": {
            name: {
                **asdict(step),
                "mb_per_second": round(step.speed(num_bytes) / 1e6),
                "of_the_copy": round(steps["copy"].seconds / step.seconds, 2),
            }
            for name, step in steps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.conversion", description="conversion of a 7B model")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new directory; takes three times the model")
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
