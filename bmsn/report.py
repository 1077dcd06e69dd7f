"""`python -m bmsn.report`: runs as one HTML page, or what training two architectures in one supernet does to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bmsn.command import parse_flags, run_command
from bmsn.errors import InputError
from bmsn.interference import InterferenceConfig, run_interference
from bmsn.memory import keep_freed_memory

PROGRAM = "python -m bmsn.report"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Write one HTML page about runs of bmsn.search and bmsn.compare, with its figures as PNG and SVG beside it.

    Attributes:
        runs: run folders, finished or not, and folders of comparisons.
        out: a file that ends in .html, or a folder; default: the folder `report` in the run, or here for several.
        truth: stand-alone accuracies to compare with instead of those that the runs name: "paper" or a CSV file.
        interference: instead of runs: train one supernet on an early-pooling architecture, on a late one, and on both.
        settings: of --interference.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None
    truth: str | None = None
    interference: bool = False
    settings: Annotated[InterferenceConfig, tyro.conf.arg(name="")] = field(default_factory=InterferenceConfig)

    def __post_init__(self) -> None:
        if self.interference and (self.runs or self.truth is not None):
            raise InputError("interference takes no runs and no truth: it trains networks of its own")
        if not self.interference and self.settings != InterferenceConfig():
            raise InputError("space, data, epochs and what else says how to train need --interference")
        if not self.interference and not self.runs:
            raise InputError("at least one run folder must be given, or --interference")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, which prints the path of the page; returns its exit code (the README lists them)."""
    return run_command(PROGRAM, lambda: (str(_run(parse_flags(Command, PROGRAM, arguments))), {}))


def _run(command: Command) -> Path:
    try:  # here, so that --help needs neither matplotlib nor jinja2, and before anything is trained
        from bmsn.reporting import write_report
        from bmsn.reporting_interference import write_interference
    except ImportError as error:
        raise InputError(str(error)) from error
    if command.interference:
        keep_freed_memory()
        return write_interference(run_interference(command.settings), command.out or Path("interference"))
    alone = len(command.runs) == 1
    return write_report(
        command.runs, command.out or (command.runs[0] / "report" if alone else Path("report")), truth=command.truth
    )


if __name__ == "__main__":
    sys.exit(main())
