"""The parts of a report about several runs together: a table, and accuracies against the truth that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmsn.figures_accuracy import runs_truth_figure
from bmsn.reporting_found import IN_SUPERNET, WITHIN_SUPERNET, with_tau
from bmsn.reporting_page import Block, Heading, Plot, Row, Table, cell, percent
from bmsn.reporting_run import ReportedRun


def several_blocks(runs: Sequence[ReportedRun]) -> list[Block]:
    """The blocks of all runs, those without data left out; none for a single run."""
    return [_summary(runs), *_against_truth(runs)] if len(runs) > 1 else []


def _summary(runs: Sequence[ReportedRun]) -> Table:
    """One row a run; a setting that all runs share stands in the caption."""
    settings = {
        "state": ["finished" if run.finished else "unfinished" for run in runs],
        "space": [run.space.name for run in runs],
        "data": [run.data_name for run in runs],
        "method": [run.config.get("method", "mixture") for run in runs],
        "M": [run.config.get("supernets") for run in runs],
        "epochs": [run.config.get("epochs") for run in runs],
        "seed": [run.config.get("seed") for run in runs],
    }
    differing = [name for name, values in settings.items() if any(value != values[0] for value in values)]
    rows = []
    for place, run in enumerate(runs):
        best = run.rows[0] if run.rows else None
        ranking, macs = run.agreement.get("ranking", {}), run.agreement.get("macs", {})
        rows.append(Row([
            cell(run.label), *(cell(settings[name][place]) for name in differing),
            cell(str(best.architecture) if best else None), percent(best.accuracy if best else None),
            cell(best.macs_ratio if best else None, "{:.2f}x"), cell(ranking.get("kendall_tau_b"), "{:.3f}"),
            cell(ranking.get("partial_kendall"), "{:.3f}"), cell(macs.get("kendall_tau_b"), "{:.3f}"),
            cell(ranking.get("regret_top1"), "{:.2f}"),
            cell(run.result.get("timings", {}).get("total_seconds"), "{:.0f}"),
        ]))  # fmt: skip
    columns = ("best", "accuracy %", "MACs", "tau-b", "partial", "MACs alone", "regret", "seconds")
    shared = ", ".join(f"{name} {values[0]}" for name, values in settings.items() if name not in differing)
    caption = (
        f"{WITHIN_SUPERNET} Against the truth: tau-b of the ranking, the same with MACs held fixed, tau-b of MACs "
        "alone, and regret of the best in points. A dash: not there, or not defined."
    )
    caption += f" All runs: {shared}." if shared else ""
    return Table(("run", *differing, *columns), rows, caption, sortable=True)


def _against_truth(runs: Sequence[ReportedRun]) -> list[Block]:
    """A figure for each space and truth that at least two runs share and have accuracies for.

    Source: Javan et al. 2023, figure 3, for numbers of supernets.
    """
    groups: dict[Any, list[ReportedRun]] = {}
    for run in runs:
        if any(row.truth is not None for row in run.whole):
            groups.setdefault((run.space.name, run.space.pool, *sorted(run.truth.items())), []).append(run)
    blocks: list[Block] = []
    for group in groups.values():
        if len(group) > 1:
            figure = runs_truth_figure(_series(group), IN_SUPERNET)
            caption = f"{group[0].space.name}: accuracy in the search against accuracy trained alone."
            blocks.append(Plot(f"runs-truth-{len(blocks) + 1}", "Searches against truth", caption, figure))
    return [Heading("Searches against the truth"), *blocks] if blocks else []


def _series(group: Sequence[ReportedRun]) -> list[tuple[str, list[float], list[float]]]:
    """Of each run: name with tau-b, accuracies in the search and those trained alone."""
    supernets_differ = len({run.config.get("supernets") for run in group}) > 1
    series = []
    for run in group:
        name = f"{run.label}, M = {run.config.get('supernets')}" if supernets_differ else run.label
        known = [(row.accuracy, row.truth) for row in run.whole if row.accuracy is not None and row.truth is not None]
        series.append((
            with_tau(name, run.agreement.get("accuracy", run.agreement["ranking"])),
            [100 * accuracy for accuracy, _ in known], [truth for _, truth in known],
        ))  # fmt: skip
    return series
