"""`ReportedRun`: what a report shows of one run folder, finished or not, of this schema or an older one."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bmsn.correlation import agreement, load_truth, ranking_agreement
from bmsn.cost import within_macs
from bmsn.errors import InputError
from bmsn.reporting_unfinished import Standing, unfinished_standing
from bmsn.result import SCHEMA_VERSION
from bmsn.runfolder import read_metrics
from bmsn.space import Architecture, SearchSpace

MAX_NAMED = 40  # architectures that still have their name beside a row of a figure
_DATA_ASSUMED = {"num_classes": 10, "in_channels": 3}  # of runs that have not written what their images are


@dataclass(frozen=True, kw_only=True)
class ReportedRow:
    """One architecture of a ranking, best first.

    Attributes:
        accuracy: in [0, 1]; None: not scored.
        rank_value: what the rank is by where that is made of several accuracies; else None.
        macs_ratio: multiply-accumulates relative to the space's default architecture.
        truth: stand-alone accuracy in percent; None: unknown.
        other: the remaining cells of result.json, by name.
    """

    rank: int
    architecture: Architecture
    accuracy: float | None
    rank_value: float | None
    supernet: int | None
    macs: int
    macs_ratio: float
    truth: float | None
    other: dict[str, Any]

    @property
    def value(self) -> float | None:
        """What a ranking by accuracies is by, as `bmsn.result.RankedArchitecture.value`."""
        return self.accuracy if self.rank_value is None else self.rank_value


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """One run.

    Attributes:
        label: name of the folder, made unique among the runs of a report.
        finished: whether there is a result; else `rows` come from the metrics (`bmsn.reporting_unfinished`), if any.
        ranked_by: what the ranking is by, in words.
        estimate: what `ema_accuracy` of the rows is, in words.
        resolution_path: resolution of each layer (0: full, 1: half, ...), of a method that is not bound to the space.
        searched: the architectures that the method numbers in its records: all, or those within `max_macs`.
        truth: stand-alone accuracy in percent by architecture index; empty without a truth.
        records: of metrics.jsonl, by kind, in the order of their steps.
        data: what is known of the images: name, image_size, num_classes, in_channels.
        result: the content of result.json, empty while it is not there.
        agreement: figures of the ranking ("ranking"), of accuracies where it is not by them ("accuracy"), of the
            estimates ("ema") and of MACs ("macs") against the truth; empty without a truth.
        notes: what the reader must know.
        retrained: rows of retrain.csv.
    """

    path: Path
    label: str
    finished: bool
    space: SearchSpace
    config: dict[str, Any]
    ranked_by: str
    estimate: str
    resolution_path: tuple[int, ...] | None
    rows: tuple[ReportedRow, ...]
    searched: tuple[Architecture, ...]
    truth: dict[int, float]
    records: dict[str, list[dict[str, Any]]]
    data: dict[str, Any]
    result: dict[str, Any]
    agreement: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    retrained: tuple[dict[str, str], ...]

    @property
    def data_name(self) -> str:
        """As the data set calls itself; of a run without a result, the end of what names it."""
        return str(self.data.get("name", str(self.config.get("data")).rsplit("/", 1)[-1]))

    @property
    def whole(self) -> tuple[ReportedRow, ...]:
        """The rows that were scored on all images: a race leaves some on fewer, not to be compared with these."""
        return _whole(self.rows)

    @property
    def image_size(self) -> int:
        """Pixels on a side."""
        return self.space.image_size

    @property
    def steps_per_epoch(self) -> float | None:
        """None where no step is recorded."""
        step = next(iter(self.records.get("step", [])), None)
        return step["step"] / step["epoch"] if step else None

    @property
    def default(self) -> ReportedRow | None:
        """The space's default architecture; None where nothing is ranked yet."""
        return next((row for row in self.rows if row.architecture == self.space.default), None)


def read_runs(paths: Sequence[Path], truth: str | None = None) -> list[ReportedRun]:
    """The runs in these folders; `truth` replaces the one that they name.

    Raises:
        InputError: a folder without a run, one in which nothing has been recorded yet, a damaged file, a newer schema,
            or a `truth` that is not of a run's space.
    """
    labels: list[str] = []
    for path in paths:
        name = path.resolve().name
        labels.append(name if name not in labels else f"{name}-{len(labels) + 1}")
    return [_read_run(path, label, truth) for path, label in zip(paths, labels, strict=True)]


