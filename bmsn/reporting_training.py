"""The parts of a report about how a run went: rankings on the way, training, the mixture."""

from __future__ import annotations

from collections.abc import Sequence

from bmsn.correlation import agreement
from bmsn.figures import PALETTE
from bmsn.figures_training import health_figure, ranking_history_figure, snapshots_figure, training_figure
from bmsn.reporting_page import Block, Heading, Plot, Row, Table, cell
from bmsn.reporting_run import MAX_NAMED, ReportedRun
from bmsn.reporting_statistics import MixtureHistory, mixture_history
from bmsn.reporting_unfinished import ranking_values

_SNAPSHOTS_LISTED = 8


def training_blocks(run: ReportedRun, name: str) -> list[Block]:
    """The blocks of a run, those without data left out; figures are called `name`-..."""
    blocks: list[Block] = []
    for part in (_ranking_history, _training, _mixture):
        blocks += part(run, name)
    return blocks


def _ranking_history(run: ReportedRun, name: str) -> list[Block]:
    """How rankings during training agree with the last one, and with the truth."""
    records = run.records.get("ranking", [])
    if not records or not run.rows:
        return []
    last = {row.architecture.index: row.value for row in run.rows if row.value is not None}
    truth = {row.architecture.index: row.truth for row in run.rows if row.truth is not None}
    macs = {row.architecture.index: float(row.macs) for row in run.rows}
    rankings = [
        {run.space.find(slug).index: value for slug, value in ranking_values(record).items()} for record in records
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


def _mixture(run: ReportedRun, name: str) -> list[Block]:
    """p(m|c) and the health of the mixture."""
    history = _history(run)
    if history is None:
        return []
    num_supernets = history.assignments.shape[2]
    blocks: list[Block] = [Heading("The mixture")]
    if num_supernets > 1:
        caption = (
            "p(m|c): which supernet an architecture is trained in. Rows are architectures in the order of their "
            "pooling positions."
        )
        names = [str(a) for a in run.searched] if len(run.searched) <= MAX_NAMED else None
        figure = snapshots_figure(
            history.assignments, _titles(run, history.steps.tolist()),
            row_names=names, row_label="architecture",
            column_names=[str(m) for m in range(num_supernets)] if num_supernets <= len(PALETTE) else None,
            column_label="supernet m", label="p(m|c)",
        )  # fmt: skip
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
    figure = health_figure(history, run.steps_per_epoch)
    blocks.append(Plot(f"{name}-mixture", "Health of the mixture", caption, figure))
    return [*blocks, _snapshots(history)]


def _titles(run: ReportedRun, steps: Sequence[int]) -> list[str]:
    per_epoch = run.steps_per_epoch
    return [f"step {step}" if per_epoch is None else f"epoch {step / per_epoch:.3g}" for step in steps]


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
