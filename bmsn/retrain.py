"""`python -m bmsn.retrain`: trains what a search found from scratch; its table goes to stdout and the run folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bmsn.accuracy_table import pareto_lines
from bmsn.command import ProgressLines, parse_flags, run_command, until_signalled
from bmsn.retraining import RetrainConfig, Retraining, run_retraining

PROGRAM = "python -m bmsn.retrain"


@dataclass(frozen=True, kw_only=True)
class Command(RetrainConfig):
    """Train what a search found from scratch, and the default architecture beside it.

    Attributes:
        run: folder of a finished search.
    """

    run: Annotated[Path, tyro.conf.Positional] = field()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""

    def run() -> tuple[str, Mapping[str, str]]:
        config = parse_flags(tyro.conf.OmitArgPrefixes[Command], PROGRAM, arguments)
        retraining = until_signalled(lambda stop: run_retraining(config, should_stop=stop, progress=ProgressLines()))
        return to_table(retraining), retraining.failed

    return run_command(PROGRAM, run)


def to_table(retraining: Retraining) -> str:
    """The table that the command prints: the best first, with the distance to the default architecture."""
    rows = sorted(retraining.rows, key=lambda row: -(row.alone.accuracy_mean or 0))
    default = next(row.alone.accuracy_mean for row in rows if row.is_default)
    width = 2 + max(12, *(len(str(row.alone.architecture)) for row in rows))
    lines = [
        f"{'architecture':<{width}}{'test accuracy %':>17}{'to default':>12}{'networks':>10}{'MACs':>8}"
        f"{'search rank':>13}"
    ]
    for row in rows:
        alone, distance, rank = row.alone, "-", "-" if row.searched is None else row.searched.rank
        if not row.is_default and alone.accuracy_mean is not None and default is not None:
            distance = f"{alone.accuracy_mean - default:+.2f}"
        lines.append(
            f"{alone.architecture!s:<{width}}{alone.accuracy_text:>17}{distance:>12}{alone.n:>10}"
            f"{alone.macs_text:>9}{rank:>12}{'  default' if row.is_default else ''}"
        )
    note = pareto_lines([row.alone for row in rows])
    return "\n".join([*lines, "", *note] if note else lines)


if __name__ == "__main__":
    sys.exit(main())
