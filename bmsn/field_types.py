"""Settings against the type hints of their dataclass. tyro parses flags by the same hints; this is for the other ways
that values come: library calls and YAML files.
"""

from __future__ import annotations

import numbers
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bmsn.errors import InputError, did_you_mean

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_UNFIT = object()


def check_types(config: Any) -> None:
    """Each field of a dataclass must hold what its type hint says; for `__post_init__`, frozen or not.

    Hints may be int, float, bool, str, Path, Literal, None, dataclasses, tuple[X, ...] and unions of these. What is as
    good is taken and becomes the type of the hint: an integer for a float, numpy's numbers for Python's, text for a
    path, a list for a tuple. A bool is no number.

    Raises:
        InputError: a value of another kind; names field, accepted kinds or choices (and the nearest), and value.
    """
    cls: type = type(config)
    for name, admitted in _admitted(cls).items():
        value = getattr(config, name)
        fitted = _fit_any(value, admitted)
        if fitted is _UNFIT:
            choices = [kind for kind in admitted if isinstance(kind, str)]
            hint = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise InputError(f"{name} must be {_in_words(admitted)}; got {value!r}{hint}")
        object.__setattr__(config, name, fitted)


def from_yaml(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field of the dataclass `cls`, as a YAML file holds them, ready for `check_types`.

    Text becomes a number where the field is one: PyYAML takes `1e-3` for text (YAML 1.1 wants 1.0e-3). A whole number
    becomes text where the field is text (`max_macs: 40000000`). All else stays as it is.
    """
    return {name: _as_hinted(value, _admitted(cls)[name]) for name, value in values.items()}


def kinds(hint: Any) -> list[Any]:
    """What a type hint admits: types, `tuple[X, ...]`, and the values of a Literal themselves."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in kinds(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


@cache
def _admitted(cls: type) -> dict[str, list[Any]]:
    hints = get_type_hints(cls)
    return {field.name: kinds(hints[field.name]) for field in fields(cls)}


def _fit_any(value: Any, admitted: Sequence[Any]) -> Any:
    return next((fitted for kind in admitted if (fitted := _fit(value, kind)) is not _UNFIT), _UNFIT)


def _fit(value: Any, kind: Any) -> Any:
    """The value as that kind, or _UNFIT."""
    if get_origin(kind) is tuple:
        items = [_fit_any(each, kinds(get_args(kind)[0])) for each in value] if isinstance(value, list | tuple) else []
        return tuple(items) if isinstance(value, list | tuple) and _UNFIT not in items else _UNFIT
    if not isinstance(kind, type):  # a choice
        return kind if isinstance(value, type(kind)) and value == kind else _UNFIT
    number = {int: numbers.Integral, float: numbers.Real}.get(kind)
    if number is not None:
        return kind(value) if isinstance(value, number) and not isinstance(value, bool) else _UNFIT
    if kind is Path:
        return Path(value) if isinstance(value, str | os.PathLike) else _UNFIT
    return value if isinstance(value, kind) else _UNFIT


def _as_hinted(value: Any, admitted: Sequence[Any]) -> Any:
    if isinstance(value, str):
        for number in (int, float):
            if number in admitted:
                try:
                    return number(value)
                except ValueError:
                    continue
    if type(value) is int and str in admitted:
        return str(value)
    return value


def _in_words(admitted: Sequence[Any]) -> str:
    choices = [str(kind) for kind in admitted if not isinstance(kind, type) and get_origin(kind) is not tuple]
    words = [_WORDS.get(kind, kind.__name__) for kind in admitted if isinstance(kind, type) and kind is not type(None)]
    words += [f"several, each {_in_words(kinds(get_args(kind)[0]))}" for kind in admitted if get_origin(kind) is tuple]
    words += [("one of " if len(choices) > 1 else "") + ", ".join(choices)] if choices else []
    return " or ".join(words)
