"""What a report says about how to reproduce a run: command, settings, machine, data, times."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from bmsn.config import SearchConfig
from bmsn.reporting_page import Block, Code, Heading, Row, Table, Text, cell
from bmsn.reporting_run import ReportedRun

_SECTIONS = (("environment", "Environment"), ("data", "Data"), ("timings", "Timings"), ("cost", "Cost"))


def reproduction(run: ReportedRun) -> list[Block]:
    """The blocks of a run's last part."""
    commit = run.result.get("environment", {}).get("git_commit")
    known = f"Run with bmsn at commit {commit}." if commit else "The commit of bmsn that it was run with is not known."
    blocks: list[Block] = [Heading("To reproduce"), Text(known), Code(search_command(run.config))]
    for key, title in _SECTIONS:
        values = run.result.get(key)
        if isinstance(values, Mapping) and values:
            blocks.append(_values(title, values))
    return [*blocks, Text("The settings as config.yaml, for --config:"), Code(_yaml(run.config))]


def search_command(config: Mapping[str, Any]) -> str:
    """The command line with these settings; what stands at its default is left out."""
    defaults = {field.name: field.default for field in fields(SearchConfig)}
    words = ["python", "-m", "bmsn.search"]
    for name, value in config.items():
        if value is None or (name in defaults and value == defaults[name]):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _values(title: str, values: Mapping[str, Any]) -> Table:
    rows = [
        Row([cell(name), cell(None if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))])
        for name, value in values.items()
    ]
    return Table((title, "value"), rows)


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).rstrip()