def _read_run(path: Path, label: str, truth_source: str | None) -> ReportedRun:
    config, result = _read_config(path), _read_result(path / "result.json")
    metrics = path / "metrics.jsonl"
    records: dict[str, list[dict[str, Any]]] = {}
    for record in read_metrics(metrics) if metrics.is_file() else []:
        records.setdefault(str(record.get("kind")), []).append(record)
    described = records.pop("data", [{}])[-1]
    if not result and not records:
        raise InputError(f"{path}: the run is unfinished and has recorded nothing yet")
    try:
        config = result.get("config", config)
        space = SearchSpace.named(config["space"], pool=config.get("pool"))
        data = _DATA_ASSUMED | {"image_size": space.image_size} | described | result.get("data", {})
        space = space.resized(data["image_size"])
        macs = [space.macs(a, num_classes=data["num_classes"], in_channels=data["in_channels"]) for a in space]
        searched = _searched(space, config, macs, result)
        standing = _standing(space, searched, config, result, records)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a run of bmsn.search: {error!r}") from error
    notes = [str(note) for note in result.get("notes", ())]
    if not result:
        done = max(record["step"] for kind in records.values() for record in kind)
        notes.append(
            f"This run is unfinished: it has recorded {done} steps. Architectures are ranked by "
            f"{standing.ranked_by}; MACs are those of images of {space.image_size} pixels in "
            f"{data['num_classes']} classes."
        )
    truth, problem = _truth(config, space, truth_source)
    notes += [problem] if problem else []
    rows = [
        ReportedRow(
            rank=place,
            architecture=architecture,
            accuracy=cells.pop("accuracy", None),
            rank_value=cells.pop("rank_value", None),
            supernet=cells.pop("supernet", None),
            macs=cells.pop("macs", macs[architecture.index]),
            macs_ratio=cells.pop("macs_ratio", macs[architecture.index] / macs[space.default.index]),
            truth=truth.get(architecture.index),
            other=cells,
        )
        for place, (architecture, cells) in enumerate(standing.rows, start=1)
    ]
    return ReportedRun(
        path=path,
        label=label,
        finished=bool(result),
        space=space,
        config=config,
        ranked_by=standing.ranked_by,
        estimate=standing.estimate,
        resolution_path=_resolution_path(result.get("method", {}).get("resolution_path"), space),
        rows=tuple(rows),
        searched=searched,
        truth=truth,
        records=records,
        data=data,
        result=result,
        agreement=_agreement(rows, truth, str(config.get("method", "mixture")), standing.by_accuracy)
        if truth and rows
        else {},
        notes=tuple(notes),
        retrained=_read_retrained(path / "retrain.csv"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((path / "config.yaml").read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: holds no run of bmsn.search (it has no config.yaml)") from error
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path / 'config.yaml'}: cannot be read: {error}") from error
    if not isinstance(config, dict) or "space" not in config:
        raise InputError(f"{path}: holds no run of bmsn.search (its config.yaml names no space)")
    return config


def _read_result(path: Path) -> dict[str, Any]:
    """result.json as it stands, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        version = content["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result of bmsn.search: {error!r}") from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version must be at most {SCHEMA_VERSION}, which this version of bmsn writes; got {version}"
        )
    return content


def _read_retrained(path: Path) -> tuple[dict[str, str], ...]:
    if not path.is_file():
        return ()
    return tuple(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def _searched(
    space: SearchSpace, config: dict[str, Any], macs: Sequence[int], result: dict[str, Any]
) -> tuple[Architecture, ...]:
    """In the order of the space."""
    if result:
        return tuple(sorted((space.find(row["architecture"]) for row in result["ranking"]), key=lambda a: a.index))
    limit = config.get("max_macs")
    return tuple(space if limit is None else within_macs(space, macs, limit))


def _standing(
    space: SearchSpace, searched: Sequence[Architecture], config: dict[str, Any], result: dict[str, Any],
    records: dict[str, list[dict[str, Any]]],
) -> Standing:  # fmt: skip
    if not result:
        return unfinished_standing(space, searched, config, records)
    rows, method = [dict(row) for row in result["ranking"]], result.get("method", {})
    ranked_by = str(method.get("ranked_by", "validation accuracy"))
    by_values = any(row.get("rank_value") is not None for row in rows)
    return Standing(
        ranked_by=ranked_by,
        rows=[(space.find(row.pop("architecture")), row) for row in rows],
        by_accuracy=ranked_by.startswith("validation accuracy") or by_values,
        estimate=str(method.get("estimate", "a[c,m]")),
    )


def _truth(config: dict[str, Any], space: SearchSpace, source: str | None) -> tuple[dict[int, float], str]:
    """Stand-alone accuracies by index, and a note where the run names some that are not to be had here."""
    if source is not None:
        return load_truth(source, space), ""
    named = config.get("truth")
    if not named:
        return {}, ""
    try:
        return load_truth(named, space), ""
    except InputError as error:
        return {}, f"The truth that the run was compared with cannot be read here, so it is not shown: {error}"


def _whole(rows: Sequence[ReportedRow]) -> tuple[ReportedRow, ...]:
    most = max((row.other.get("images_seen", 0) for row in rows), default=0)
    return tuple(row for row in rows if row.accuracy is not None and row.other.get("images_seen", most) == most)


def _agreement(
    rows: Sequence[ReportedRow], truth: dict[int, float], method: str, by_accuracy: bool
) -> dict[str, dict[str, Any]]:
    """As the search computes it."""
    macs = {row.architecture.index: float(row.macs) for row in rows}
    accuracy = {row.architecture.index: row.accuracy or 0.0 for row in _whole(rows)}
    estimates = {row.architecture.index: row.other.get("ema_accuracy") for row in rows}
    ema = {index: estimate for index, estimate in estimates.items() if estimate is not None}
    figures = {"ranking": ranking_agreement(rows, _whole(rows), truth, method=method, by_accuracy=by_accuracy)}
    if accuracy and (not by_accuracy or any(row.value != row.accuracy for row in _whole(rows))):
        figures["accuracy"] = agreement(accuracy, truth, macs)
    if ema:
        figures["ema"] = agreement(ema, truth, macs)
    return figures | {"macs": agreement(macs, truth, macs)}


def _resolution_path(text: object, space: SearchSpace) -> tuple[int, ...] | None:
    """`0-0-1-2-1` as numbers, one a layer; None where there is none."""
    if not isinstance(text, str) or not re.fullmatch(r"\d+(-\d+)*", text):
        return None
    path = tuple(map(int, text.split("-")))
    return path if len(path) == space.num_layers else None
