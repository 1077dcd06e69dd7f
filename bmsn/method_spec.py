"""Methods to compare, as text: `mixture,spos,mixture:supernets=4,refresh_every=200,label=refreshed`.

A method is a name of `bmsn.methods`, or such a name, a colon and settings of `SearchConfig`. `label` is how tables call
it; without one it is the text itself. A part without "=", or with a ":" before it, begins the next method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from bmsn import methods
from bmsn.config import SearchConfig
from bmsn.errors import InputError, did_you_mean
from bmsn.field_types import kinds

# What a comparison decides itself, and the option of `bmsn.compare` that says it ("": none does).
RESERVED = {
    "space": "--space", "data": "--data", "pool": "--pool", "epochs": "--budget, the same for all methods",
    "seed": "--seeds and --first-seed", "device": "--device", "truth": "--truth", "out": "--out",
    "method": "the name in front of the colon", "resume": "", "checkpoint_every": "", "tensorboard": "", "latency": "",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One method of a comparison.

    Attributes:
        label: its name in tables, different from those of the others.
        method: a name of `bmsn.methods`.
        settings: fields of `SearchConfig` by name.
    """

    label: str
    method: str
    settings: dict[str, Any]


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """The methods of a text as above.

    Raises:
        InputError: an unknown method or setting, a value of another kind, a setting that is not to be set here, or two
            methods of one label.
    """
    groups: list[list[str]] = []
    for part in (part.strip() for part in text.split(",")):
        before_equals = part.partition("=")[0]
        if "=" in part and ":" not in before_equals:
            if not groups:
                raise InputError(f"methods: a method must come before the setting {part!r}")
            groups[-1].append(part)
        elif part:
            groups.append([part])
    if not groups:
        raise InputError(f"methods must name at least one of {', '.join(methods.names())}; got {text!r}")
    specs = tuple(_parse(group) for group in groups)
    labels = [spec.label for spec in specs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"methods: each needs a label of its own (label=NAME); {', '.join(twice)} stands for several")
    return specs


def _parse(parts: Sequence[str]) -> MethodSpec:
    name, _, first = parts[0].partition(":")
    methods.check_name(name.strip())
    settings: dict[str, Any] = {}
    label = ",".join(parts)
    for part in [first, *parts[1:]] if first else parts[1:]:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key and value):
            raise InputError(f"methods: {','.join(parts)}: settings must be name=value; got {part!r}")
        if key == "label":
            label = value
        else:
            settings |= parse_setting(key, value, f"methods: {','.join(parts)}")
    return MethodSpec(label=label, method=name.strip(), settings=settings)


def parse_settings(text: str) -> dict[str, Any]:
    """Settings for all methods, as `batch_size=64,weight_decay=5e-4`. Raises InputError as `parse_methods`."""
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key and value):
            raise InputError(f"settings must be name=value,name=value; got {part!r}")
        settings |= parse_setting(key, value, "settings")
    return settings


def parse_setting(name: str, text: str, source: str) -> dict[str, Any]:
    """A field of `SearchConfig` and its value, of the field's type; `source` begins the message of errors."""
    known = [field.name for field in fields(SearchConfig) if field.name not in RESERVED]
    if name in RESERVED:
        instead = f": {RESERVED[name]} says it" if RESERVED[name] else ""
        raise InputError(f"{source}: {name} cannot be set for one method of a comparison{instead}")
    if name not in known:
        hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
        raise InputError(f"{source}: setting {name!r} is unknown{hint}")
    # None is left out: not to give a setting.
    admitted = [kind for kind in kinds(get_type_hints(SearchConfig)[name]) if kind is not type(None)]
    for kind in admitted:
        for value in _values(kind, text):
            return {name: value}
    accepted = ", ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in admitted)
    raise InputError(f"{source}: {name} must be {accepted}; got {text!r}")


def _values(kind: Any, text: str) -> list[Any]:
    """The text as a value of that kind, or nothing."""
    if not isinstance(kind, type):
        return [kind] if text == str(kind) else []
    if kind is bool:
        return {"true": [True], "false": [False]}.get(text.lower(), [])
    try:
        return [kind(text)]
    except (TypeError, ValueError):
        return []
