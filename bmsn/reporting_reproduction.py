"""What a report says about how to reproduce a run: command, settings, machine, data, times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from bmsn.command_line import command_line
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
            blocks.append(value_table(title, values))
    return [*blocks, Text("The settings as config.yaml, for --config:"), Code(_yaml(run.config))]


def search_command(config: Mapping[str, Any]) -> str:
    """The command line with these settings; what stands at its default is left out."""
    return command_line("bmsn.search", config, {field.name: field.default for field in fields(SearchConfig)})


def value_table(title: str, values: Mapping[str, Any]) -> Table:
    rows = [
        Row([cell(name), cell(None if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))])
        for name, value in values.items()
    ]
    return Table((title, "value"), rows)


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).rstrip()
