"""The part of a report about a comparison of methods: what `python -m bmsn.compare` left in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bmsn.errors import InputError
from bmsn.figures_comparison import comparison_figure
from bmsn.reporting_page import Block, Cell, Code, Heading, Plot, Row, Table, Text, cell
from bmsn.reporting_reproduction import value_table

_FILE, _SCHEMA = "comparison.json", 1
_HEAD = ("budget", "method", "seeds")
_PICKED = (
    ("accuracy", "accuracy %", "{:z.2f}"), ("regret_top1", "regret", "{:z.2f}"), ("regret_top3", "top 3", "{:.2f}"),
    ("regret_top5", "top 5", "{:.2f}"), ("macs_ratio", "MACs", "{:.2f}x"),
    ("gain_within_macs", "gain at 1x", "{:z.2f}"),
)  # fmt: skip
_RANKED = (
    ("kendall_tau_b", "tau-b", "{:z.3f}"),
    ("spearman", "Spearman", "{:z.3f}"),
    ("partial_kendall", "partial", "{:z.3f}"),
)
_PAIRED = (_PICKED[0], _PICKED[1], _PICKED[5], *_RANKED)
_BRACKETS = {"bootstrap": "[{}, {}]", "student": "({}, {})"}
_TERA = 1e12
_COSTS = (
    ("training_images", "training images", 1, "{:.0f}"), ("training_macs", "training TMACs", _TERA, "{:.4g}"),
    ("validation_images", "validation images", 1, "{:.0f}"), ("validation_macs", "validation TMACs", _TERA, "{:.4g}"),
)  # fmt: skip
_TO_REPRODUCE = ("space", "pool", "data", "data_fingerprint", "truth", "seeds", "budgets", "settings", "methods")


@dataclass(frozen=True, kw_only=True)
class ReportedComparison:
    """A comparison: its folder, and comparison.json as it stands."""

    path: Path
    label: str
    content: dict[str, Any]

    @property
    def space_name(self) -> str:
        """In words; older comparisons have but what `SearchSpace.named` takes."""
        return str(self.content.get("space_name", self.content["space"]))


def is_comparison(path: Path) -> bool:
    """Whether a folder holds a comparison, finished or not."""
    return (path / _FILE).is_file() or _is_unfinished(path)


def _is_unfinished(path: Path) -> bool:
    """Until all searches are done it is their folder alone, empty or with names by `bmsn.comparison.SearchTask`."""
    runs = path / "runs"
    if (path / "config.yaml").exists() or not runs.is_dir():
        return False
    return not any(runs.iterdir()) or any(runs.glob("*epochs-seed*-*"))


def read_comparison(path: Path) -> ReportedComparison:
    """The comparison in a folder. Raises InputError for an unfinished one, a damaged file or one of a newer schema."""
    file = path / _FILE
    if not file.is_file():
        raise InputError(
            f"{path}: holds an unfinished comparison: run the same bmsn.compare command again until it is finished, or "
            f"report single searches of {path / 'runs'}"
        )
    try:
        content = json.loads(file.read_text())
        version = content["schema_version"]
        if not isinstance(version, int) or version > _SCHEMA:
            raise InputError(f"{file}: schema_version must be at most {_SCHEMA}; got {version}")
        for row in content["methods_over_seeds"]:
            for name, *_ in (*_PICKED, *_RANKED):
                float(row["figures"][name]["mean"] or 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a result of bmsn.compare: {error!r}") from error
    return ReportedComparison(path=path, label=path.resolve().name, content=content)


def comparison_blocks(comparison: ReportedComparison, name: str) -> list[Block]:
    """The blocks of a comparison, those without data left out; figures are called `name`-..."""
    content = comparison.content
    rows = content["methods_over_seeds"]
    missing = ", ".join(content.get("truth_missing", ()))
    blocks: list[Block] = [
        Text(
            f"{comparison.space_name} on {content['data']} against the truth {content['truth']}, "
            f"seeds {', '.join(map(str, content['seeds']))}. Figures are means over seeds, with a 95 % bootstrap "
            "interval of the mean, which is too narrow over few seeds; the differences seed by seed have Student's "
            "beside it, comparison.json has it for all."
            + (f" Without a row in the truth: {missing}." if missing else "")
        )
    ]
    if not rows:
        return [*blocks, Text("No search has finished yet.", is_note=True)]
    blocks += [
        Plot(f"{name}-comparison", "Methods", "Means over seeds; bars: 95 % intervals.", comparison_figure(rows)),
        Heading("What they pick"),
        _picks(content),
        Heading("How they rank, and what they cost"),
        _rankings(content),
    ]
    if content.get("paired"):
        blocks += [Heading("Differences, seed by seed"), _paired(content["paired"])]
    undefined = {
        f"{row['method']}, {label}: {row['figures'][key]['undefined']}"
        for row in rows
        for key, label, _ in (*_PICKED, *_RANKED)
        if row["figures"][key].get("undefined")
    }
    blocks += [Text(f"Not defined: {reason}") for reason in sorted(undefined)]
    about = {key: content[key] for key in _TO_REPRODUCE if key in content}
    text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=math.inf)  # a space of one's own is long
    command: list[Block] = (
        [
            Text("With an --out of its own, and --workers that leave each search the threads below:"),
            Code(content["command"]),
        ]
        if "command" in content
        else []
    )
    shown = {name: ", ".join(map(str, values)) for name, values in content.get("environment", {}).items()}
    machine: list[Block] = [value_table("Environment", shown)] if shown else []
    return [*blocks, Heading("To reproduce"), *command, *machine, Code(text.rstrip())]


def _picks(content: Mapping[str, Any]) -> Table:
    rows = []
    for row in content["methods_over_seeds"]:
        picks = ", ".join(f"{pick} ({count})" for pick, count in row["picks"].items())
        paths = row.get("accuracy_of_paths") or dict.fromkeys(row["paths"])  # older ones have no accuracies
        found = [f"path {path}" + ("" if alone is None else f" {alone:.2f} %") for path, alone in paths.items()]
        picked = cell("\n".join([picks, *found]))
        rows.append(Row([*_head(row), picked, *_figures(row["figures"], _PICKED)]))
    caption = (
        "path: what was found, resolutions by layer, with its accuracy trained alone where the truth has it; "
        "accuracy: of the pick, trained alone; regret: of the pick and of the best among the first 3 and 5, in points; "
        "gain at 1x: over the default at no more MACs than it has."
    )
    return Table((*_HEAD, "picks", *(label for _, label, _ in _PICKED)), rows, caption, sortable=True)


def _rankings(content: Mapping[str, Any]) -> Table:
    seconds: dict[tuple[int, str], list[float]] = {}
    for timing in content.get("timings", ()):
        seconds.setdefault((timing["budget"], timing["method"]), []).append(timing["train_seconds"])
    rows = []
    for row in content["methods_over_seeds"]:
        took = seconds.get((row["budget"], row["method"]))
        rows.append(Row([
            *_head(row), *_figures(row["figures"], _RANKED),
            *(_cost(row["costs"].get(key), unit, shown) for key, _, unit, shown in _COSTS),
            cell(sum(took) / len(took) if took else None, "{:.0f}"),
        ]))  # fmt: skip
    columns = (*_HEAD, *(label for _, label, _ in _RANKED), *(label for _, label, *_ in _COSTS), "training s")
    caption = (
        "partial: tau-b with MACs held fixed. The budget counts epochs of the training half; what validation costs "
        "stands beside it. TMACs: 10^12 multiply-accumulates; a training step counts three forward passes."
    )
    return Table(columns, rows, caption, sortable=True)


def _paired(pairs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        Row([
            cell(pair["budget"]), cell(pair["method"]), cell(pair["baseline"]),
            *_figures(pair["figures"], _PAIRED, ("bootstrap", "student")),
        ])
        for pair in pairs
    ]  # fmt: skip
    columns = ("budget", "method", "less", *(label for _, label, _ in _PAIRED))
    caption = (
        "Each method less a baseline with the same seed. In square brackets the bootstrap's interval, in round ones "
        "Student's, which holds the mean of a normal law 95 times in a hundred, however few the seeds."
    )
    return Table(columns, rows, caption, sortable=True)


def _head(row: Mapping[str, Any]) -> list[Cell]:
    return [cell(row["budget"]), cell(row["method"]), cell(row["seeds"])]


def _cost(value: float | None, unit: float, shown: str) -> Cell:
    return cell(None if value is None else value / unit, shown)


def _figures(
    figures: Mapping[str, Any], chosen: Sequence[tuple[str, str, str]], intervals: Sequence[str] = ("bootstrap",)
) -> list[Cell]:
    """A cell for each figure: the mean, and below it these intervals, a line each; it sorts by the mean."""
    cells = []
    for key, _, shown in chosen:
        figure = figures[key]
        mean = cell(figure["mean"], shown)
        lines = [_BRACKETS[kind].format(*map(shown.format, figure[kind])) for kind in intervals if figure.get(kind)]
        cells.append(Cell("\n".join([mean.text, *lines]), mean.key))
    return cells
