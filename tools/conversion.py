"""What the conversion tools have in common: their arguments, their progress, how they end."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reval_mcore.config import PromptsConfig, in_words

if TYPE_CHECKING:
    import numpy as np

    from reval_mcore.conversion.to_hf import Which


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make; appears when whole")
    parser.add_argument(
        "--dtype",
        choices=("source", "float32", "bfloat16", "float16"),
        default="source",
        help="type of the weights (default: as they are)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read back and compare every tensor, and logits with transformers'"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="with --verify: prompts for the logits (default: random tokens)"
    )
    parser.add_argument("--max-prompts", type=int, default=4, metavar="N", help="of them (default: 4)")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's error")


def run(name: str, parser: argparse.ArgumentParser, execute: Callable[[argparse.Namespace], int]) -> int:
    """Exit status: what `execute` says, or 2 for an error of the user, told in one message."""
    arguments = parser.parse_args()
    _quiet_libraries()
    try:
        return execute(arguments)
    except OSError as error:
        if arguments.debug:
            raise
        print(f"{name}: {in_words(error)}", file=sys.stderr)
    except ValueError as error:
        if arguments.debug:
            raise
        print(f"{name}: {error}", file=sys.stderr)
    return 2


def check_inputs(hf: Path | None, arguments: argparse.Namespace) -> None:
    """Raises ValueError where what is given is not there, before anything is converted."""
    if hf is not None and not hf.is_dir():
        raise ValueError(f"--hf {hf}: there is no such directory; check the path")
    if arguments.prompts is not None and not arguments.prompts.is_file():
        raise ValueError(f"--prompts {arguments.prompts}: there is no such file; check the path")
    if arguments.prompts is not None and not arguments.verify:
        raise ValueError("--prompts: is for --verify; add that, or leave it out")


def _quiet_libraries() -> None:
    """Progress bars and warnings of libraries about their own internals: nobody who converts can act on them."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)


@contextlib.contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Callable[[int, str], None]]:
    """A bar with rate and time left; tensors are named where the terminal is wide enough."""
    from tqdm import tqdm

    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=title, mininterval=0.5, dynamic_ncols=True) as bar:

        def advance(num_bytes: int, name: str) -> None:
            bar.set_postfix_str(name.removeprefix("model."), refresh=False)
            bar.update(num_bytes)

        yield advance


def verify(hf: Path, checkpoint: Path, arguments: argparse.Namespace, *, source_is_hf: bool, which: Which) -> int:
    """Compare a directory in HF format with a checkpoint; returns the exit status, 1 where they differ."""
    from reval_mcore.conversion.compare import CheckpointWeights, HFWeights, differences, num_elements
    from reval_mcore.conversion.logits import compare_logits, synthetic_prompts
    from reval_mcore.conversion.sources import CheckpointSource
    from reval_mcore.mcore.hf_mapping import hf_shapes
    from reval_mcore.mcore.weight_checkpoint import find_weights

    one = HFWeights(hf)
    other = CheckpointWeights(CheckpointSource(find_weights(checkpoint), hf), which=which)
    left, right = (one, other) if source_is_hf else (other, one)
    with progress("compare", num_elements(one.spec) * right.dtype.itemsize) as advance:
        found = list(differences(left, right, cast=True, on_progress=advance))
    for difference in found[:8]:
        print(f"{difference.name}: {difference.says}")
    print(f"tensors: {len(found)} of {len(hf_shapes(one.spec))} differ")
    if which == "reference":
        return int(bool(found))
    prompts = synthetic_prompts(one.spec)
    if arguments.prompts is not None:
        prompts = _read_prompts(arguments.prompts, hf)[: arguments.max_prompts]
    result = compare_logits(hf, checkpoint, prompts, right.dtype)
    print(
        f"logits: of {result.num_prompts} prompts with {result.num_tokens} tokens, differ by up to "
        f"{result.largest_gap:.2e}; the largest is {result.largest_logit:.3g}"
    )
    if not result.agree:
        print("logits: transformers and megatron-core do not agree")
    return int(bool(found) or not result.agree)


def _read_prompts(path: Path, hf: Path) -> Sequence[np.ndarray]:
    import numpy as np

    from reval_mcore.prompts import load_prompts, load_tokenizer

    config = PromptsConfig(train=path, held_out=path, max_tokens=1 << 20)
    return [np.array(prompt.token_ids) for prompt in load_prompts(path, config, load_tokenizer(hf))]
