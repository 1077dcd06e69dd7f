"""`SearchConfig` from YAML: `--config`, and a run's config.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from bmsn.config import SearchConfig
from bmsn.errors import InputError


def config_from_mapping(values: Mapping[str, Any], source: str) -> SearchConfig:
    """A config from what a YAML file holds. Raises InputError for an unknown key, naming the nearest known one."""
    known = [entry.name for entry in fields(SearchConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"{source}: key {key!r} is unknown{hint}")
    given = dict(values)
    if isinstance(given.get("out"), str):
        given["out"] = Path(given["out"])
    return SearchConfig(**given)


def load_config(path: Path) -> SearchConfig:
    """A config from a YAML file (`--config`, or a run's config.yaml)."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config {path}: {error}") from error
    if not isinstance(values, dict | None):
        raise InputError(f"config {path}: expected a mapping of settings, got {type(values).__name__}")
    return config_from_mapping(values or {}, f"config {path}")
