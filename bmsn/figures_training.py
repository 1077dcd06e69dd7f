"""Figures of how a search went: its training, p(m|c) over time, and the health of the mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bmsn.figures import MARKERS, PALETTE, SEQUENTIAL, WIDTH, colour, finish_grid, new_figure
from bmsn.reporting_statistics import MixtureHistory

_PANELS = 6  # snapshots of p(m|c) side by side


def training_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy, learning rate and inverse temperature over epochs, from `step` records.

    What no record has is left out.
    """
    panels = (("loss", "training loss", 1), ("accuracy", "validation accuracy (%)", 100),
              ("lr", "learning rate", 1), ("inverse_temperature", "inverse temperature", 1))  # fmt: skip
    known = {key: [(r["epoch"], r[key]) for r in records if r.get(key) is not None] for key, *_ in panels}
    shown = [panel for panel in panels if known[panel[0]]]
    columns = 3 if len(shown) == 3 else 2
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(2.8 * rows, rows, columns)
    figure.set_layout_engine("constrained", wspace=0.06)
    for axis, (key, label, factor) in zip(axes, shown, strict=False):
        axis.plot([epoch for epoch, _ in known[key]], [factor * value for _, value in known[key]], color=PALETTE[0])
        axis.set_title(label, loc="left")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
    finish_grid(axes, len(shown))
    return figure


def snapshots_figure(
    matrices: NDArray[np.float64], titles: Sequence[str], *,
    row_names: Sequence[str] | None, row_label: str, column_names: Sequence[str] | None, column_label: str, label: str,
) -> Figure:  # fmt: skip
    """Probabilities at several snapshots from the first to the last, side by side.

    Args:
        matrices: (S, rows, columns), in [0, 1].
        titles: one a snapshot.
        row_names, column_names: None: they are too many to be named.
        row_label, column_label, label: what rows, columns and values are.
    """
    count, num_rows, _ = matrices.shape
    chosen = sorted({round(place) for place in np.linspace(0, count - 1, min(_PANELS, count))})
    height = 7.5 if row_names is None else max(0.215 * num_rows, 1.8) + 1.5
    figure, axes = new_figure(height, 1, len(chosen), sharey=True)
    image = None
    for axis, snapshot in zip(axes, chosen, strict=True):
        image = axis.imshow(matrices[snapshot], cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        axis.set_title(titles[snapshot])
        axis.grid(visible=False)
        if column_names is not None:
            axis.set_xticks(range(len(column_names)), column_names)
    if row_names is not None:
        axes[0].set_yticks(range(num_rows), row_names, fontsize=11)
    axes[0].set_ylabel(row_label)
    figure.supxlabel(column_label)
    assert image is not None
    figure.colorbar(image, ax=axes, label=label, shrink=0.8, aspect=30)
    return figure


def health_figure(history: MixtureHistory, steps_per_epoch: float | None) -> Figure:
    """Load, entropy, KL(p(m) || uniform), switch rate, age of a[c,m] and pairs never visited, over training.

    Of one supernet, which has nothing to balance, the last two alone.
    """
    x = history.steps / (steps_per_epoch or 1)
    if history.load.shape[1] > 1:
        figure, axes = new_figure(8.4, 3, 2, sharex=True)
        _balance(axes, history, x)
        if history.load.shape[1] <= len(PALETTE):
            figure.legend(loc="outside upper center", ncols=9, title="supernet", handlelength=1.2, columnspacing=1.2)
    else:
        figure, axes = new_figure(3.4, 1, 2)
    age, never = axes[-2:]
    curves = (("oldest", history.age_max), ("median", history.age_median), ("median, assigned", history.age_assigned))
    for place, (name, values) in enumerate(curves if history.load.shape[1] > 1 else curves[:2]):
        age.plot(x, values, color=PALETTE[place], marker=MARKERS[place], markevery=0.2, label=name, linewidth=1.6)
    age.set_title("age of a[c,m] (steps)", loc="left")
    age.set_ylim(0, 1.5 * max(1.0, history.age_max.max()))  # with room for the legend
    age.legend(loc="upper left")
    never.plot(x, 100 * history.never_visited, color=PALETTE[0])
    never.set_title("pairs never visited (%)", loc="left")
    never.set_ylim(bottom=0)
    for axis in (age, never):
        axis.set_xlabel("step" if steps_per_epoch is None else "epoch")
    return figure


def _balance(axes: Sequence[Axes], history: MixtureHistory, x: NDArray[np.float64]) -> None:
    """Draws load, entropy, KL and switch rate into the first four axes."""
    load, entropy, kl, switches = axes[:4]
    num_supernets = history.load.shape[1]
    for m in range(num_supernets):
        load.plot(x, 100 * history.load[:, m], color=colour(m, num_supernets), label=str(m), linewidth=1.6)
    load.axhline(100 / num_supernets, color="black", linestyle=":", linewidth=1.5)
    load.set_title("share of the visits (%)", loc="left")
    load.set_ylim(bottom=0)
    entropy.plot(x, history.entropy, color=PALETTE[0])
    entropy.axhline(np.log(num_supernets), color="black", linestyle=":", linewidth=1.5)
    entropy.set_title("entropy of p(m|c) (nats)", loc="left")
    entropy.set_ylim(0, max(1.1 * np.log(num_supernets), 0.1))
    kl.semilogy(x, np.maximum(history.kl, 1e-16), color=PALETTE[0])
    kl.set_title("KL(p(m) || uniform) (nats)", loc="left")
    kl.set_ylim(5e-17, 1)
    kl.yaxis.set_major_formatter("{x:.0e}")
    switches.plot(x, 100 * history.switch_rate, color=PALETTE[0])
    switches.set_title("argmax p(m|c) changed (%)", loc="left")
    switches.set_ylim(bottom=0)


def ranking_history_figure(epochs: Sequence[float], curves: Mapping[str, Sequence[float | None]]) -> Figure:
    """tau-b of the rankings made during training; None where it is not defined."""
    figure, (axis,) = new_figure(3.8, width=WIDTH)
    for place, (name, values) in enumerate(curves.items()):
        axis.plot(
            epochs, [np.nan if v is None else v for v in values], "-", marker=MARKERS[place], markersize=8,
            color=PALETTE[place], label=name,
        )  # fmt: skip
    axis.axhline(0, color="black", linewidth=1)
    axis.set(xlabel="epoch", ylabel="tau-b", xlim=(0, 1.05 * max(epochs)), ylim=(min(-0.1, axis.get_ylim()[0]), 1.05))
    axis.legend()
    return figure
