"""Figures of an interference experiment: accuracies over training, and what the first layer became."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bmsn.figures import MARKERS, PALETTE, WIDTH, new_figure
from bmsn.interference import NETS, Interference

_MAX_SHOWN = 16  # filters of the first convolution
_ZOOM = 5  # pixels on a side of a filter's weight, where the line between two filters has 1


def accuracy_figure(result: Interference) -> Figure:
    """Accuracy of each net with the early and with the late architecture, over the updates on an architecture."""
    figure, axes = new_figure(4.6, 1, 2, sharey=True)
    for which, (axis, architecture) in enumerate(zip(axes, result.architectures, strict=True)):
        for net, name in enumerate(NETS):
            label = "alternating" if name == "alternating" else f"trained on {result.architectures[net]}"
            axis.plot(
                result.steps, 100 * result.accuracy[:, net, which], marker=MARKERS[net], markersize=7,
                color=PALETTE[net], label=label if which == 0 else None,
            )  # fmt: skip
        axis.set(
            title=f"used with {architecture} ({NETS[which]})", xlabel="updates on each architecture", ylim=(0, 100)
        )
    axes[0].set_ylabel("accuracy (%)")
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


def filters_figure(result: Interference) -> Figure:
    """Filters of the first convolution, at the start and of each net; each filter in its own range."""
    figure, axes = new_figure(WIDTH, 2, 2)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.04)  # more than the lines between tiles
    for axis, name, filters in zip(axes, ("at the start", *NETS), result.filters, strict=True):
        _show(axis, name, _mosaic([_as_picture(one) for one in filters[:_MAX_SHOWN]], gap=1))
    return figure


def features_figure(result: Interference) -> Figure:
    """One image, and its maps behind the first layer of each net; each map in its own range."""
    figure, axes = new_figure(WIDTH, 2, 2)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.04)  # more than the lines between tiles
    _show(axes[0], "the image", result.image.squeeze())
    for axis, name, maps in zip(axes[1:], NETS, result.features[1:], strict=True):
        _show(axis, name, _mosaic([_scaled(one) for one in maps[:_MAX_SHOWN]], gap=2))
    return figure


def _show(axis: Axes, title: str, picture: NDArray) -> None:
    axis.imshow(picture, cmap="gray")
    axis.set_title(title)
    axis.set_axis_off()


def _mosaic(tiles: list[NDArray], gap: int) -> NDArray:
    """Pictures of one size (H, W) or (H, W, 3) in [0, 1] as a square of them, with white lines of `gap` pixels."""
    columns = math.ceil(math.sqrt(len(tiles)))
    height, width = (side + gap for side in tiles[0].shape[:2])
    rows = -(-len(tiles) // columns)
    picture = np.ones((rows * height - gap, columns * width - gap, *tiles[0].shape[2:]))
    for place, tile in enumerate(tiles):
        y, x = (place // columns) * height, (place % columns) * width
        picture[y : y + height - gap, x : x + width - gap] = tile
    return picture


def _as_picture(filter_weights: NDArray) -> NDArray:
    """(C, kh, kw) in colour for three channels, else the mean over the channels; in [0, 1], each weight a square."""
    picture = _scaled(filter_weights.transpose(1, 2, 0) if len(filter_weights) == 3 else filter_weights.mean(0))
    return picture.repeat(_ZOOM, 0).repeat(_ZOOM, 1)


def _scaled(picture: NDArray) -> NDArray:
    low, high = picture.min(), picture.max()
    return (picture - low) / (high - low) if high > low else np.zeros_like(picture)
