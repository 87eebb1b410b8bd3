"""The `reval` command. Heavy imports come after parsing, so that --help and a refused config answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reval_mcore import __version__
from reval_mcore.config import load


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reval", description="Off-policy, value-based RL post-training of LLMs on megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"reval_mcore {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train from a config, or go on with its run directory")
    _add_config(train)
    train.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on though this field, which decides what is learned, differs from the run's",
    )
    train.set_defaults(execute=_train)

    evaluate = commands.add_parser("eval", help="accuracy of a model on the held-out prompts of a config")
    _add_config(evaluate)
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument("--hf", type=Path, metavar="DIR", help="weights in HF format (default: model.hf_path)")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint of a run")
    evaluate.set_defaults(execute=_evaluate)

    report = commands.add_parser("report", help="draw the learning curve of a run")
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    report.set_defaults(execute=_report)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, for example run.seed=1")


def _train(arguments: argparse.Namespace) -> None:
    config = load(arguments.config, arguments.overrides)
    from .assembly import open_trainer, quiet_libraries

    quiet_libraries()
    with open_trainer(config, allow_changed=arguments.allow_changed) as trainer:
        reason = trainer.run()
    if reason == "finished":
        print(f"finished; {config.run.directory}/summary.json has the figures")
    else:
        print(f"stopped by {reason} after iteration {trainer.progress.iteration}; the same command goes on from there")


def _evaluate(arguments: argparse.Namespace) -> None:
    overrides = list(arguments.overrides)
    if arguments.hf is not None:
        overrides.append(f"model.hf_path='{arguments.hf}'")
    config = load(arguments.config, overrides)
    from .assembly import evaluate_weights, quiet_libraries

    quiet_libraries()
    result = evaluate_weights(config, arguments.checkpoint)
    print(
        f"{result.num_prompts} prompts, {result.num_samples} samples each, temperature {result.temperature:g}, "
        f"top-p {result.top_p:g}, at most {result.max_response_tokens} tokens"
    )
    for name, value in result.metrics().items():
        print(f"{name:24s} {value:g}")


def _report(arguments: argparse.Namespace) -> None:
    from .report import draw_curve

    print(draw_curve(arguments.run))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for an error of the user, told in one message."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.execute(arguments)
    except ValueError as error:
        if arguments.debug:
            raise
        print(f"reval {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
