"""`python -m bmsn.export`: one architecture of a search as safetensors, `torch.export` and ONNX."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bmsn.command import parse_flags, run_command
from bmsn.exporting import ExportConfig, run_export
from bmsn.memory import keep_freed_memory

PROGRAM = "python -m bmsn.export"


@dataclass(frozen=True, kw_only=True)
class Command(ExportConfig):
    """Write one architecture of a search as model.safetensors with config.json, model.pt2 and model.onnx.

    Attributes:
        run: folder of a finished search.
    """

    run: Annotated[Path, tyro.conf.Positional] = field()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""

    def run() -> tuple[str, Mapping[str, str]]:
        command = parse_flags(Command, PROGRAM, arguments)
        keep_freed_memory()
        return run_export(command).summary, {}

    return run_command(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
