"""Figures of what methods other than the mixture found: trees, probabilities, resolutions, supernets side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from bmsn.figures import ACCENT, MARKERS, PALETTE, SEQUENTIAL, WIDTH, colour, finish_grid, new_figure
from bmsn.reporting_records import TreeNode, climbs

_UNKNOWN = "#E4E4E4"  # where there is no value
_NARROW = 0.022  # of the width: a narrower leaf has no room for its name
_ROOM_FOR_COUNT = 0.055  # of the width: a narrower box has no room for its visits
_INVISIBLE = 0.0004  # of the width: a third of a pixel


def course_figure(
    x: NDArray[np.float64], panels: Sequence[tuple[str, NDArray[np.float64]]], row_names: Sequence[str], *,
    x_label: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]] = (),
) -> Figure:  # fmt: skip
    """Values of the architectures over training as maps side by side: a row an architecture, time to the right.

    Args:
        x: (S,) where each snapshot ends; the first begins at 0.
        panels: name and (S, C) values; NaN stays grey.
        row_names: of the C architectures.
        x_label: what `x` is.
        curves: name, x and y of lines above the maps, one above each; empty: there are none.
    """
    num_rows = len(row_names)
    height = max(0.215 * num_rows, 1.8) + 1.6
    ratios = [1.1, height - 0.3] if curves else [1.0]
    figure, axes = new_figure(
        height + (1.4 if curves else 0), len(ratios), len(panels), sharex=True, height_ratios=ratios
    )
    figure.set_layout_engine("constrained", wspace=0.05)
    for axis, (name, times, values) in zip(axes, curves, strict=False):
        axis.plot(times, values, color=PALETTE[0])
        axis.set_title(name, loc="left")
        axis.set_ylim(bottom=0)
    for place, (name, matrix) in enumerate(panels):
        axis = axes[place - len(panels)]
        known = matrix[np.isfinite(matrix)]
        image = axis.pcolormesh(
            np.concatenate([[0.0], x]), np.arange(num_rows + 1) - 0.5, matrix.T, cmap=SEQUENTIAL,
            vmin=known.min() if known.size else 0, vmax=known.max() if known.size else 1, rasterized=True,
        )  # fmt: skip
        axis.set_facecolor(_UNKNOWN)
        axis.grid(visible=False)
        axis.invert_yaxis()
        axis.set_yticks(range(num_rows), row_names if place == 0 else [""] * num_rows)
        axis.tick_params(axis="y", length=0 if place else 3.5)
        axis.tick_params(axis="y", labelsize=11)
        axis.set_xlabel(x_label)
        figure.colorbar(image, ax=axis, location="bottom", label=name, aspect=28, pad=0.02)
    axes[-len(panels)].set_ylabel("architecture")
    return figure


def tree_figure(nodes: Sequence[TreeNode], leaf_names: Sequence[str], num_layers: int) -> Figure:
    """The tree over keep and pool: a box a node, as wide as its share of the visits, below that of its parent.

    Args:
        nodes: of all layers.
        leaf_names: those of the nodes of the last layer, in their order.
        num_layers: L.
    """
    figure, (axis,) = new_figure(0.42 * num_layers + 2.3)
    shown = [node for node in nodes if node.width > _INVISIBLE]
    large = [node.reward for node in nodes if node.width > 0.01] or [node.reward for node in nodes]
    limits = Normalize(100 * min(large), 100 * max(large))
    boxes = PatchCollection(
        [Rectangle((node.left, node.layer - 0.5), node.width, 1) for node in shown],
        cmap=SEQUENTIAL, norm=limits, edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    boxes.set_array([100 * node.reward for node in shown])
    axis.add_collection(boxes)
    pooled = [node for node in shown if node.pools]
    axis.hlines(
        [node.layer - 0.5 for node in pooled], [node.left for node in pooled],
        [node.left + node.width for node in pooled], color=ACCENT, linewidth=4.5, zorder=4,
        label="pooling before the layer",
    )  # fmt: skip
    for node in shown:
        if node.picked:
            axis.add_patch(Rectangle((node.left, node.layer - 0.5), node.width, 1, fill=False, linewidth=2.5, zorder=3))
        if node.width > _ROOM_FOR_COUNT:
            dark = limits(100 * node.reward) < 0.55
            axis.text(
                node.left + node.width / 2, node.layer, str(node.visits), ha="center", va="center", fontsize=11,
                color="white" if dark else "black",
            )  # fmt: skip
    leaves = [node for node in nodes if node.layer == num_layers - 1]
    named = [(node, name) for node, name in zip(leaves, leaf_names, strict=True) if node.width > _NARROW]
    axis.set_xticks([node.left + node.width / 2 for node, _ in named], [name for _, name in named], rotation=90)
    for (node, _), tick in zip(named, axis.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if node.picked else "normal")
    axis.tick_params(length=0)
    axis.set(xlim=(0, 1), ylim=(num_layers - 0.48, -0.56), yticks=range(num_layers), ylabel="layer")
    axis.grid(visible=False)
    figure.colorbar(boxes, ax=axis, label="mean reward (accuracy, %)", aspect=30, extend="both", pad=0.015)
    figure.legend(loc="outside lower center")
    return figure


def layers_figure(
    x: NDArray[np.float64], values: NDArray[np.float64], sizes: Sequence[int], *, x_label: str, y_label: str
) -> Figure:
    """A panel for each layer but the first, with a line for each resolution.

    Args:
        x: (S,) of the snapshots.
        values: (S, L, R) in [0, 1].
        sizes: (R,) height and width of the maps at each resolution, in pixels.
    """
    num_layers = values.shape[1]
    columns = 3 if num_layers <= 10 else 4
    rows = -(-(num_layers - 1) // columns)
    figure, axes = new_figure(1.95 * rows + 1.1, rows, columns, sharex=True, sharey=True)
    for layer, axis in enumerate(axes[: num_layers - 1], start=1):
        for r, size in enumerate(sizes):
            known = np.isfinite(values[:, layer, r])  # none: no path of the space works there
            axis.plot(
                x[known], 100 * values[known, layer, r], color=colour(r, len(sizes)), marker=MARKERS[r], markersize=6,
                markevery=0.25 if known.any() else None, label=f"{size} px" if layer == 1 else None,
            )  # fmt: skip
        axis.set_title(f"layer {layer}", loc="left")
        axis.tick_params(labelbottom=layer + columns >= num_layers)
    finish_grid(axes, num_layers - 1)
    figure.supxlabel(x_label)
    figure.supylabel(y_label)
    figure.legend(loc="outside upper center", ncols=len(sizes), columnspacing=1.2)
    return figure


def path_figure(path: Sequence[int], sizes: Sequence[int], shares: NDArray[np.float64] | None) -> Figure:
    """A path through resolutions, from the first layer to the last; where it goes up again it is drawn in orange.

    Args:
        path: (L,) resolution of each layer, 0: full.
        sizes: (R,) height and width of the maps at each resolution, in pixels.
        shares: (L, R) in [0, 1]: written at the layers' resolutions; None: there are none.
    """
    figure, (axis,) = new_figure(0.85 * len(sizes) + 1.7)
    up = climbs(path)
    for layer in range(1, len(path)):
        axis.plot(
            [layer - 1, layer], path[layer - 1 : layer + 1], color=ACCENT if layer in up else PALETTE[0], linewidth=4,
            linestyle=(0, (1.6, 0.8)) if layer in up else "-", zorder=1,
        )  # fmt: skip
    for layer, chosen in enumerate(path):
        for r in range(len(sizes)) if layer else [0]:
            on_path = r == chosen
            axis.scatter(
                layer, r, s=1050 if on_path else 750, zorder=2, linewidth=2.5 if on_path else 1,
                color=["#D5E8F5" if on_path else "#F2F2F2"], edgecolor=[PALETTE[0] if on_path else "#BBBBBB"],
            )  # fmt: skip
            text = str(sizes[r]) if shares is None or layer == 0 else f"{100 * shares[layer, r]:.1f}"
            axis.text(layer, r, text, ha="center", va="center", fontsize=11, color="black" if on_path else "#555555")
    for label, drawn, kind in (("keeps or goes down", PALETTE[0], "-"), ("goes up", ACCENT, (0, (1.6, 0.8)))):
        axis.plot([], [], color=drawn, linestyle=kind, linewidth=4, label=label)
    axis.set(xlim=(-0.6, len(path) - 0.4), ylim=(len(sizes) - 0.45, -0.55), xticks=range(len(path)), xlabel="layer")
    axis.set_yticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axis.set_ylabel("height and width\nof the map")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def levels_figure(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, x_label: str, y_label: str) -> Figure:
    """Accuracies of the architectures of each supernet, with their mean, the supernet's level.

    Args:
        groups: name of a supernet, and name and accuracy in percent of each of its architectures.
    """
    figure, (axis,) = new_figure(4.6, width=WIDTH)
    for place, (_, members) in enumerate(groups):
        values = [value for _, value in members]
        axis.hlines(
            np.mean(values), place - 0.3, place + 0.3, color="black", linewidth=3, label="" if place else "mean"
        )
        axis.scatter(
            [place] * len(members), values, s=60, color=PALETTE[0], alpha=0.75, edgecolor="white", zorder=2,
            label="" if place else "one architecture",
        )  # fmt: skip
        if len(groups) <= 8:
            name, highest = max(members, key=lambda member: member[1])
            axis.annotate(
                name, (place, highest), xytext=(0, 8), textcoords="offset points", ha="center", va="bottom", fontsize=11
            )
    axis.set_xticks(range(len(groups)), [f"{name}\n{len(members)}" for name, members in groups])
    axis.set(xlabel=f"{x_label}\nnumber of architectures", ylabel=y_label)
    axis.margins(x=0.06, y=0.14)
    axis.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=2)
    return figure
