"""Settings against the type hints of their dataclass. tyro parses flags by the same hints; this is for the other ways
that values come: library calls and YAML files.
"""

from __future__ import annotations

import numbers
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bmsn.errors import InputError, did_you_mean

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_UNFIT = object()


def check_types(config: Any) -> None:
    """Each field of a dataclass must be `fitted` to its type hint, and is; for `__post_init__`, frozen or not."""
    cls: type = type(config)
    for name, hint in _hints(cls).items():
        object.__setattr__(config, name, fitted(name, getattr(config, name), hint))


def fitted(name: str, value: Any, hint: Any) -> Any:
    """The value as what its type hint says.

    Hints may be int, float, bool, str, Path, Literal, None, dataclasses, tuple[X, ...] and unions of these. What is as
    good is taken: an integer for a float, numpy's numbers for Python's, text for a path, a list for a tuple. A bool is
    no number.

    Raises:
        InputError: a value of another kind; has name, accepted kinds or choices (and the nearest), and value.
    """
    admitted = kinds(hint)
    found = _fit_any(value, admitted)
    if found is _UNFIT:
        near = did_you_mean(value, [k for k in admitted if isinstance(k, str)]) if isinstance(value, str) else ""
        raise InputError(f"{name} must be {_in_words(admitted)}; got {value!r}{near}")
    return found


def from_yaml(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field of the dataclass `cls`, as a YAML file holds them, ready for `check_types`.

    Text becomes a number where the field is one: PyYAML takes `1e-3` for text (YAML 1.1 wants 1.0e-3). A whole number
    becomes text where the field is text (`max_macs: 40000000`). All else stays as it is.
    """
    return {name: _as_hinted(value, kinds(_hints(cls)[name])) for name, value in values.items()}


def kinds(hint: Any) -> list[Any]:
    """What a type hint admits: types, `tuple[X, ...]`, and the values of a Literal themselves."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in kinds(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _fit_any(value: Any, admitted: Sequence[Any]) -> Any:
    return next((found for kind in admitted if (found := _fit(value, kind)) is not _UNFIT), _UNFIT)


def _fit(value: Any, kind: Any) -> Any:
    """The value as that kind, or _UNFIT."""
    if get_origin(kind) is tuple:
        if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
            return _UNFIT
        items = [_fit_any(each, kinds(get_args(kind)[0])) for each in value]
        return _UNFIT if any(item is _UNFIT for item in items) else tuple(items)
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
        for number in (kind for kind in (int, float) if kind in admitted):
            with suppress(ValueError):
                return number(value)
    if type(value) is int and str in admitted:
        return str(value)
    return value


def _in_words(admitted: Sequence[Any]) -> str:
    choices = [str(kind) for kind in admitted if not isinstance(kind, type) and get_origin(kind) is not tuple]
    words = [_WORDS.get(kind, kind.__name__) for kind in admitted if isinstance(kind, type) and kind is not type(None)]
    words += [f"several, each {_in_words(kinds(get_args(kind)[0]))}" for kind in admitted if get_origin(kind) is tuple]
    words += [("one of " if len(choices) > 1 else "") + ", ".join(choices)] if choices else []
    return " or ".join(words)
