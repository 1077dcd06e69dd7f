"""The part of a report about cost: accuracy against MACs and measured latency, and how far MACs predict latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmsn.correlation import agreement
from bmsn.cost import pareto_front
from bmsn.figures_cost import CostPanel, latency_figure, pareto_figure, pareto_panels
from bmsn.latency import BUSY_SPREAD
from bmsn.reporting_page import Block, Cell, Heading, Plot, Row, Table, Text, cell
from bmsn.reporting_run import ReportedRow, ReportedRun

_ACCURACY = "accuracy in the supernet (%)"
_MACS = "MACs relative to the default"


@dataclass(frozen=True, kw_only=True)
class BatchLatency:
    """Latency at one batch size.

    Attributes:
        batch_size: images in a forward pass.
        spread: how far the quartiles lie apart, relative to the median: the median over architectures.
        milliseconds: lower quartile, median and upper quartile, by stage depths as 4-3-3.
    """

    batch_size: int
    spread: float
    milliseconds: dict[str, tuple[float, float, float]]

    def of(self, row: ReportedRow) -> tuple[float, float, float]:
        return self.milliseconds[row.architecture.slug]


def latencies(run: ReportedRun) -> list[BatchLatency]:
    """What a search with `latency` measured, one for each batch size; empty where it did not."""
    found: Mapping[str, Any] = run.result.get("latency") or {}
    return [
        BatchLatency(
            batch_size=int(size),
            spread=spread,
            milliseconds={slug: tuple(by_size[size]) for slug, by_size in found["milliseconds"].items()},
        )
        for size, spread in found.get("spread", {}).items()
    ]


def latency_columns(run: ReportedRun) -> list[tuple[str, Callable[[ReportedRow], Cell]]]:
    """Columns of the ranking: median milliseconds at each batch size."""

    def column(latency: BatchLatency) -> tuple[str, Callable[[ReportedRow], Cell]]:
        return f"ms, batch {latency.batch_size}", lambda row: cell(latency.of(row)[1], "{:.4g}")

    return [column(latency) for latency in latencies(run)]


def cost_blocks(run: ReportedRun, name: str) -> list[Block]:
    """The blocks of a run, those without data left out; figures are called `name`-..."""
    blocks = [*_pareto(run, name), *_latency(run, name)]
    return [Heading("Accuracy against cost"), *blocks] if blocks else []


def _pareto(run: ReportedRun, name: str) -> list[Block]:
    """The front against MACs and, where it is measured, beside it those against latency."""
    rows = run.whole
    if not rows:
        return []
    names, accuracy = [str(row.architecture) for row in rows], _percent(rows)
    macs = CostPanel(label=_MACS, cost=[row.macs_ratio for row in rows], title="MACs")
    figure = pareto_figure(names, macs, accuracy, default=_default(run, rows), accuracy_label=_ACCURACY)
    blocks: list[Block] = [
        Plot(f"{name}-pareto", "Pareto front",
             "Nothing is at once cheaper and better than what is on the front.", figure)
    ]  # fmt: skip
    measured = latencies(run)
    if measured:
        panels = [macs, *(_panel(latency, rows, f"latency, batch {latency.batch_size}") for latency in measured)]
        figure = pareto_panels(names, panels, accuracy, default=_default(run, rows), accuracy_label=_ACCURACY)
        caption = "Medians; grey bars: from the lower to the upper quartile of the times measured."
        blocks.append(Plot(f"{name}-pareto-latency", "Pareto fronts against latency", caption, figure))
    return blocks


def _latency(run: ReportedRun, name: str) -> list[Block]:
    """How far MACs predict latency."""
    measured = latencies(run)
    if not measured:
        return []
    note = Text(run.result["latency"]["note"], is_note=max(latency.spread for latency in measured) > BUSY_SPREAD)
    macs = {row.architecture.index: float(row.macs) for row in run.rows}
    panels, rows = [], []
    for latency in measured:
        medians = {row.architecture.index: latency.of(row)[1] for row in run.rows}
        figures = agreement(macs, medians, macs)
        tau = figures["kendall_tau_b"]
        title = f"batch {latency.batch_size}: " + ("no tau-b" if tau is None else f"tau-b {tau:.3f}")
        panels.append(_panel(latency, run.rows, title))
        rows.append(Row([
            cell(latency.batch_size), cell(tau, "{:.3f}"), cell(figures["spearman"], "{:.3f}"),
            cell(100 * latency.spread, "{:.1f}"), cell(min(medians.values()), "{:.4g}"),
            cell(max(medians.values()), "{:.4g}"), *_fronts(run, latency),
        ]))  # fmt: skip
    columns = ["batch", "tau-b with MACs", "Spearman", "spread %", "fastest (ms)", "slowest (ms)"]
    columns += ["on both fronts", "by latency alone", "by MACs alone"] if run.whole else []
    caption = (
        "How far MACs predict latency: rank correlations of the medians with MACs. Spread: how far quartiles lie "
        "apart, relative to the median; differences below it say nothing."
    )
    if run.whole:
        caption += " Fronts: how many architectures are on that of accuracy against latency and that against MACs."
    figure = latency_figure([row.macs_ratio for row in run.rows], panels, default=_default(run, run.rows))
    shown = "Medians with quartiles; dotted: in proportion to the MACs of the default, which has a frame."
    return [note, Plot(f"{name}-latency", "Latency against MACs", shown, figure), Table(columns, rows, caption)]


def _fronts(run: ReportedRun, latency: BatchLatency) -> list[Cell]:
    """How many are on both fronts, on that against latency alone, and on that against MACs alone."""
    if not run.whole:
        return []
    accuracy = _percent(run.whole)
    fast = pareto_front(accuracy, [latency.of(row)[1] for row in run.whole])
    cheap = pareto_front(accuracy, [row.macs for row in run.whole])
    pairs = list(zip(fast, cheap, strict=True))
    return [cell(pairs.count(pair)) for pair in ((True, True), (True, False), (False, True))]


def _panel(latency: BatchLatency, rows: Sequence[ReportedRow], title: str) -> CostPanel:
    times = [latency.of(row) for row in rows]
    return CostPanel(
        label=f"milliseconds for a batch of {latency.batch_size}",
        cost=[median for _, median, _ in times],
        quartiles=[(low, high) for low, _, high in times],
        title=title,
    )


def _percent(rows: Sequence[ReportedRow]) -> list[float]:
    """Accuracies of rows that have one."""
    return [100 * (row.accuracy or 0.0) for row in rows]


def _default(run: ReportedRun, rows: Sequence[ReportedRow]) -> int | None:
    return next((i for i, row in enumerate(rows) if row.architecture == run.space.default), None)
