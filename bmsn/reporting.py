"""`write_report`: runs of bmsn.search as one HTML page; its figures are beside it as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bmsn.errors import InputError
from bmsn.figures import style
from bmsn.reporting_found import WITHIN_SUPERNET, found_blocks
from bmsn.reporting_page import Block, Page, Row, Section, Table, Text, cell, percent, write_page
from bmsn.reporting_reproduction import reproduction
from bmsn.reporting_run import ReportedRun, read_runs
from bmsn.reporting_training import training_blocks


def write_report(runs: Sequence[str | Path], out: str | Path, *, truth: str | None = None) -> Path:
    """Writes one self-contained HTML page about runs of bmsn.search, finished or not.

    A part is there where its data is. The page loads nothing from elsewhere; its table sorts by a click.

    Args:
        runs: run folders; spaces and data may differ.
        out: a file that ends in .html, or a folder for report.html.
        truth: stand-alone accuracies to compare with instead of those that the runs name: "paper" or a CSV file.
    Returns:
        The HTML file. Its figures are in <name>-figures beside it.
    Raises:
        InputError: no run given, or what `read_runs` and `write_page` raise it for.
    """
    if not runs:
        raise InputError("a report needs at least one run folder; got none")
    read = read_runs([Path(run) for run in runs], truth)
    with style():
        sections = [
            Section(run.label, f"run-{place}", _blocks(run, f"run-{place}")) for place, run in enumerate(read, start=1)
        ]
        title = f"{read[0].space.name} on {read[0].data_name}" if len(read) == 1 else f"{len(read)} searches"
        page = Page(title, [_summary(read)] if len(read) > 1 else [], sections)
        return write_page(page, Path(out), "report.html")


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


def _blocks(run: ReportedRun, name: str) -> list[Block]:
    """Everything about a run; figures are called `name`-..."""
    notes: list[Block] = [Text(note, is_note=True) for note in run.notes]
    return notes + found_blocks(run, name) + training_blocks(run, name) + reproduction(run)
