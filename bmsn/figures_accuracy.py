"""Figures of what a search found: accuracy against truth and over pooling positions; drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bmsn.figures import ACCENT, MARKERS, PALETTE, SEQUENTIAL, WIDTH, colour, finish_grid, fit_legend, new_figure
from bmsn.space import Architecture, SearchSpace

_ALONE = "accuracy trained alone (%)"
_MAX_WRITTEN = 60  # cells of a map that still have their value written in them


def truth_figure(
    predicted: Sequence[float], macs_ratio: Sequence[float], truth: Sequence[float], supernet: Sequence[int | None],
    titles: tuple[str, str], predicted_label: str,
) -> Figure:  # fmt: skip
    """Two scatters against stand-alone accuracy: of the search, coloured by supernet, and of MACs alone.

    Args:
        predicted: accuracy in the search, in percent; as long as the three that follow.
        macs_ratio: relative to the default architecture.
        truth: in percent.
        supernet: that the architecture was scored with; None: there are none.
        titles: of the two panels.
    """
    figure, (left, right) = new_figure(4.6, 1, 2, sharey=True)
    marks = [m or 0 for m in supernet]
    count = max(marks) + 1
    for m in sorted(set(marks)):
        chosen = [i for i, other in enumerate(marks) if other == m]
        left.scatter(
            [predicted[i] for i in chosen], [truth[i] for i in chosen], s=55, color=colour(m, count),
            marker=MARKERS[m % len(MARKERS)], edgecolor="white", linewidth=0.7, label=f"supernet {m}",
        )  # fmt: skip
    if 1 < count <= len(PALETTE):
        figure.legend(loc="outside lower center", ncols=count, handletextpad=0.2, columnspacing=1.2)
    right.scatter(macs_ratio, truth, s=55, color="#555555", marker="o", edgecolor="white", linewidth=0.7)
    left.set(xlabel=predicted_label, ylabel=_ALONE, title=titles[0])
    right.set(xlabel="MACs relative to the default", title=titles[1])
    return figure


def runs_truth_figure(runs: Sequence[tuple[str, Sequence[float], Sequence[float]]], predicted_label: str) -> Figure:
    """One scatter of several runs against stand-alone accuracy, coloured and marked by run.

    Args:
        runs: for each its name in the legend, accuracies in the search and those trained alone, both in percent.
    """
    names, columns = fit_legend([name for name, *_ in runs])
    figure, (axis,) = new_figure(5.0 + 0.24 * sum(name.count("\n") + 1 for name in names) / columns)
    for place, (name, (_, predicted, truth)) in enumerate(zip(names, runs, strict=True)):
        axis.scatter(
            predicted, truth, s=55, color=colour(place, len(runs)), marker=MARKERS[place % len(MARKERS)],
            edgecolor="white", linewidth=0.7, label=name,
        )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=columns, handletextpad=0.2, columnspacing=1.2)
    axis.set(xlabel=predicted_label, ylabel=_ALONE)
    return figure


def accuracy_map(
    space: SearchSpace, accuracy: Mapping[int, float], label: str, best: Architecture | None = None
) -> Figure | None:
    """Accuracy over the positions of the poolings: bars (p = 1), a triangle (p = 2), triangles (p = 3).

    Args:
        accuracy: in percent, by index; architectures without one stay grey.
        label: what it is, for the colour bar.
        best: has a bold frame; the default architecture has a dashed one.
    Returns:
        None with more than three poolings, for which a plane has no room.
    """
    if space.num_pools == 1:
        return _bars(space, accuracy, label, best)
    if space.num_pools > 3:
        return None
    firsts = range(1, space.num_layers - 2) if space.num_pools == 3 else [0]  # of p = 3: position of the first pooling
    columns = min(4, len(firsts))
    rows = -(-len(firsts) // columns)
    writes = space.num_pools == 2 and len(space) <= _MAX_WRITTEN
    size = (WIDTH, 1.9 * rows + 0.9) if space.num_pools == 3 else (7.4, 5.6)
    figure, axes = new_figure(size[1], rows, columns, width=size[0], sharex=True, sharey=True)
    figure.set_layout_engine("compressed")  # no gaps between square axes
    values = list(accuracy.values())
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 1.0
    image = None
    for axis, first in zip(axes, firsts, strict=False):
        prefix = (first,) if space.num_pools == 3 else ()
        cells = np.full((space.num_layers, space.num_layers), np.nan)
        for a in space:
            if a.pool_positions[: len(prefix)] == prefix and a.index in accuracy:
                cells[a.pool_positions[-2], a.pool_positions[-1]] = accuracy[a.index]
        image = axis.imshow(cells, cmap=SEQUENTIAL, vmin=low, vmax=high, origin="lower")
        for a in space:
            if a.pool_positions[: len(prefix)] == prefix:
                _cell(axis, a, accuracy.get(a.index), writes, (low, high))
                _frame(axis, a, space.default, best)
        axis.set(xlim=(1.5 if not prefix else 2.5, space.num_layers - 0.5))
        axis.set(ylim=(0.5 if not prefix else 1.5, space.num_layers - 1.5))
        axis.grid(visible=False)
        if prefix:
            axis.set_title(f"first before {first}")
        else:
            axis.set(xticks=range(2, space.num_layers), yticks=range(1, space.num_layers - 1))
    finish_grid(axes, len(firsts))
    if space.num_pools == 3:
        figure.supxlabel("third pooling before layer")
        figure.supylabel("second pooling before layer")
    else:
        axes[0].set(xlabel="second pooling before layer", ylabel="first pooling before layer")
    assert image is not None
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def _cell(axis: Axes, a: Architecture, value: float | None, writes: bool, limits: tuple[float, float]) -> None:
    y, x = a.pool_positions[-2:]
    if value is None:
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="//"))
    elif writes:
        dark = value < (limits[0] + limits[1]) / 2
        axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=12, color="white" if dark else "black")


def _frame(axis: Axes, a: Architecture, default: Architecture, best: Architecture | None) -> None:
    y, x = a.pool_positions[-2:]
    if a == default:
        frame = Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor="white", linewidth=2.5)
        axis.add_patch(frame)
        axis.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor="black", linestyle="--"))
    if a == best:
        axis.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=ACCENT, linewidth=3.5))


def _bars(space: SearchSpace, accuracy: Mapping[int, float], label: str, best: Architecture | None) -> Figure:
    figure, (axis,) = new_figure(4.0)
    known = [a for a in space if a.index in accuracy]
    bars = axis.bar([a.pool_positions[0] for a in known], [accuracy[a.index] for a in known], color=PALETTE[0])
    for a, bar in zip(known, bars, strict=True):
        if a == best:
            bar.set(edgecolor=ACCENT, linewidth=3.5)
        if a == space.default:
            bar.set(hatch="//", edgecolor="white" if a != best else ACCENT)
    axis.set_xticks(range(1, space.num_layers))
    axis.set(xlabel="pooling before layer", ylabel=label)
    axis.grid(visible=False, axis="x")
    return figure


def drawings(architectures: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """One row an architecture: a box for each layer, as high as its map is large (by logarithm), with its size.

    Args:
        architectures: what each is, and the height (= width) of each layer's map, in the order of the rows.
    """
    figure, axes = new_figure(1.15 * len(architectures) + 0.8, len(architectures), 1, sharex=True)
    resolutions = sorted({size for _, sizes in architectures for size in sizes}, reverse=True)
    largest = np.log2(resolutions[0]) + 1
    num_layers = len(architectures[0][1])
    written = 12 if num_layers <= 12 else 10
    for axis, (name, sizes) in zip(axes, architectures, strict=True):
        for layer, size in enumerate(sizes):
            height = (np.log2(size) + 1) / largest
            fill = colour(resolutions.index(size), len(resolutions))
            axis.add_patch(Rectangle((layer - 0.44, 0), 0.88, height, color=fill, alpha=0.35, linewidth=0))
            axis.text(layer, height / 2, str(size), ha="center", va="center", fontsize=written)
            if layer and size != sizes[layer - 1]:
                axis.axvline(layer - 0.5, color=ACCENT, linewidth=2.5, ymax=0.92)
        axis.set(xlim=(-0.6, num_layers - 0.4), ylim=(0, 1.08), yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(length=0)
    axes[-1].set_xticks(range(num_layers))
    axes[-1].set_xlabel("layer")
    return figure
