"""A run that goes on under another configuration: what differs, and whether that may be."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reval_mcore.config.problems import ConfigError, Problem
from reval_mcore.config.tree import Config

# What these decide is what is learned, or what the numbers in the buffer mean: a run that changed them midway would be
# neither the one run nor the other. Sections, or single fields.
_LEARNED = ("model", "prompts", "reward", "objective", "run.seed", "rollout.stop_token_ids", "verifier.permute_rewards")
_ACCEPT = "set it back, start another run directory, or accept the change with --allow-changed {field}"


@dataclass(frozen=True)
class Changes:
    """How a configuration, or what lies behind it, differs from the one that a run went on with so far."""

    accepted: tuple[str, ...]  # in words
    refused: tuple[Problem, ...]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_learned(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in _LEARNED)


def check_fields(allowed: Collection[str], config: Config) -> None:
    """Raises ConfigError where a name given with --allow-changed is no field."""
    known = [path for path, _ in _flat(config.model_dump())]
    problems = []
    for name in allowed:
        below = [path for path in known if path.startswith(f"{name}.")]
        near = difflib.get_close_matches(name, known, n=1)
        if below:
            problems.append(Problem("--allow-changed", name, f"a section; name the fields, as in {below[0]}"))
        elif name not in known:
            hint = f"did you mean {near[0]}?" if near else "give section.key"
            problems.append(Problem("--allow-changed", name, f"is no field; {hint}"))
    if problems:
        raise ConfigError("command line", problems)


def changed_fields(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """(old, new) value by dotted path, of the fields that differ. The run directory may have moved; it is left out."""
    old, new = (dict(_flat(config.model_dump(mode="json"))) for config in (before, now))
    return {p: (old[p], new[p]) for p in old if old[p] != new[p] and p != "run.directory"}


def compare_configs(before: Config, now: Config, *, allowed: Collection[str]) -> Changes:
    """`allowed` names fields that may change though they decide what is learned.

    Raises ConfigError where one of them is no field.
    """
    check_fields(allowed, now)
    changes = changed_fields(before, now)
    refused = [path for path in changes if _is_learned(path) and path not in allowed]
    return Changes(
        accepted=tuple(f"{path}: {old!r} -> {new!r}" for path, (old, new) in changes.items() if path not in refused),
        refused=tuple(
            Problem(
                path,
                changes[path][1],
                f"the run was made with {changes[path][0]!r}, and this decides what is learned; "
                + _ACCEPT.format(field=path),
            )
            for path in refused
        ),
    )


def compare_inputs(
    before: Mapping[str, str], now: Mapping[str, str], config: Config, *, allowed: Collection[str]
) -> Changes:
    """The same for contents: hashes of what lies behind the settings that name files, by dotted path."""
    values = dict(_flat(config.model_dump(mode="json")))
    changed = [path for path in now if before.get(path) != now[path]]
    return Changes(
        accepted=tuple(f"{path}: other contents in {values[path]}" for path in changed if path in allowed),
        refused=tuple(
            Problem(
                path,
                values[path],
                "holds something else than when the run began; put that back, start another run directory, or accept "
                f"the change with --allow-changed {path}",
            )
            for path in changed
            if path not in allowed
        ),
    )
