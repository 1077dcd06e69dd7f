"""The part of a report about what its method alone found: trees, probabilities, resolutions, supernets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from bmsn.figures_methods import course_figure, layers_figure, levels_figure, path_figure, tree_figure
from bmsn.reporting_page import Block, Heading, Plot, Row, Table, Text, cell, percent
from bmsn.reporting_records import (
    Course,
    ResolutionCourse,
    accuracy_course,
    busiest,
    probability_course,
    share_course,
    tree_course,
    tree_nodes,
)
from bmsn.reporting_run import MAX_NAMED, ReportedRow, ReportedRun

_MAX_ROWS = 36  # architectures in a map over training
# Findings that are told in words or figures, and not listed again.
_TOLD = frozenset({
    "ranked_by", "estimate", "resolution_path", "resolution_path_architecture", "resolution_path_macs",
    "resolution_path_macs_ratio", "resolution_path_accuracy",
})  # fmt: skip


def method_blocks(run: ReportedRun, name: str) -> list[Block]:
    """The blocks of a run, those without data left out; figures are called `name`-..."""
    blocks: list[Block] = []
    for part in (_path, _resolutions, _tree, _probabilities, _supernets, _listed):
        blocks += part(run, name)
    return [Heading("What the method found"), *blocks] if blocks else []


def _sizes(run: ReportedRun) -> list[int]:
    """Height and width of the map at each resolution, in pixels."""
    full = run.space.map_sizes(run.space.default, run.image_size)[0]
    return [full // 2**r for r in range(run.space.num_pools + 1)]


def _path(run: ReportedRun, name: str) -> list[Block]:
    path = run.resolution_path
    if path is None:
        return []
    found = run.result.get("method", {})
    inside = found.get("resolution_path_architecture")
    words = [f"Path of resolutions: {'-'.join(map(str, path))}"]
    words.append(f"architecture [{inside.replace('-', ',')}]" if inside else "no architecture of the space")
    if "resolution_path_macs_ratio" in found:
        words.append(f"{found['resolution_path_macs_ratio']:.2f}x the MACs of the default")
    if "resolution_path_accuracy" in found:
        words.append(
            f"{100 * found['resolution_path_accuracy']:.2f} % of the validation half, by which it was chosen, so that "
            "is optimistic"
        )
    shares = found.get("shares")
    caption = "The resolution at which each layer works. " + (
        "In the circles: size of the map in pixels."
        if shares is None
        else "In the circles: share of the resolution in percent."
    )
    figure = path_figure(path, _sizes(run), None if shares is None else np.array(shares, np.float64))
    return [Text("; ".join(words) + "."), Plot(f"{name}-path", "Path through the resolutions", caption, figure)]


def _resolutions(run: ReportedRun, name: str) -> list[Block]:
    """Shares or accuracies of each layer's resolutions over training."""
    alpha = [record for record in run.records.get("alpha", []) if "shares" in record]
    visited = run.records.get("resolutions", [])
    if alpha:
        caption = "Share of each resolution in each layer over training; the largest ones make the path."
        return [_layers(run, f"{name}-shares", "Shares of the resolutions", caption, share_course(alpha), "share (%)")]
    if visited:
        caption = (
            "Moving average of the validation accuracies of the paths that pass a layer at a resolution, over training."
        )
        label = "accuracy on validation batches (%)"
        course = accuracy_course(visited)
        return [_layers(run, f"{name}-resolutions", "Accuracy by layer and resolution", caption, course, label)]
    return []


def _layers(run: ReportedRun, name: str, title: str, caption: str, course: ResolutionCourse, label: str) -> Plot:
    x, x_label = _time(run, course.steps)
    figure = layers_figure(x, course.values, _sizes(run), x_label=x_label, y_label=label)
    return Plot(name, title, f"{caption} Layer 0 always works at {_sizes(run)[0]} pixels.", figure)


def _tree(run: ReportedRun, name: str) -> list[Block]:
    records = run.records.get("tree", [])
    nodes = tree_nodes(run.space.restricted(run.searched), records[-1]) if records else []
    if not nodes:  # nor where no step so far had a finite loss
        return []
    leaves = [a for a, visits in zip(run.searched, records[-1]["visits"][-1], strict=True) if visits]
    caption = (
        "The tree at the end. A box is as wide as its share of the visits, with their number where there is room; its "
        "children are below it, on the left the one that pools. Bold frames: the path of the most visited children."
    )
    tree = tree_figure(nodes, [str(a) for a in leaves], run.space.num_layers)
    course = _course(
        run, f"{name}-visits", "Visits of the leaves", tree_course(records),
        ("share of the visits (%)", "mean reward (accuracy, %)"),
        "Left: share of the visits since the snapshot before. Right: mean reward so far; grey: not visited yet.",
    )  # fmt: skip
    return [Plot(f"{name}-tree", "Tree of decisions", caption, tree), course]


