"""A megatron-core checkpoint -> a directory in Hugging Face format: `python -m tools.convert_mcore_to_hf --help`.

    python -m tools.convert_mcore_to_hf --checkpoint runs/paper_7b --out models/paper_7b --verify

The checkpoint is one of a run, of any parallel layout, or what tools.convert_hf_to_mcore made. transformers and SGLang
load the result. Needs no GPU and less than 3 GB of memory, whatever the size of the model; --verify needs 4 bytes a
parameter. Killed, the same command goes on. Exit status 2 is an error of the user, 1 a difference found by --verify.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.conversion import add_common, check_inputs, progress, run, verify


def _convert(arguments: argparse.Namespace) -> int:
    from reval_mcore.conversion.sources import find_checkpoint
    from reval_mcore.conversion.to_hf import convert_to_hf, num_bytes

    check_inputs(arguments.hf, arguments)
    source = find_checkpoint(arguments.checkpoint, arguments.hf)
    with progress("convert", num_bytes(source, arguments.dtype)) as advance:
        convert_to_hf(
            source,
            arguments.out,
            which=arguments.which,
            dtype=arguments.dtype,
            max_shard_bytes=arguments.max_shard_bytes,
            on_progress=advance,
        )
    print(arguments.out)
    if not arguments.verify:
        return 0
    return verify(arguments.out, source.weights, arguments, source_is_hf=False, which=arguments.which)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="convert_mcore_to_hf", description="megatron-core checkpoint -> Hugging Face format"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run, one of its checkpoints, a converted model",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="config.json and tokenizer (default: those of the checkpoint)",
    )
    parser.add_argument("--which", choices=("policy", "reference"), default="policy", help="of a run (default: policy)")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=1 << 30, metavar="N", help="size of a safetensors file (default: 1 GiB)"
    )
    add_common(parser)
    return run("convert_mcore_to_hf", parser, _convert)


if __name__ == "__main__":
    sys.exit(main())
