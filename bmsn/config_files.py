"""`SearchConfig` from YAML: `--config`, and a run's config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from bmsn.config import SearchConfig
from bmsn.errors import InputError, did_you_mean
from bmsn.field_types import from_yaml


def config_from_mapping(values: Mapping[str, Any], source: str) -> SearchConfig:
    """A config from what a YAML file holds; text such as 1e-3 is taken as a number where the field is one.

    Raises:
        InputError: an unknown key, naming the nearest known one, or a value that the field does not take.
    """
    known = [entry.name for entry in fields(SearchConfig)]
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
            raise InputError(f"{source}: key {key!r} is unknown{hint}")
    try:
        return SearchConfig(**from_yaml(SearchConfig, values))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def load_config(path: Path) -> SearchConfig:
    """A config from a YAML file (`--config`, or a run's config.yaml)."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config {path}: {error}") from error
    if not isinstance(values, dict | None):
        raise InputError(f"config {path}: expected a mapping of settings, got {type(values).__name__}")
    return config_from_mapping(values or {}, f"config {path}")
