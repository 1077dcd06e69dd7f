"""`python -m bmsn.ground_truth`: trains every architecture of a space alone; table to stdout and folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import tyro

from bmsn.accuracy_table import AccuracyRow, pareto_lines
from bmsn.command import ProgressLines, parse_flags, run_command, until_signalled
from bmsn.correlation import agreement
from bmsn.truth import GroundTruth, GroundTruthConfig, run_ground_truth

PROGRAM = "python -m bmsn.ground_truth"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""

    def run() -> tuple[str, Mapping[str, str]]:
        config = parse_flags(
            tyro.conf.OmitArgPrefixes[GroundTruthConfig], PROGRAM, arguments,
            description="Train every architecture of a space alone: the truth that a search is measured against.",
        )  # fmt: skip
        truth = until_signalled(lambda stop: run_ground_truth(config, should_stop=stop, progress=ProgressLines()))
        return to_table(truth), truth.failed

    return run_command(PROGRAM, run)


def to_table(truth: GroundTruth) -> str:
    """The table that the command prints: the best first, and how far MACs alone explain the order."""
    accuracy = {row.architecture.index: row.accuracy_mean for row in truth.rows if row.accuracy_mean is not None}
    rows = sorted(truth.rows, key=lambda row: -accuracy[row.architecture.index])
    lines = [f"{'architecture':<14}{'test accuracy %':>17}{'networks':>10}{'MACs':>8}"]
    shown: list[AccuracyRow] = [*rows, *truth.paths]
    lines += [f"{row.architecture!s:<14}{row.accuracy_text:>17}{row.n:>10}{row.macs_text:>9}".rstrip() for row in shown]
    macs = {row.architecture.index: float(row.macs) for row in rows}
    tau = agreement(macs, accuracy, macs)["kendall_tau_b"]
    by_macs = "not defined, as one of them is constant" if tau is None else f"{tau:.3f}"
    return "\n".join([*lines, "", *pareto_lines(rows), f"tau-b of a ranking by MACs alone: {by_macs}"])


if __name__ == "__main__":
    sys.exit(main())
