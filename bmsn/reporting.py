"""`write_report`: runs of bmsn.search as one HTML page; its figures are beside it as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bmsn.correlation import agreement
from bmsn.errors import InputError
from bmsn.figures import style
from bmsn.figures_accuracy import accuracy_map, drawings, pareto_figure, truth_figure
from bmsn.figures_training import assignment_figure, health_figure, ranking_history_figure, training_figure
from bmsn.reporting_page import Block, Cell, Heading, Page, Plot, Row, Section, Table, Text, cell, write_page
from bmsn.reporting_reproduction import reproduction
from bmsn.reporting_run import ReportedRow, ReportedRun, read_runs
from bmsn.reporting_statistics import MixtureHistory, mixture_history, pareto_front

_SNAPSHOTS_LISTED = 8
_IN_SUPERNET = "Accuracies are within a supernet, on the validation half; not after retraining."


def write_report(runs: Sequence[str | Path], out: str | Path, *, truth: str | None = None) -> Path:
    """Writes one self-contained HTML page about runs of bmsn.search, finished or not.

    A part is there where its data is. The page loads nothing from elsewhere; its table sorts by a click.

    Args:
        runs: run folders; spaces and data may differ.
        out: a file that ends in .html, or a folder for report.html.
        truth: stand-alone accuracies to compare with instead of those that the runs name: "paper" or a CSV file.
    Returns:
        The HTML file. Its figures are in <name>-figures beside it.
    Raises:
        InputError: no run given, or what `read_runs` and `write_page` raise it for.
    """
    if not runs:
        raise InputError("a report needs at least one run folder; got none")
    read = read_runs([Path(run) for run in runs], truth)
    with style():
        sections = [
            Section(run.label, f"run-{place}", _run_blocks(run, f"run-{place}"))
            for place, run in enumerate(read, start=1)
        ]
        title = f"{read[0].space.name} on {read[0].data_name}" if len(read) == 1 else f"{len(read)} searches"
        page = Page(title, [_summary(read)] if len(read) > 1 else [], sections)
        return write_page(page, Path(out), "report.html")


def _summary(runs: Sequence[ReportedRun]) -> Table:
    """One row a run; a setting that all runs share stands in the caption."""
    settings = {
        "state": ["finished" if run.finished else "unfinished" for run in runs],
        "space": [run.space.name for run in runs],
        "data": [run.data_name for run in runs],
        "method": [run.config.get("method", "mixture") for run in runs],
        "M": [run.config.get("supernets") for run in runs],
        "epochs": [run.config.get("epochs") for run in runs],
        "seed": [run.config.get("seed") for run in runs],
    }
    differing = [name for name, values in settings.items() if any(value != values[0] for value in values)]
    rows = []
    for place, run in enumerate(runs):
        best = run.rows[0] if run.rows else None
        ranking, macs = run.agreement.get("ranking", {}), run.agreement.get("macs", {})
        rows.append(Row([
            cell(run.label), *(cell(settings[name][place]) for name in differing),
            cell(str(best.architecture) if best else None), _percent(best.accuracy if best else None),
            cell(best.macs_ratio if best else None, "{:.2f}x"), cell(ranking.get("kendall_tau_b"), "{:.3f}"),
            cell(ranking.get("partial_kendall"), "{:.3f}"), cell(macs.get("kendall_tau_b"), "{:.3f}"),
            cell(ranking.get("regret_top1"), "{:.2f}"),
            cell(run.result.get("timings", {}).get("total_seconds"), "{:.0f}"),
        ]))  # fmt: skip
    columns = ("best", "accuracy %", "MACs", "tau-b", "partial", "MACs alone", "regret", "seconds")
    shared = ", ".join(f"{name} {values[0]}" for name, values in settings.items() if name not in differing)
    caption = (
        f"{_IN_SUPERNET} Against the truth: tau-b of the ranking, the same with MACs held fixed, tau-b of MACs alone, "
        "and regret of the best in points. A dash: not there, or not defined."
    )
    caption += f" All runs: {shared}." if shared else ""
    return Table(("run", *differing, *columns), rows, caption, sortable=True)


def _run_blocks(run: ReportedRun, name: str) -> list[Block]:
    """Everything about a run; parts without data leave nothing behind."""
    history = _history(run)
    blocks: list[Block] = [Text(note, is_note=True) for note in run.notes]
    for part in (_found, _agreement_blocks, _ranking, _maps, _pareto, _drawings, _retrained, _ranking_history):
        blocks += part(run, name)
    blocks += _training(run, name)
    if history is not None:
        blocks += _mixture(run, history, name)
    return blocks + reproduction(run)


def _found(run: ReportedRun, name: str) -> list[Block]:
    if not run.rows:
        return []
    best, default = run.rows[0], run.default
    parts = [
        f"Best: {best.architecture} (pooling before layers {_positions(best)}), {best.macs_ratio:.2f}x the MACs of the "
        f"default, {run.ranked_by} {_percent(best.accuracy).text} %."
    ]
    if default is not None and default is not best:
        parts.append(
            f"The default {default.architecture} has rank {default.rank}: {_percent(default.accuracy).text} %."
        )
    return [Text(" ".join([*parts, _IN_SUPERNET]))]


def _agreement_blocks(run: ReportedRun, name: str) -> list[Block]:
    if not run.agreement:
        return []
    names = {"ranking": "this ranking", "ema": "by a[c,m]", "macs": "by MACs alone"}
    rows = []
    for key, figures in run.agreement.items():
        numbers = [figures[field] for field in ("kendall_tau_b", "spearman", "partial_kendall")]
        regrets = [figures[f"regret_top{k}"] for k in (1, 3, 5)]
        rows.append(Row([
            cell(names[key]), *(cell(number, "{:.3f}") for number in numbers),
            *(cell(regret, "{:.2f}") for regret in regrets), cell(figures["n"]), cell(figures.get("undefined", "")),
        ]))  # fmt: skip
    columns = ["ranking", "tau-b", "Spearman", "tau-b | MACs", "regret of top 1", "top 3", "top 5", "n", "not defined"]
    if not any("undefined" in figures for figures in run.agreement.values()):
        columns = columns[:-1]
        rows = [Row(row.cells[:-1]) for row in rows]
    without = [str(row.architecture) for row in run.rows if row.truth is None]
    missing = f" Without a row in the truth: {', '.join(without)}." if without else ""
    caption = f"Regret in points of accuracy trained alone. A search must beat MACs to have learnt anything.{missing}"
    blocks: list[Block] = [Heading("Against the truth"), Table(columns, rows, caption)]
    shown = [(row, row.accuracy, row.truth) for row in run.rows if row.accuracy is not None and row.truth is not None]
    if shown:
        figure = truth_figure(
            [100 * accuracy for _, accuracy, _ in shown], [row.macs_ratio for row, *_ in shown],
            [truth for *_, truth in shown], [row.supernet for row, *_ in shown],
            (_tau("search", run.agreement["ranking"]), _tau("MACs alone", run.agreement["macs"])),
            "accuracy in the supernet (%)",
        )  # fmt: skip
        caption = (
            f"Left: {run.ranked_by} against accuracy trained alone. Right: the same with MACs in place of a search."
        )
        blocks.append(Plot(f"{name}-truth", "Search against truth", caption, figure))
    return blocks


def _tau(what: str, figures: dict[str, Any]) -> str:
    tau = figures["kendall_tau_b"]
    return f"{what}: " + (f"no tau-b ({figures['undefined']})" if tau is None else f"tau-b {tau:.3f}")


def _ranking(run: ReportedRun, name: str) -> list[Block]:
    scored = [row for row in run.rows if row.accuracy is not None]
    if not run.rows:
        return []
    places = pareto_front([row.macs for row in scored], [row.accuracy or 0.0 for row in scored])
    front = {scored[place].architecture for place in places}
    total = run.result.get("scores", {}).get("total")
    optional: list[tuple[str, bool, Callable[[ReportedRow], Cell]]] = [
        ("± %", "standard_error" in run.rows[0].other, lambda row: _percent(row.other["standard_error"])),
        ("images", any(row.other.get("images_seen", total) != total for row in run.rows),
         lambda row: cell(row.other["images_seen"])),
        ("a[c,m] %", "ema_accuracy" in run.rows[0].other, lambda row: _percent(row.other["ema_accuracy"])),
        ("a[c,m] rank", "ema_rank" in run.rows[0].other, lambda row: cell(row.other["ema_rank"])),
        ("alone %", any(row.truth is not None for row in run.rows), lambda row: cell(row.truth, "{:.2f}")),
    ]  # fmt: skip
    shown = [(column, make) for column, there, make in optional if there]
    rows = [
        Row(
            [
                cell(row.rank), cell(str(row.architecture)), cell(_positions(row)), _percent(row.accuracy),
                cell(row.supernet), cell(row.macs / 1e6, "{:.1f}"), cell(row.macs_ratio, "{:.2f}x"),
                cell("yes" if row.architecture in front else ""), *(make(row) for _, make in shown),
            ],
            is_marked=row.architecture == run.space.default,
        )
        for row in run.rows
    ]  # fmt: skip
    columns = ("rank", "architecture", "pooling before", "accuracy %", "supernet", "MACs (M)", "MACs", "Pareto")
    caption = f"By {run.ranked_by}. A click on a column sorts by it. The default architecture is marked."
    return [Heading("Ranking"), Table((*columns, *(column for column, _ in shown)), rows, caption, sortable=True)]


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
            blocks.append(Plot(f"{name}-{file}", f"Accuracy by pooling positions: {what}", caption, figure))
    return [Heading("Accuracy by pooling positions"), *blocks] if blocks else []


def _pareto(run: ReportedRun, name: str) -> list[Block]:
    scored = [(row, row.accuracy) for row in run.rows if row.accuracy is not None]
    if not scored:
        return []
    default = next((i for i, (row, _) in enumerate(scored) if row.architecture == run.space.default), None)
    figure = pareto_figure(
        [str(row.architecture) for row, _ in scored], [row.macs_ratio for row, _ in scored],
        [100 * accuracy for _, accuracy in scored], default=default,
        labels=("MACs relative to the default", "accuracy in the supernet (%)"),
    )  # fmt: skip
    caption = f"By {run.ranked_by}. Nothing is at once cheaper and better than what is on the front."
    return [Heading("Accuracy against cost"), Plot(f"{name}-pareto", "Pareto front", caption, figure)]


def _drawings(run: ReportedRun, name: str) -> list[Block]:
    if not run.rows:
        return []
    chosen = [(f"rank {row.rank}", row.architecture) for row in run.rows[:3]]
    default = run.default
    cheap = next((row for row in run.rows if row.accuracy is not None and row.macs_ratio <= 1), None)
    if cheap is not None and cheap.rank > 3:
        chosen.append((f"rank {cheap.rank}, best\nat ≤ 1x MACs", cheap.architecture))
    if default is not None and default.architecture not in [architecture for _, architecture in chosen]:
        chosen.append((f"default, rank {default.rank}", default.architecture))
    size = run.result.get("data", {}).get("image_size", run.space.image_size)
    caption = "Height and width of each layer's output map, in pixels; lines: poolings."
    return [
        Heading("Architectures"),
        Plot(f"{name}-drawings", "Architectures", caption, drawings(run.space, chosen, size)),
    ]


def _retrained(run: ReportedRun, name: str) -> list[Block]:
    if not run.retrained:
        return []
    columns = list(run.retrained[0])
    rows = [Row([cell(row[column] or None) for column in columns]) for row in run.retrained]
    caption = "Test accuracy of networks trained from scratch, in percent, after the last epoch (retrain.csv)."
    return [Heading("Retrained alone"), Table(columns, rows, caption, sortable=True)]


def _ranking_history(run: ReportedRun, name: str) -> list[Block]:
    """How rankings during training agree with the last one, and with the truth."""
    records = run.records.get("ranking", [])
    if not records or not run.rows:
        return []
    last = {row.architecture.index: row.accuracy for row in run.rows if row.accuracy is not None}
    truth = {row.architecture.index: row.truth for row in run.rows if row.truth is not None}
    macs = {row.architecture.index: float(row.macs) for row in run.rows}
    rankings = [
        {run.space.find(slug).index: value for slug, value in record["accuracy"].items() if value is not None}
        for record in records
    ]
    curves: dict[str, list[float | None]] = {}
    for label, target in (("with the last ranking", last), ("with the truth", truth)):
        if len(target) < 2 or (target is last and not run.finished):
            continue
        curves[label] = [agreement(ranking, target, macs)["kendall_tau_b"] for ranking in rankings]
    if not curves:
        return []
    figure = ranking_history_figure([record["epoch"] for record in records], curves)
    caption = "tau-b of the rankings made during training (score_every)."
    return [Heading("Rankings during training"), Plot(f"{name}-rankings", "Rankings during training", caption, figure)]


def _training(run: ReportedRun, name: str) -> list[Block]:
    records = run.records.get("step", [])
    if not records:
        return []
    caption = "Loss and accuracy are means since the record before, over the pairs drawn."
    return [Heading("Training"), Plot(f"{name}-training", "Training curves", caption, training_figure(records))]


def _history(run: ReportedRun) -> MixtureHistory | None:
    needed = {"assignment", "visits", "last_visit"}
    records = [record for record in run.records.get("mixture", []) if needed <= record.keys()]
    return mixture_history(records) if records else None


def _mixture(run: ReportedRun, history: MixtureHistory, name: str) -> list[Block]:
    num_supernets = history.assignments.shape[2]
    step = next(iter(run.records.get("step", [])), None)
    steps_per_epoch = step["step"] / step["epoch"] if step else None
    blocks: list[Block] = [Heading("The mixture")]
    if num_supernets > 1:
        caption = (
            "p(m|c): which supernet an architecture is trained in. Rows are architectures in the order of their "
            "pooling positions."
        )
        figure = assignment_figure(history, run.space, steps_per_epoch)
        blocks.append(Plot(f"{name}-assignment", "p(m|c) over training", caption, figure))
    caption = (
        "At each snapshot. Dotted: even load, and entropy log M. Changed: share of architectures whose likeliest "
        "supernet is another one than a snapshot before. Age: steps since a pair (c, m) was visited; one never visited "
        "is as old as the run; assigned: the pairs (c, argmax p(m|c)) alone."
    )
    if run.config.get("refresh_every"):
        caption += (
            f" The whole table a[c,m] was refreshed every {run.config['refresh_every']} steps, which is no visit."
        )
    figure = health_figure(history, steps_per_epoch)
    blocks.append(Plot(f"{name}-mixture", "Health of the mixture", caption, figure))
    return [*blocks, _snapshots(history)]


def _snapshots(history: MixtureHistory) -> Table:
    count = len(history.steps)
    rows = []
    for i in sorted({round((k + 1) * count / _SNAPSHOTS_LISTED) - 1 for k in range(_SNAPSHOTS_LISTED)} - {-1}):
        load, switches = history.load[i], history.switch_rate[i]
        rows.append(Row([
            cell(int(history.steps[i])), cell(history.entropy[i], "{:.4f}"), cell(history.kl[i], "{:.1e}"),
            cell(100 * load.min(), "{:.1f}"), cell(100 * load.max(), "{:.1f}"),
            cell(None if i == 0 else 100 * switches, "{:.1f}"), cell(history.age_median[i], "{:.0f}"),
            cell(history.age_max[i], "{:.0f}"), cell(history.age_assigned[i], "{:.0f}"),
            cell(100 * history.never_visited[i], "{:.1f}"),
        ]))  # fmt: skip
    columns = (
        "step", "entropy (nats)", "KL (nats)", "least load %", "most load %", "changed %", "age, median", "age, oldest",
        "age, assigned", "never visited %",
    )  # fmt: skip
    return Table(columns, rows)


def _percent(share: float | None) -> Cell:
    return cell(None if share is None else 100 * share, "{:.2f}")


def _positions(row: ReportedRow) -> str:
    return ", ".join(map(str, row.architecture.pool_positions))
