"""What is wrong with a configuration, in words: place, value found, remedy."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    path: str  # dotted path of the field
    value: object  # as found; MISSING where there is none
    remedy: str  # what is wrong and what to do

    def __str__(self) -> str:
        shown = "" if self.value is MISSING else f" = {_toml(self.value)}"
        return f"{self.path}{shown}: {self.remedy}"


class _Missing(enum.Enum):
    """The one value of its type, on the far side of a pickle too."""

    MISSING = enum.auto()


MISSING = _Missing.MISSING


class ConfigError(ValueError):
    """All problems of one configuration."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__(source, problems)  # what pickle makes it of again, on the other ranks of a run
        self.source = source
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n  ".join([f"{self.source}: {count}", *map(str, self.problems)])


_MAX_VALUE_CHARS = 200  # a list of every prompt's id in the wrong place need not fill the screen


def _toml(value: object) -> str:
    """The value as one line of TOML, cut where it is very long."""
    text = _inline(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}..."


def _inline(value: object) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_inline(item)}' for key, item in value.items())}}}"
    try:
        return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
    except TypeError:
        return repr(value)


_REMEDIES: Mapping[str, str] = {
    "missing": "required, and has no default; set it",
    "int_type": "not a whole number; give one",
    "int_parsing": "not a whole number; give one",
    "int_from_float": "not a whole number; give one",
    "float_type": "not a number; give one",
    "float_parsing": "not a number; give one",
    "bool_type": "not true or false; give one of them",
    "bool_parsing": "not true or false; give one of them",
    "string_type": 'not a string; put it in quotes ("...")',
    "path_type": 'not a path; give a string in quotes ("...")',
    "tuple_type": "not a list; write [a, b, ...]",
    "model_type": "not a table; write it as [section] with key = value lines",
    "finite_number": "not a finite number; give one",
}


def _remedy(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _REMEDIES:
        return _REMEDIES[kind]
    if kind == "literal_error":
        return f"not a choice; give one of {context['expected']}"
    bounds = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"out of range; give a value {bounds[kind]} {limit:g}"
    return str(error["msg"]).removeprefix("Value error, ")


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _known_keys(kind, f"{prefix}{name}.")


def problem_of(error: Mapping[str, Any], tree: type[BaseModel], *prefix: str) -> Problem:
    """One of pydantic's errors, of a part of `tree` that `prefix` leads to."""
    path = ".".join([*prefix, *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, list(_known_keys(tree)), n=1)
        remedy = "unknown key; " + (f"did you mean {near[0]}?" if near else "remove it")
        return Problem(path, error["input"], remedy)
    value = MISSING if error["type"] == "missing" else error["input"]
    return Problem(path, value, _remedy(error))
