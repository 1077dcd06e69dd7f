"""What a comparison leaves in its folder: tables as CSV and JSON, and figures drawn against the budget."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bmsn.accuracy_table import write_csv
from bmsn.checkpoint import write_atomically
from bmsn.comparison_figures import COSTS, FIGURES, TIMINGS, Paired, Row, Run, Summary
from bmsn.errors import InputError

SCHEMA_VERSION = 1
_PARTS = ("", "_low", "_high", "_n")  # of a figure in a CSV file: mean, bootstrap interval, seeds
_FIGURE_COLUMNS = tuple(name + part for name in FIGURES for part in _PARTS)

# Okabe & Ito 2008: told apart with any colour vision; markers and dashes tell the lines apart in grey as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX<>*"
_DASHES = ("-", "--", "-.", ":")


def write_tables(
    folder: Path,
    rows: Sequence[Row],
    paired: Sequence[Paired],
    runs: Sequence[Run],
    about: Mapping[str, Any],
    environment: Mapping[str, Sequence[Any]],
    missing: Sequence[str],
) -> None:
    """Writes comparison.csv, paired.csv and comparison.json.

    Times stand in the last columns of comparison.csv and under "timings" in comparison.json, where they were taken
    under "environment": two comparisons of the same searches are equal but for them.

    Args:
        about: what determines the searches; `space` as `SearchSpace.named` takes it, `space_name` in words.
        environment: of the searches, values by field (`bmsn.checkpoint.environment`).
        missing: architectures without a row in the truth.
    """
    title = f"{about['space_name']} on {about['data']}, truth {about['truth']}, seeds {about['seeds']}; intervals: 95 %"
    columns = ("budget", "method", "seeds", "picks", "paths", *_FIGURE_COLUMNS, *COSTS, *TIMINGS)
    write_csv(folder / "comparison.csv", title, columns, [_row_cells(row) for row in rows])
    columns = ("budget", "method", "baseline", *_FIGURE_COLUMNS)
    cells = [
        {"budget": pair.budget, "method": pair.label, "baseline": pair.baseline, **_figure_cells(pair.figures)}
        for pair in paired
    ]
    write_csv(folder / "paired.csv", f"{title}; differences seed by seed", columns, cells)
    content = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "truth_missing": list(missing),
        "methods_over_seeds": [
            {
                "budget": row.budget, "method": row.label, "seeds": row.num_runs, "picks": row.picks,
                "paths": list(row.paths), "accuracy_of_paths": row.paths,
                "figures": {k: v.as_dict() for k, v in row.figures.items()}, "costs": row.costs,
            }
            for row in rows
        ],
        "paired": [
            {
                "budget": pair.budget, "method": pair.label, "baseline": pair.baseline,
                "figures": {k: v.as_dict() for k, v in pair.figures.items()},
            }
            for pair in paired
        ],
        "runs": [
            {
                "budget": run.budget, "method": run.label, "seed": run.seed, "pick": run.pick,
                "pick_within_macs": run.pick_within_macs, "path": run.path,
                "path_accuracy": run.path_accuracy, "n": run.n, "figures": run.figures,
                "undefined": run.undefined, "cost": run.cost,
            }
            for run in runs
        ],
        "timings": [
            {"budget": run.budget, "method": run.label, "seed": run.seed, **run.timings} for run in runs
        ],
        "environment": environment,
    }  # fmt: skip
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "comparison.json", text.encode())


def _row_cells(row: Row) -> dict[str, str | int]:
    return {
        "budget": row.budget,
        "method": row.label,
        "seeds": row.num_runs,
        "picks": " ".join(f"{pick}:{count}" for pick, count in row.picks.items()),
        "paths": " ".join(path if of is None else f"{path}:{of:.3f}" for path, of in row.paths.items()),
        **_figure_cells(row.figures),
        **{name: f"{value:.0f}" for name, value in row.costs.items()},
        **{name: f"{value:.2f}" for name, value in row.timings.items()},
    }


def _figure_cells(figures: Mapping[str, Summary]) -> dict[str, str | int]:
    cells: dict[str, str | int] = {}
    for name, summary in figures.items():
        low, high = summary.bootstrap or (None, None)
        for part, value in zip(_PARTS, (summary.mean, low, high), strict=False):
            cells[name + part] = "" if value is None else f"{value:.4f}"
        cells[f"{name}_n"] = summary.n
    return cells


# Against the budget. --------------------------------------------------------------------------------------------------


def check_drawing() -> None:
    """Raise InputError where there is nothing to draw with."""
    _matplotlib()


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("budgets needs the matplotlib package: pip install 'bmsn[report]'") from error
    return matplotlib


def draw_budgets(folder: Path, rows: Sequence[Row], title: str) -> None:
    """Draws tau-b and the regret of the pick against the budget as budgets.svg and budgets.png.

    One line a method, with its interval; a budget at which a figure is not defined has no point. The lines of one
    budget stand a little apart, so that their intervals do not hide one another.
    """
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bmsn.figures import fit_legend

    labels = list(dict.fromkeys(row.label for row in rows))
    budgets = sorted({row.budget for row in rows})
    names, columns = fit_legend(labels)
    legend_lines = math.ceil(len(names) / columns) * max(name.count("\n") + 1 for name in names)
    settings = {  # the same file from the same numbers; names are text: a $ in one is a $
        "svg.hashsalt": "bmsn", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.5, 4.3 + 0.17 * legend_lines), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        for panel, name, words in (
            (axes[0], "kendall_tau_b", "rank correlation with the truth (tau-b)"),
            (axes[1], "regret_top1", "regret of the pick (points)"),
        ):
            for number, label in enumerate(labels):
                _draw_line(panel, [row for row in rows if row.label == label], name, number, len(labels))
            panel.set_xscale("log")
            panel.set_xticks(budgets, [str(budget) for budget in budgets])
            panel.minorticks_off()
            panel.set_xlabel("budget (epochs of the training half)")
            panel.set_ylabel(words)
            panel.grid(axis="y", color="0.9")
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].axhline(0, color="0.6", linewidth=0.8)
        axes[1].set_ylim(bottom=-0.03 * axes[1].get_ylim()[1])  # markers at 0 are whole
        figure.suptitle(f"{title}; means over seeds, bars: 95 % intervals", fontsize=10)
        handles, _ = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
        for suffix, metadata in (("svg", {"Date": None}), ("png", None)):
            write_atomically(folder / f"budgets.{suffix}", _drawn(figure.savefig, suffix, metadata))


def _draw_line(panel: Any, rows: Sequence[Row], name: str, number: int, count: int) -> None:
    """One method in one panel."""
    points = []
    for row in sorted(rows, key=lambda row: row.budget):
        summary = row.figures[name]
        if summary.mean is not None:
            low, high = summary.bootstrap or (summary.mean, summary.mean)
            points.append((row.budget, summary.mean, low, high))
    apart = math.exp(0.025 * (number - (count - 1) / 2))  # on a logarithmic axis
    panel.errorbar(
        [budget * apart for budget, *_ in points],
        [mean for _, mean, *_ in points],
        yerr=[[max(0.0, mean - low) for _, mean, low, _ in points], [max(0.0, top - m) for _, m, _, top in points]],
        label=rows[0].label, color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_DASHES[number % len(_DASHES)], linewidth=1.4, markersize=4.5, capsize=2.5, elinewidth=0.9,
    )  # fmt: skip


def _drawn(save: Callable[..., None], suffix: str, metadata: dict[str, None] | None) -> bytes:
    content = io.BytesIO()
    save(content, format=suffix, dpi=160, metadata=metadata)
    return content.getvalue()
