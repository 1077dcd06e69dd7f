"""`python -m bmsn.compare`: search methods against one another and the truth; tables to stdout and folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import tyro

from bmsn.command import run_command
from bmsn.comparison import Comparison, ComparisonConfig, run_comparison
from bmsn.comparison_figures import Row, Summary
from bmsn.scheduler import TaskProgress

PROGRAM = "python -m bmsn.compare"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""

    def run(should_stop: Callable[[], bool], progress: Callable[[TaskProgress], None]) -> tuple[str, Mapping[str, str]]:
        config = tyro.cli(
            tyro.conf.OmitArgPrefixes[ComparisonConfig], prog=PROGRAM, args=arguments,
            description="Compare search methods on the same images, budget and seeds, against the truth.",
        )  # fmt: skip
        comparison = run_comparison(config, should_stop=should_stop, progress=progress)
        return to_table(comparison), comparison.failed

    return run_command(PROGRAM, run, noun="searches")


def to_table(comparison: Comparison) -> str:
    """The tables that the command prints: for each budget what was picked, how well it ranks, and what was gained."""
    lines: list[str] = []
    width = max((len(row.label) for row in comparison.rows), default=0) + 2
    for budget in dict.fromkeys(row.budget for row in comparison.rows):
        rows = [row for row in comparison.rows if row.budget == budget]
        runs = [run for run in comparison.runs if run.budget == budget]
        smallest, largest = min(run.n for run in runs), max(run.n for run in runs)
        over = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        lines += [
            f"Budget of {budget} epochs. Figures over {over} of {comparison.num_architectures} architectures, means "
            f"over {max(row.num_runs for row in rows)} seeds, in brackets bootstrap intervals (95 %).",
            *_table(_pick_cells, rows, width),
            "",
            *_table(_rank_cells, rows, width),
            "",
        ]
        for baseline in dict.fromkeys(pair.baseline for pair in comparison.paired if pair.budget == budget):
            pairs = [pair for pair in comparison.paired if (pair.budget, pair.baseline) == (budget, baseline)]
            names = ("kendall_tau_b", "partial_kendall", "accuracy", "gain_within_macs")
            lines.append(
                f"{f'less {baseline}, seed by seed':<{max(width, len(baseline) + 20)}}"
                f"{'tau-b':>34}{'tau-b | MACs':>34}{'true accuracy':>34}{'gain at <= 1x':>34}"
            )
            for pair in pairs:
                cells = "".join(f"{_both(pair.figures[name]):>34}" for name in names)
                lines.append(f"{pair.label:<{max(width, len(baseline) + 20)}}{cells}")
            lines.append("")
        lines += [f"{row.label} also found {', '.join(row.paths)}, resolutions by layer." for row in rows if row.paths]
    lines += _notes(comparison)
    return "\n".join(lines)


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
        "TMACs": f"{(costs['training_macs'] + costs['validation_macs']) / 1e12:,.1f}",
        "training s": f"{row.timings['train_seconds']:.1f}",
    }


def _table(cells: Callable[[Row], dict[str, str]], rows: Sequence[Row], width: int) -> list[str]:
    """Columns as wide as they need to be; the last one left-aligned if it is text."""
    made = [cells(row) for row in rows]
    names = list(made[0])
    widths = {name: max(len(name), *(len(row[name]) for row in made)) + 2 for name in names}
    last_is_text = names[-1] == "picks"

    def line(head: str, row: Mapping[str, str]) -> str:
        parts = [f"{row[name]:>{widths[name]}}" for name in names]
        if last_is_text:
            parts[-1] = f"  {row[names[-1]]}"
        return f"{head:<{width}}" + "".join(parts)

    return [line("method", dict(zip(names, names, strict=True)))] + [
        line(row.label, each) for row, each in zip(rows, made, strict=True)
    ]


def _mean(summary: Summary, digits: int) -> str:
    return "-" if summary.mean is None else f"{summary.mean:.{digits}f}"


def _interval(summary: Summary, digits: int) -> str:
    if summary.bootstrap is None:
        return _mean(summary, digits)
    low, high = summary.bootstrap
    return f"{summary.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _both(summary: Summary) -> str:
    """Mean, bootstrap interval and, in round brackets, Student's."""
    text = _interval(summary, 2)
    if summary.student is None:
        return text
    low, high = summary.student
    return f"{text} ({low:.2f}, {high:.2f})"


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
