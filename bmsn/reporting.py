"""`write_report`: runs of bmsn.search and comparisons as one HTML page; its figures are beside it as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bmsn.errors import InputError
from bmsn.figures import style
from bmsn.reporting_comparison import ReportedComparison, comparison_blocks, is_comparison, read_comparison
from bmsn.reporting_found import found_blocks
from bmsn.reporting_page import Block, Page, Section, Text, write_page
from bmsn.reporting_reproduction import reproduction
from bmsn.reporting_run import ReportedRun, read_runs
from bmsn.reporting_several import several_blocks
from bmsn.reporting_training import training_blocks


def write_report(folders: Sequence[str | Path], out: str | Path, *, truth: str | None = None) -> Path:
    """Writes one self-contained HTML page about runs of bmsn.search, finished or not, and comparisons of methods.

    A part is there where its data is. The page loads nothing from elsewhere; its tables sort by a click.

        >>> print(bmsn.reporting.write_report(["runs/a"], "report.html"))
        report.html

    Args:
        folders: run folders and folders of bmsn.compare; spaces and data may differ.
        out: a file that ends in .html, or a folder for report.html.
        truth: stand-alone accuracies to compare runs with instead of those that they name: "paper" or a CSV file.
    Returns:
        The HTML file. Its figures are in <name>-figures beside it.
    Raises:
        InputError: no folder given, or what `read_runs`, `read_comparison` and `write_page` raise it for.
    """
    if not folders:
        raise InputError("a report needs at least one run folder; got none")
    paths = [Path(folder) for folder in folders]
    comparisons = [read_comparison(path) for path in paths if is_comparison(path)]
    runs = read_runs([path for path in paths if not is_comparison(path)], truth)
    with style():
        sections = [
            Section(comparison.label, f"comparison-{place}", comparison_blocks(comparison, f"comparison-{place}"))
            for place, comparison in enumerate(comparisons, start=1)
        ]
        sections += [
            Section(run.label, f"run-{place}", _blocks(run, f"run-{place}")) for place, run in enumerate(runs, start=1)
        ]
        page = Page(_title(runs, comparisons), several_blocks(runs), sections)
        return write_page(page, Path(out), "report.html")


def _title(runs: Sequence[ReportedRun], comparisons: Sequence[ReportedComparison]) -> str:
    if len(runs) == 1 and not comparisons:
        return f"{runs[0].space.name} on {runs[0].data_name}"
    if not runs and len(comparisons) == 1:
        return f"Methods in {comparisons[0].space_name} on {comparisons[0].content['data']}"
    counted = ((len(runs), "search", "searches"), (len(comparisons), "comparison", "comparisons"))
    return ", ".join(f"{count} {one if count == 1 else several}" for count, one, several in counted if count)


def _blocks(run: ReportedRun, name: str) -> list[Block]:
    """Everything about a run; figures are called `name`-..."""
    notes: list[Block] = [Text(note, is_note=True) for note in run.notes]
    return notes + found_blocks(run, name) + training_blocks(run, name) + reproduction(run)
