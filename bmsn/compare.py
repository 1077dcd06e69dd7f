"""`python -m bmsn.compare`: search methods against one another and the truth; tables to stdout and folder."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

import tyro

from bmsn.command import ProgressLines, parse_flags, run_command, until_signalled
from bmsn.comparison import Comparison, ComparisonConfig, run_comparison
from bmsn.comparison_figures import Paired, Row, Summary, path_in_words

PROGRAM = "python -m bmsn.compare"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""

    def run() -> tuple[str, Mapping[str, str]]:
        config = parse_flags(
            tyro.conf.OmitArgPrefixes[ComparisonConfig], PROGRAM, arguments,
            description="Compare search methods on the same images, budget and seeds, against the truth.",
        )  # fmt: skip
        comparison = until_signalled(
            lambda stop: run_comparison(config, should_stop=stop, progress=ProgressLines("searches"))
        )
        return to_table(comparison), comparison.failed

    return run_command(PROGRAM, run)


def to_table(comparison: Comparison) -> str:
    """The tables that the command prints: for each budget what was picked, how well it ranks, and what was gained."""
    lines: list[str] = []
    width = max((len(row.label) for row in comparison.rows), default=0) + 2
    for budget in dict.fromkeys(row.budget for row in comparison.rows):
        rows = [row for row in comparison.rows if row.budget == budget]
        runs = [run for run in comparison.runs if run.budget == budget]
        lines += [
            f"Budget: {budget} epochs. Figures over {_range(run.n for run in runs)} of {comparison.num_architectures} "
            f"architectures, means over {_range(row.num_runs for row in rows)} seeds, in brackets bootstrap intervals "
            "(95 %).",
            *_table("method", {row.label: _pick_cells(row) for row in rows}, width),
            "",
            *_table("method", {row.label: _rank_cells(row) for row in rows}, width),
            "",
        ]
        for baseline in dict.fromkeys(pair.baseline for pair in comparison.paired if pair.budget == budget):
            pairs = [pair for pair in comparison.paired if (pair.budget, pair.baseline) == (budget, baseline)]
            cells = {pair.label: _pair_cells(pair) for pair in pairs}
            lines += [*_table(f"less {baseline}, seed by seed", cells, width), ""]
        lines += [
            f"{row.label} also found {', '.join(path_in_words(*found) for found in row.paths.items())}, resolutions by "
            "layer."
            for row in rows
            if row.paths
        ]
    lines += _notes(comparison)
    return "\n".join(lines)


def _range(counts: Iterable[int]) -> str:
    different = sorted({*counts})
    return " to ".join(map(str, different if len(different) == 1 else (different[0], different[-1])))


def _pick_cells(row: Row) -> dict[str, str]:
    picks = ", ".join(
        f"[{pick.replace('-', ',')}]" + (f" x{count}" if count > 1 else "") for pick, count in row.picks.items()
    )
    figures = row.figures
    return {
        "true accuracy %": _interval(figures["accuracy"], 2),
        "regret top 1": _interval(figures["regret_top1"], 2),
        "top 3": _interval(figures["regret_top3"], 2),
        "top 5": _interval(figures["regret_top5"], 2),
        "MACs": _mean(figures["macs_ratio"], 2) + "x",
        "gain at <= 1x": _interval(figures["gain_within_macs"], 2),
        "picks": picks,
    }


def _rank_cells(row: Row) -> dict[str, str]:
    figures, costs = row.figures, row.costs
    return {
        "tau-b": _interval(figures["kendall_tau_b"], 3),
        "Spearman": _interval(figures["spearman"], 3),
        "tau-b | MACs": _interval(figures["partial_kendall"], 3),
        "images trained": f"{costs['training_images']:,.0f}",
        "validated": f"{costs['validation_images']:,.0f}",
        "TMACs": f"{(costs['training_macs'] + costs['validation_macs']) / 1e12:.3g}",
        "training s": f"{row.timings['train_seconds']:.1f}",
    }


def _pair_cells(pair: Paired) -> dict[str, str]:
    figures = pair.figures
    return {
        "tau-b": _both(figures["kendall_tau_b"], 3),
        "tau-b | MACs": _both(figures["partial_kendall"], 3),
        "true accuracy": _both(figures["accuracy"], 2),
        "gain at <= 1x": _both(figures["gain_within_macs"], 2),
    }


def _table(head: str, rows: Mapping[str, Mapping[str, str]], width: int) -> list[str]:
    """Lines of cells by label and column. Columns are as wide as they need to be; picks, which are text, stand left."""
    names = list(next(iter(rows.values())))
    widths = {name: max(len(name), *(len(row[name]) for row in rows.values())) + 2 for name in names}
    first = max(width, len(head) + 2)

    def line(label: str, row: Mapping[str, str]) -> str:
        cells = (f"  {row[name]}" if name == "picks" else f"{row[name]:>{widths[name]}}" for name in names)
        return f"{label:<{first}}" + "".join(cells)

    return [line(head, {name: name for name in names}), *(line(label, row) for label, row in rows.items())]


def _mean(summary: Summary, digits: int) -> str:
    return "-" if summary.mean is None else _fixed(summary.mean, digits)


def _interval(summary: Summary, digits: int) -> str:
    if summary.bootstrap is None:
        return _mean(summary, digits)
    low, high = summary.bootstrap
    return f"{_mean(summary, digits)} [{_fixed(low, digits)}, {_fixed(high, digits)}]"


def _both(summary: Summary, digits: int) -> str:
    """Mean, bootstrap interval and, in round brackets, Student's."""
    if summary.student is None:
        return _interval(summary, digits)
    low, high = summary.student
    return f"{_interval(summary, digits)} ({_fixed(low, digits)}, {_fixed(high, digits)})"


def _fixed(value: float, digits: int) -> str:
    return f"{value:z.{digits}f}"  # z: no "-0.00"


def _notes(comparison: Comparison) -> list[str]:
    seeds = max((row.num_runs for row in comparison.rows), default=0)
    notes = []
    if 2 <= seeds < 6:
        notes.append(
            f"A bootstrap over {seeds} seeds is too narrow: it holds the mean of a normal law {_COVERAGE[seeds]} times "
            "in a hundred. Round brackets: Student's interval, which needs that law and then holds it 95 times."
        )
    reasons = {
        f"{row.label}, {row.budget} epochs, {name}: {summary.undefined}"
        for row in comparison.rows
        for name, summary in row.figures.items()
        if summary.undefined and not (name == "partial_kendall" and row.label == "macs")
    }
    notes += [f"not defined: {reason}" for reason in sorted(reasons)]
    if comparison.missing:
        notes.append(f"without a row in the truth: {', '.join(comparison.missing)}")
    return notes


# Measured with 2,000 samples of a normal law each (tests/test_intervals.py).
_COVERAGE = {2: 50, 3: 75, 4: 88, 5: 93}


if __name__ == "__main__":
    sys.exit(main())
