"""The `reval` command. Heavy imports come after parsing, so that --help and a refused config answer at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from reval_mcore import __version__
from reval_mcore.config import Config, check_fields, in_words, load
from reval_mcore.durable import NO_SPACE
from reval_mcore.replay_cli import add_replay_parser


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
    train.add_argument("--dry-run", action="store_true", help="print the plan of the run by arithmetic, and do nothing")
    train.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: processes (default: one model's)")
    train.add_argument("--gpu-memory-gib", type=float, metavar="GIB", help="with --dry-run: of a GPU (default: 80)")
    train.set_defaults(execute=_train)

    collect = commands.add_parser("collect", help="collect responses for an asynchronous run, beside its trainer")
    _add_config(collect)
    collect.add_argument("--name", required=True, metavar="NAME", help="of this collector: letters, digits, '.', '_'")
    collect.set_defaults(execute=_collect)

    evaluate = commands.add_parser("eval", help="accuracy of a model on the held-out prompts of a config")
    _add_config(evaluate)
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument("--hf", type=Path, metavar="DIR", help="weights in HF format (default: model.hf_path)")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint of a run")
    evaluate.set_defaults(execute=_evaluate)

    export = commands.add_parser("export", help="write the policy of a checkpoint in Hugging Face format")
    export.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    export.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the latest of the run")
    export.set_defaults(execute=_export)

    report = commands.add_parser("report", help="draw the learning curve of a run")
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    report.set_defaults(execute=_report)

    add_replay_parser(commands).set_defaults(execute=_replay)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options; argparse finds those after one only as something unknown."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *(word for word in unknown if not word.startswith("-"))]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="overrides, for example run.seed=1"
    )


class UserError(Exception):
    """Something that the user can mend; the message says what and how."""


_GOES_ON = "it goes on from the last checkpoint, or starts over where there is none"


@contextlib.contextmanager
def _blame_user() -> Iterator[None]:
    """Within it, a ValueError or OSError is about what the user gave: a setting, a file, a directory."""
    try:
        yield
    except OSError as error:
        raise UserError(in_words(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _train(arguments: argparse.Namespace) -> None:
    with _blame_user():
        config = load(arguments.config, arguments.overrides)
        check_fields(arguments.allow_changed, config)
        if arguments.dry_run:
            _print_plan(arguments, config)
            return
        for name in ("world_size", "gpu_memory_gib"):
            if vars(arguments)[name] is not None:
                raise ValueError(f"--{name.replace('_', '-')}: is for a plan; add --dry-run, or leave it out")
    from reval_mcore.assembly import open_trainer, quiet_libraries
    from reval_mcore.rollout.engine import EngineError

    quiet_libraries()
    with contextlib.ExitStack() as stack:
        with _blame_user():  # what is wrong before the first iteration is the user's; later, it is ours
            trainer = stack.enter_context(open_trainer(config, allow_changed=arguments.allow_changed))
        try:
            reason = trainer.run()
        except EngineError as error:
            raise UserError(f"{error}; {_GOES_ON}") from error
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise UserError(f"{in_words(error)}: {_GOES_ON}") from error
    if not trainer.ranks.is_first:
        return
    if reason == "finished":
        print(f"finished; {config.run.directory}/summary.json has the figures")
    else:
        print(f"stopped by {reason} after iteration {trainer.progress.iteration}; the same command goes on from there")


def _collect(arguments: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        with _blame_user():
            config = load(arguments.config, arguments.overrides)
            from reval_mcore.assembly import open_collector, quiet_libraries
            from reval_mcore.rollout.engine import EngineError

            quiet_libraries()
            process = stack.enter_context(open_collector(config, arguments.name))
        try:
            print(f"stopped by {process.run()}")
        except EngineError as error:
            raise UserError(f"{error}; its prompts go to others, the same command collects again") from error


def _print_plan(arguments: argparse.Namespace, config: Config) -> None:
    from reval_mcore.plan import make_plan
    from reval_mcore.plan.text import render

    memory = 80.0 if arguments.gpu_memory_gib is None else arguments.gpu_memory_gib
    plan = make_plan(config, arguments.config, world_size=arguments.world_size, gpu_memory_gib=memory)
    print(render(plan))


@_blame_user()
def _evaluate(arguments: argparse.Namespace) -> None:
    overrides = list(arguments.overrides)
    if arguments.hf is not None:
        overrides.append(f"model.hf_path={json.dumps(str(arguments.hf))}")  # quoted as TOML does it too
    config = load(arguments.config, overrides)
    from reval_mcore.assembly import evaluate_weights, quiet_libraries

    quiet_libraries()
    result = evaluate_weights(config, arguments.checkpoint)
    print(
        f"{result.num_prompts} prompts, {result.num_samples} samples each, temperature {result.temperature:g}, "
        f"top-p {result.top_p:g}, at most {result.max_response_tokens} tokens"
    )
    for name, value in result.metrics().items():
        print(f"{name:24s} {value:g}")


@_blame_user()
def _export(arguments: argparse.Namespace) -> None:
    resolved = arguments.run / "config.toml"
    if not resolved.exists():
        raise ValueError(f"{arguments.run}: no config.toml in it; give a run directory, for example runs/demo")
    config = load(resolved)
    from reval_mcore.assembly import export_checkpoint, quiet_libraries

    quiet_libraries()
    export_checkpoint(config, arguments.checkpoint or arguments.run / "checkpoints" / "latest", arguments.out)
    print(arguments.out)


@_blame_user()
def _report(arguments: argparse.Namespace) -> None:
    from reval_mcore.report import draw_curve

    print(draw_curve(arguments.run))


@_blame_user()
def _replay(arguments: argparse.Namespace) -> int:
    from reval_mcore.inspection import run

    return run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for an error of the user, told in one message. Ours are tracebacks, with status 1.

    `reval replay verify` has status 1 for damage.
    """
    arguments = _parse(argv)
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[console])
    try:
        return arguments.execute(arguments) or 0
    except KeyboardInterrupt:
        if arguments.debug:
            traceback.print_exc()
        print(f"reval {arguments.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except UserError as error:
        if arguments.debug:
            traceback.print_exception(error.__cause__)
        print(f"reval {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
