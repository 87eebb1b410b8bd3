"""TOML files and overrides -> Config, and back."""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from reval_mcore.config.checks import CHECKS
from reval_mcore.config.files import read_text
from reval_mcore.config.problems import MISSING, ConfigError, Problem, problem_of
from reval_mcore.config.tree import Config, Section


def parse(raw: Mapping[str, Any], source: str) -> Config:
    """Check a whole tree of plain values. Raises ConfigError with every problem of every section."""
    problems: list[Problem] = []
    sections: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in Config.model_fields:
            near = difflib.get_close_matches(name, list(Config.model_fields), n=1)
            hint = f"did you mean [{near[0]}]?" if near else f"the sections are {', '.join(Config.model_fields)}"
            problems.append(
                Problem(name, value if not isinstance(value, dict) else MISSING, f"unknown section; {hint}")
            )
    for name, field in Config.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Section)
        value = raw.get(name, {})
        try:
            sections[name] = kind.model_validate(value)
        except ValidationError as error:
            found = [problem_of(item, Config, name) for item in error.errors(include_url=False)]
            problems.extend({problem.path: problem for problem in found}.values())
            if isinstance(value, dict):  # a key too many does not keep the others from being checked together
                with contextlib.suppress(ValidationError):
                    sections[name] = kind.model_validate({k: v for k, v in value.items() if k in kind.model_fields})
    for check, needs in CHECKS:
        if all(name in sections for name in needs):
            problems.extend(check(*(sections[name] for name in needs)))
    if problems:
        raise ConfigError(source, problems)
    return Config(**sections)


def _read_toml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    raw = read_toml(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(str(path), [Problem("extends", base, "not a path; give a string, relative to this file")])
    below, chain = path.parent / base, (*seen, path.resolve())
    if below.resolve() in chain:
        circle = " -> ".join(str(item) for item in (*chain, below.resolve()))
        raise ConfigError(str(path), [Problem("extends", base, f"extends itself ({circle}); break the circle")])
    if not below.exists():
        raise ConfigError(str(path), [Problem("extends", base, f"there is no such file ({below}); check the path")])
    return _merge(_read_toml(below, chain), raw)


def read_toml(path: Path) -> dict[str, Any]:
    """A file as it is. Raises ValueError where it is not there, or is no TOML."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        number = re.search(r"line (\d+)", str(error))
        line = repr(text.splitlines()[int(number[1]) - 1].strip()) if number is not None else "the last line"
        raise ValueError(
            f"{path}: is not TOML: {error}; mend {line} (sections are [name], strings stand in quotes)"
        ) from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise ConfigError(
            "command line", [Problem("override", text, "not of the form section.key=value, for example run.seed=1")]
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string: run.directory=runs/mine needs no quotes
    return {keys[0]: {keys[1]: parsed}}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, the files that it extends, then `section.key=value` overrides; later ones win.

    Raises ConfigError (a ValueError) with all problems, and ValueError where there is nothing to check yet: a file that
    is not there, or is not TOML.
    """
    raw = _read_toml(path)
    for override in overrides:
        raw = _merge(raw, _parse_override(override))
    return parse(raw, str(path))


def dumps(config: Config) -> str:
    """The resolved tree as TOML; `parse` of it gives an equal Config."""
    return tomli_w.dumps(config.model_dump(mode="json"))
