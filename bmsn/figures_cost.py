"""Figures of what accuracy costs: against multiply-accumulates and latency, with the Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bmsn.cost import pareto_front
from bmsn.figures import ACCENT, MARKERS, PALETTE, colour, finish_grid, new_figure

_MANY = 150  # points: more are drawn smaller


@dataclass(frozen=True, kw_only=True)
class CostPanel:
    """One cost of architectures.

    Attributes:
        label: of the cost, with its unit.
        cost: smaller is better.
        quartiles: lower and upper quartile of each cost; empty: it is exact.
        title: above the panel.
    """

    label: str
    cost: Sequence[float]
    quartiles: Sequence[tuple[float, float]] = ()
    title: str = ""


def pareto_figure(
    names: Sequence[str], panel: CostPanel, accuracy: Sequence[float], *, default: int | None, accuracy_label: str
) -> Figure:
    """Accuracy against one cost with the Pareto front.

    Args:
        names: of the architectures; those on the front have theirs beside them where there is room, the best always.
        panel: their cost.
        accuracy: of each, larger is better.
        default: index of the default architecture; None: not among them.
    """
    figure, (axis,) = new_figure(5.0)
    _front(axis, names, panel, accuracy, default, room=0.06)
    axis.set_ylabel(accuracy_label)
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


def pareto_panels(
    names: Sequence[str], panels: Sequence[CostPanel], accuracy: Sequence[float], *,
    default: int | None, accuracy_label: str,
) -> Figure:  # fmt: skip
    """As `pareto_figure`, for several costs side by side; what is on the first one's front is marked in the others."""
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(4.1 * rows + 0.3, rows, 2, sharey=True)
    first = pareto_front(accuracy, panels[0].cost)
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        _front(axis, names, panel, accuracy, default, room=0.1)
        axis.set_title(panel.title, loc="left")
        axis.tick_params(labelleft=True)
        if place:
            axis.plot(
                [panel.cost[i] for i, on_it in enumerate(first) if on_it],
                [accuracy[i] for i, on_it in enumerate(first) if on_it],
                "o", markersize=13, fillstyle="none", color="black", markeredgewidth=1.3,
                label=f"on the front against {panels[0].label.split()[0]}",
            )  # fmt: skip
        _leave_room(axis, panel.cost)
    finish_grid(axes, len(panels))
    figure.supylabel(accuracy_label)
    handles = dict(zip(*axes[len(panels) - 1].get_legend_handles_labels()[::-1], strict=True))
    if len(panels) % 2:
        axes[-1].legend(handles.values(), handles.keys(), loc="center", labelspacing=1.2)
    else:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure


def _size(points: Sequence[float]) -> float:
    """Area of a point's mark."""
    return 45.0 if len(points) <= _MANY else 16.0


def _leave_room(axis: Axes, cost: Sequence[float]) -> None:
    """Room for names to the left of the cheapest; no cost is negative."""
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, min(cost) - 0.36 * (high - min(cost))), high)
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= high])


def _front(
    axis: Axes, names: Sequence[str], panel: CostPanel, accuracy: Sequence[float], default: int | None, room: float
) -> None:
    """Draws the points of one cost; names are at least `room` of the range of accuracies apart."""
    cost = panel.cost
    on_front = pareto_front(accuracy, cost)
    front = sorted((i for i, on_it in enumerate(on_front) if on_it), key=lambda i: cost[i])
    rest = [i for i, on_it in enumerate(on_front) if not on_it]
    if panel.quartiles:
        axis.hlines(accuracy, *zip(*panel.quartiles, strict=True), color="#BBBBBB", linewidth=2, zorder=0)
    axis.scatter(
        [cost[i] for i in rest], [accuracy[i] for i in rest], s=_size(cost), color="#999999", label="dominated"
    )
    axis.plot(
        [cost[i] for i in front], [accuracy[i] for i in front], "-o", markersize=9, color=PALETTE[0],
        label="Pareto front",
    )  # fmt: skip
    if default is not None:
        axis.plot(
            cost[default], accuracy[default], "s", markersize=14, fillstyle="none", markeredgewidth=2.5, color=ACCENT,
            linestyle="none", label="default",
        )  # fmt: skip
    distance = room * (max(accuracy) - min(accuracy))
    written = np.inf  # height of the name last written: the front falls from the best to the cheapest
    for i in reversed(front):
        if written - accuracy[i] >= distance:
            written = accuracy[i]
            axis.annotate(
                names[i], (cost[i], accuracy[i]), xytext=(-6, 7), textcoords="offset points", ha="right", fontsize=12
            )
    axis.margins(x=0.16, y=0.12)
    axis.set_xlabel(panel.label)


def latency_figure(macs_ratio: Sequence[float], panels: Sequence[CostPanel], *, default: int | None) -> Figure:
    """Latency against MACs, a panel for each batch size; dotted: what would be in proportion to MACs.

    Args:
        macs_ratio: relative to the default architecture.
        panels: latencies in milliseconds.
        default: index of the default architecture; None: not among them, and then nothing is dotted.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(4.1 * rows + 0.5, rows, columns)
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        shade = colour(place, len(panels))
        axis.vlines(macs_ratio, *zip(*panel.quartiles, strict=True), color=shade, alpha=0.4, linewidth=2)
        axis.scatter(
            macs_ratio,
            panel.cost,
            s=_size(macs_ratio),
            color=shade,
            marker=MARKERS[place],
            edgecolor="white",
            linewidth=0.5,
            zorder=2,
        )
        if default is not None:
            ends = np.array([0.0, max(macs_ratio)])
            axis.plot(ends, ends * panel.cost[default], ":", color="black", linewidth=1.5)
            axis.plot(
                macs_ratio[default], panel.cost[default], "s", markersize=14, fillstyle="none", markeredgewidth=2.5,
                color=ACCENT,
            )  # fmt: skip
        axis.set_title(panel.title, loc="left")
        axis.set(xlabel="MACs relative to the default", ylabel=panel.label, xlim=(0, None), ylim=(0, None))
    finish_grid(axes, len(panels))
    return figure
