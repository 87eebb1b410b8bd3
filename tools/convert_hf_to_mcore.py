"""A directory in Hugging Face format -> a megatron-core checkpoint: `python -m tools.convert_hf_to_mcore --help`.

    python -m tools.convert_hf_to_mcore --hf models/Qwen2.5-Math-7B --out models/Qwen2.5-Math-7B-mcore --verify

The result starts a run under any parallel layout (model.hf_path and model.checkpoint, both). Needs no GPU and less than
3 GB of memory, whatever the size of the model; --verify needs 4 bytes a parameter. Killed, the same command goes on.
Exit status 2 is an error of the user, 1 a difference found by --verify.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.conversion import add_common, check_inputs, progress, run, verify


def _convert(arguments: argparse.Namespace) -> int:
    from reval_mcore.conversion.to_mcore import convert_to_mcore, num_bytes

    check_inputs(arguments.hf, arguments)
    total = num_bytes(arguments.hf, arguments.dtype)
    with progress("convert", total) as advance:
        convert_to_mcore(arguments.hf, arguments.out, dtype=arguments.dtype, on_progress=advance)
    print(arguments.out)
    return verify(arguments.hf, arguments.out, arguments, source_is_hf=True, which="policy") if arguments.verify else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="convert_hf_to_mcore", description="Hugging Face format -> megatron-core checkpoint"
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="config.json, safetensors, tokenizer")
    add_common(parser)
    return run("convert_hf_to_mcore", parser, _convert)


if __name__ == "__main__":
    sys.exit(main())
