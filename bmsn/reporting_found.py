"""The parts of a report about what a run found: agreement with the truth, ranking, maps, cost, drawings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmsn.correlation import why_undefined
from bmsn.cost import pareto_front
from bmsn.figures_accuracy import accuracy_map, drawings, truth_figure
from bmsn.reporting_cost import cost_blocks, latency_columns
from bmsn.reporting_methods import method_blocks
from bmsn.reporting_page import Block, Cell, Heading, Plot, Row, Table, Text, cell, percent
from bmsn.reporting_run import ReportedRow, ReportedRun

IN_SUPERNET = "accuracy in the supernet (%)"
WITHIN_SUPERNET = "Accuracies are within a supernet, on the validation half; not after retraining."


def found_blocks(run: ReportedRun, name: str) -> list[Block]:
    """The blocks of a run, those without data left out; figures are called `name`-..."""
    blocks: list[Block] = []
    for part in (_found, _against_truth, _ranking, _maps, cost_blocks, _drawings, method_blocks, _retrained):
        blocks += part(run, name)
    return blocks


def _found(run: ReportedRun, name: str) -> list[Block]:
    if not run.rows:
        return []
    best, default = run.rows[0], run.default
    parts = [
        f"Best: {best.architecture}{_accuracy(best)}, {best.macs_ratio:.2f}x the MACs of the default, pooling before "
        f"layers {_positions(best)}."
    ]
    if default is not None and default is not best:
        parts.append(f"The default {default.architecture}{_accuracy(default)} has rank {default.rank}.")
    parts.append(f"Ranked by {run.ranked_by}.")
    if any(row.accuracy is not None for row in run.rows):
        parts.append(WITHIN_SUPERNET)
        adapt = run.config.get("adapt")
        if adapt and run.finished:
            parts.append(
                f"Before each is taken, a copy of the supernet trains {adapt} steps with that architecture alone."
            )
    return [Text(" ".join(parts))]


def _accuracy(row: ReportedRow) -> str:
    return "" if row.accuracy is None else f" ({100 * row.accuracy:.2f} %)"


def _against_truth(run: ReportedRun, name: str) -> list[Block]:
    if not run.agreement:
        return []
    names = {"ranking": "this ranking", "accuracy": "by accuracy", "ema": f"by {run.estimate}", "macs": "by MACs alone"}
    rows = []
    for key, figures in run.agreement.items():
        numbers = [figures[field] for field in ("kendall_tau_b", "spearman", "partial_kendall")]
        regrets = [figures[f"regret_top{k}"] for k in (1, 3, 5)]
        rows.append(Row([
            cell(names[key]), *(cell(number, "{:.3f}") for number in numbers),
            *(cell(regret, "{:.2f}") for regret in regrets), cell(figures["n"]), cell(why_undefined(figures)),
        ]))  # fmt: skip
    columns = ["ranking", "tau-b", "Spearman", "tau-b | MACs", "regret of top 1", "top 3", "top 5", "n", "not defined"]
    if not any(row.cells[-1].text for row in rows):
        columns = columns[:-1]
        rows = [Row(row.cells[:-1]) for row in rows]
    without = [str(row.architecture) for row in run.rows if row.truth is None]
    missing = f" Without a row in the truth: {', '.join(without)}." if without else ""
    caption = f"Regret in points of accuracy trained alone. A search must beat MACs to have learnt anything.{missing}"
    blocks: list[Block] = [Heading("Against the truth"), Table(columns, rows, caption)]
    shown = [(row, row.accuracy, row.truth) for row in run.whole if row.accuracy is not None and row.truth is not None]
    if shown:
        figure = truth_figure(
            [100 * accuracy for _, accuracy, _ in shown], [row.macs_ratio for row, *_ in shown],
            [truth for *_, truth in shown], [row.supernet for row, *_ in shown],
            (with_tau("search", run.agreement.get("accuracy", run.agreement["ranking"])),
             with_tau("MACs alone", run.agreement["macs"])),
            IN_SUPERNET,
        )  # fmt: skip
        caption = "Left: accuracy in the search against accuracy trained alone. Right: MACs in place of a search."
        blocks.append(Plot(f"{name}-truth", "Search against truth", caption, figure))
    return blocks


def with_tau(what: str, figures: dict[str, Any]) -> str:
    """`what: tau-b 0.599`, or why there is none."""
    tau = figures["kendall_tau_b"]
    return f"{what}: " + (f"no tau-b ({figures['undefined']['kendall_tau_b']})" if tau is None else f"tau-b {tau:.3f}")


def _ranking(run: ReportedRun, name: str) -> list[Block]:
    if not run.rows:
        return []
    on_front = pareto_front([row.accuracy for row in run.whole], [row.macs for row in run.whole])
    front = {row.architecture for row, is_on_it in zip(run.whole, on_front, strict=True) if is_on_it}
    total = run.result.get("scores", {}).get("total")
    candidates: list[tuple[str, bool, Callable[[ReportedRow], Cell]]] = [
        ("rank", True, lambda row: cell(row.rank)),
        ("architecture", True, lambda row: cell(str(row.architecture))),
        ("pooling before", True, lambda row: cell(_positions(row))),
        ("accuracy %", any(row.accuracy is not None for row in run.rows), lambda row: percent(row.accuracy)),
        (f"by {run.config.get('rank_by')} %", any(row.rank_value is not None for row in run.rows),
         lambda row: percent(row.rank_value)),
        ("supernet", any(row.supernet is not None for row in run.rows), lambda row: cell(row.supernet)),
        ("MACs (M)", True, lambda row: cell(row.macs / 1e6, "{:.1f}")),
        ("MACs", True, lambda row: cell(row.macs_ratio, "{:.2f}x")),
        ("Pareto", bool(front), lambda row: cell("yes" if row.architecture in front else "")),
        ("± %", any(row.other.get("standard_error") is not None for row in run.rows),
         lambda row: percent(row.other["standard_error"])),
        ("images", any(row.other.get("images_seen", total) not in (0, total) for row in run.rows),
         lambda row: cell(row.other["images_seen"])),
        (f"{run.estimate} %", any(row.other.get("ema_accuracy") is not None for row in run.rows),
         lambda row: percent(row.other["ema_accuracy"])),
        (f"{run.estimate} rank", any(row.other.get("ema_rank") is not None for row in run.rows),
         lambda row: cell(row.other["ema_rank"])),
        ("alone %", any(row.truth is not None for row in run.rows), lambda row: cell(row.truth, "{:.2f}")),
    ]  # fmt: skip
    shown = [(column, make) for column, there, make in candidates if there] + latency_columns(run)
    rows = [Row([make(row) for _, make in shown], is_marked=row.architecture == run.space.default) for row in run.rows]
    caption = f"By {run.ranked_by}. A click on a column sorts by it. The default architecture is marked."
    return [Heading("Ranking"), Table([column for column, _ in shown], rows, caption, sortable=True)]


def _maps(run: ReportedRun, name: str) -> list[Block]:
    best = run.rows[0].architecture if run.rows else None
    found = {row.architecture.index: 100 * row.accuracy for row in run.rows if row.accuracy is not None}
    alone = {row.architecture.index: row.truth for row in run.rows if row.truth is not None}
    best_alone = run.space[max(alone, key=lambda index: alone[index])] if alone else None
    blocks: list[Block] = []
    maps = (
        ("map", "search", "in the supernet", found, best),
        ("map-truth", "truth", "trained alone", alone, best_alone),
    )
    for file, what, label, values, marked in maps:
        figure = accuracy_map(run.space, values, f"accuracy {label} (%)", marked) if values else None
        if figure is not None:
            caption = f"Accuracy {label}. Bold frame: the best; dashed: the default architecture."
            caption += " Hatched: there is none." if len(values) < len(run.space) else ""
            blocks.append(Plot(f"{name}-{file}", f"Accuracy by pooling positions: {what}", caption, figure))
    return [Heading("Accuracy by pooling positions"), *blocks] if blocks else []


def _drawings(run: ReportedRun, name: str) -> list[Block]:
    if not run.rows:
        return []
    chosen = {row.architecture: f"rank {row.rank}" for row in run.rows[:3]}
    default, cheap = run.default, next((row for row in run.rows if row.macs_ratio <= 1), None)
    if cheap is not None and cheap.rank > 3:
        chosen[cheap.architecture] = f"rank {cheap.rank}, best\nat ≤ 1x MACs"
    if default is not None:
        chosen[default.architecture] = f"default, rank {default.rank}"
    rows = [(f"{a}\n{what}", run.space.map_sizes(a, run.image_size)) for a, what in chosen.items()]
    if run.resolution_path is not None:
        full = rows[0][1][0]  # the first layer is never pooled
        rows.insert(0, ("path found", tuple(full // 2**resolution for resolution in run.resolution_path)))
    caption = "Height and width of each layer's output map, in pixels; lines: where it changes."
    return [Heading("Architectures"), Plot(f"{name}-drawings", "Architectures", caption, drawings(rows))]


def _retrained(run: ReportedRun, name: str) -> list[Block]:
    if not run.retrained:
        return []
    columns = list(run.retrained[0])
    rows = [Row([cell(row[column] or None) for column in columns]) for row in run.retrained]
    caption = "Test accuracy of networks trained from scratch, in percent, after the last epoch (retrain.csv)."
    return [Heading("Retrained alone"), Table(columns, rows, caption, sortable=True)]


def _positions(row: ReportedRow) -> str:
    return ", ".join(map(str, row.architecture.pool_positions))
