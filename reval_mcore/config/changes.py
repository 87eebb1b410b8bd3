"""A run that goes on under another configuration: what differs, and whether that may be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from reval_mcore.config.problems import ConfigError, Problem
from reval_mcore.config.tree import Config

# What these decide is what is learned, or what the numbers in the buffer mean: a run that changed them midway would be
# neither the one run nor the other. Sections, or single fields.
_LEARNED = ("model", "prompts", "reward", "objective", "run.seed", "rollout.stop_token_ids", "verifier.permute_rewards")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_learned(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in _LEARNED)


def changed_fields(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """(old, new) value by dotted path, of the fields that differ. The run directory may have moved; it is left out."""
    old, new = (dict(_flat(config.model_dump(mode="json"))) for config in (before, now))
    return {p: (old[p], new[p]) for p in old if old[p] != new[p] and p != "run.directory"}


def check_changes(before: Config, now: Config, *, allowed: Collection[str], source: str) -> list[str]:
    """One line for each change that is accepted.

    Raises ConfigError with every change of what is learned that `allowed` (dotted paths) does not name.
    """
    known = dict(_flat(now.model_dump()))
    unknown = [path for path in allowed if path not in known]
    if unknown:
        raise ConfigError("command line", [Problem("--allow-changed", path, "is no field") for path in unknown])
    changes = changed_fields(before, now)
    refused = [path for path in changes if _is_learned(path) and path not in allowed]
    if refused:
        raise ConfigError(
            source,
            [
                Problem(
                    path,
                    changes[path][1],
                    f"the run was made with {changes[path][0]!r}, and this decides what is learned; set it back, start "
                    f"another run directory, or accept the change with --allow-changed {path}",
                )
                for path in refused
            ],
        )
    return [f"{path}: {old!r} -> {new!r}" for path, (old, new) in changes.items()]
