"""The figure of a comparison of methods: rank correlation and regret, at one budget or against several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bmsn.figures import MARKERS, PALETTE, colour, fit_legend, in_lines, new_figure

_PANELS = (("kendall_tau_b", "rank correlation (tau-b)"), ("regret_top1", "regret of the pick (points)"))
_TICK = 30  # characters of a method's name in a line
_APART = 0.012  # of the axis: lines of one budget, so that their intervals do not hide one another


def comparison_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Means over seeds with their 95 % intervals.

    Args:
        rows: `methods_over_seeds` of comparison.json.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    budgets = sorted({row["budget"] for row in rows})
    if len(budgets) == 1:
        most_lines = max(in_lines(method, _TICK).count("\n") + 1 for method in methods)
        figure, axes = new_figure(max(0.42, 0.22 * most_lines) * len(methods) + 1.3, 1, 2, sharey=True)
        for axis, (name, label) in zip(axes, _PANELS, strict=True):
            _one_budget(axis, rows, methods, name)
            axis.set_xlabel(label)
        axes[0].invert_yaxis()  # once: the axis is shared
        return figure
    names, columns = fit_legend(methods)
    figure, axes = new_figure(4.3 + 0.24 * sum(name.count("\n") + 1 for name in names) / columns, 1, 2)
    for axis, (name, label) in zip(axes, _PANELS, strict=True):
        for place, method in enumerate(methods):
            apart = np.exp((place - (len(methods) - 1) / 2) * _APART * np.log(budgets[-1] / budgets[0]))
            points = [(row["budget"] * apart, *_interval(row, name)) for row in rows if row["method"] == method]
            _errorbars(axis, sorted(points), place, len(methods), label=names[place] if axis is axes[0] else None)
        axis.set_xscale("log")
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.minorticks_off()
        axis.set(xlabel="budget (epochs)", ylabel=label)
    axes[1].set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.2)
    return figure


def _one_budget(axis: Axes, rows: Sequence[Mapping[str, Any]], methods: Sequence[str], name: str) -> None:
    for row in rows:
        mean, low, high = _interval(row, name)
        place = methods.index(row["method"])
        axis.errorbar(
            mean, place, xerr=[[mean - low], [high - mean]], color=PALETTE[0], marker="o", markersize=8, capsize=4
        )
    axis.set_yticks(range(len(methods)), [in_lines(method, _TICK) for method in methods])


def _errorbars(
    axis: Axes, points: Sequence[tuple[float, float, float, float]], place: int, count: int, label: str | None
) -> None:
    x, mean, low, high = np.array(points).T
    axis.errorbar(
        x, mean, yerr=np.array([mean - low, high - mean]), color=colour(place % len(PALETTE), min(count, len(PALETTE))),
        marker=MARKERS[place % len(MARKERS)], linestyle=("-", "--", ":")[place // len(PALETTE) % 3], markersize=7,
        linewidth=1.6, capsize=3, label=label,
    )  # fmt: skip


def _interval(row: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Mean and interval of a figure, NaN where it is not defined; without an interval the mean three times."""
    figure = row["figures"][name]
    if figure["mean"] is None:
        return (np.nan, np.nan, np.nan)
    low, high = figure["bootstrap"] or (figure["mean"], figure["mean"])
    return figure["mean"], min(low, figure["mean"]), max(high, figure["mean"])