def _probabilities(run: ReportedRun, name: str) -> list[Block]:
    records = run.records.get("boltzmann", [])
    if not records:
        return []
    caption = (
        "Above: inverse temperature k, and entropy of p. Left: probability that an architecture is drawn. Right: the "
        "moving average of its validation accuracies, by which it is drawn; grey: not visited yet."
    )
    return [
        _course(run, f"{name}-probability", "Probabilities over training", probability_course(records),
                ("p(architecture) (%)", "moving average of accuracies (%)"), caption,
                {"inverse_temperature": "inverse temperature k", "entropy": "entropy of p (nats)"})
    ]  # fmt: skip


def _course(
    run: ReportedRun, name: str, title: str, course: Course, labels: tuple[str, str], caption: str,
    above: Mapping[str, str] = MappingProxyType({}),
) -> Plot:  # fmt: skip
    """`above`: what of the `step` records is drawn above, with its name."""
    x, x_label = _time(run, course.steps)
    steps = run.records.get("step", [])
    curves = [(label, [r["epoch"] for r in steps], [r[key] for r in steps]) for key, label in above.items() if steps]
    shown, course = busiest(course, _MAX_ROWS)
    names = [str(run.searched[column]) for column in shown]
    if len(shown) < len(run.searched):
        names.append("others")
        caption += f" The {_MAX_ROWS} architectures that had most of the search, and all others together."
    figure = course_figure(
        x, [(labels[0], 100 * course.weight), (labels[1], 100 * course.value)], names, x_label=x_label, curves=curves
    )
    return Plot(name, title, caption, figure)


def _time(run: ReportedRun, steps: NDArray[np.int64]) -> tuple[NDArray[np.float64], str]:
    """Where snapshots stand in time, and in which unit."""
    per_epoch = run.steps_per_epoch
    return steps / (per_epoch or 1), "step" if per_epoch is None else "epoch"


def _supernets(run: ReportedRun, name: str) -> list[Block]:
    """Which supernet scores which architectures, and how well."""
    groups: dict[int, list[tuple[ReportedRow, float]]] = {}
    for row in run.whole:
        if row.supernet is not None and row.accuracy is not None:
            groups.setdefault(row.supernet, []).append((row, row.accuracy))
    if len(groups) < 2:
        return []
    splits = run.config.get("method") == "few-shot"
    ordered = [groups[m] for m in sorted(groups)]
    names = [str(m) for m in sorted(groups)]
    if splits:  # a supernet is all that first pools there
        names = [str(members[0][0].architecture.pool_positions[0]) for members in ordered]
    what = "first pooling before layer" if splits else "supernet"
    levels = levels_figure(
        [(label, [(str(row.architecture), 100 * accuracy) for row, accuracy in members])
         for label, members in zip(names, ordered, strict=True)],
        x_label=what, y_label="accuracy in the supernet (%)",
    )  # fmt: skip
    caption = (
        "Accuracies in each supernet and their mean. Supernets that differ in level rank their architectures by it, "
        "whatever these are worth alone."
    )
    return [
        Plot(f"{name}-supernets", "Levels of the supernets", caption, levels),
        _supernet_table(run, dict(zip(names, ordered, strict=True)), what),
    ]


def _supernet_table(run: ReportedRun, groups: Mapping[str, Sequence[tuple[ReportedRow, float]]], what: str) -> Table:
    """One row a supernet; `what` says what their names are."""
    records = run.records.get("few-shot", [])
    visits = dict(zip(run.searched, records[-1]["visits"], strict=True)) if records else {}
    names_fit = len(run.searched) <= MAX_NAMED
    columns = [what, "n", "mean %", "best %"]
    columns += ["mean alone %"] if any(row.truth is not None for row in run.rows) else []
    columns += ["visits"] if visits else []
    columns += ["architectures"] if names_fit else []
    rows = []
    for name, members in groups.items():
        accuracies = [accuracy for _, accuracy in members]
        alone = [row.truth for row, _ in members if row.truth is not None]
        cells = {
            what: cell(name), "n": cell(len(members)), "mean %": percent(fmean(accuracies)),
            "best %": percent(max(accuracies)), "mean alone %": cell(fmean(alone) if alone else None, "{:.2f}"),
            "visits": cell(sum(visits.get(row.architecture, 0) for row, _ in members)),
            "architectures": cell(" ".join(str(row.architecture) for row, _ in members)),
        }  # fmt: skip
        rows.append(Row([cells[column] for column in columns]))
    return Table(columns, rows, "Architectures from best to worst." if names_fit else "", sortable=True)


def _listed(run: ReportedRun, name: str) -> list[Block]:
    """What else there is: numbers and texts in one table, each table of its own (a list of rows, numbers by name) by
    itself; what is neither is left out.
    """
    found = {key: value for key, value in run.result.get("method", {}).items() if key not in _TOLD}
    plain = [Row([cell(key), cell(value)]) for key, value in found.items() if isinstance(value, str | int | float)]
    tables: list[Block] = [Table(("found", "value"), plain)] if plain else []
    for key, value in found.items():
        if isinstance(value, dict) and value:
            rows = [Row([cell(str(k)), cell(str(v))]) for k, v in value.items()]
            tables.append(Table((key, "value"), rows, sortable=True))
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            columns = list(value[0])
            rows = [Row([cell(row.get(column)) for column in columns]) for row in value]
            tables.append(Table(columns, rows, key))
    return tables
