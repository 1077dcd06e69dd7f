"""Accuracies of networks trained alone, one row an architecture: from the results of tasks to a CSV file."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from bmsn.checkpoint import write_atomically
from bmsn.cost import pareto_front
from bmsn.data import ImageDataset
from bmsn.paths import Candidate, as_path, path_macs
from bmsn.scheduler import Outcome
from bmsn.space import SearchSpace
from bmsn.standalone import TrainingSettings
from bmsn.tasks import Task, TaskResult

# Behind them comes what a table has of its own, and last `pareto`.
CSV_COLUMNS = (
    "stage_depths", "accuracy_mean", "accuracy_std", "n", "macs", "macs_ratio", "parameters", "seconds",
)  # fmt: skip


_C = TypeVar("_C", bound=Candidate)


@dataclass(frozen=True, kw_only=True)
class AccuracyRow(Generic[_C]):
    """One architecture.

    Attributes:
        architecture: or a path of resolutions, which may lie outside the space.
        accuracy_mean: test accuracy in percent over the networks trained; None: none was.
        accuracy_std: standard deviation of the sample; None with fewer than 2 networks.
        n: networks trained.
        macs: multiply-accumulates for one image; macs_ratio: relative to the default architecture.
        parameters: of a network, affine BatchNorm included.
        seconds: mean time that a network took to train and test.
        pareto: whether no other row of the table is as cheap in MACs and more accurate.
    """

    architecture: _C
    accuracy_mean: float | None
    accuracy_std: float | None
    n: int
    macs: int
    macs_ratio: float
    parameters: int
    seconds: float | None
    pareto: bool

    @property
    def macs_text(self) -> str:
        """`0.87x*`: relative to the default architecture, with a star on the Pareto front."""
        return f"{self.macs_ratio:.2f}x{'*' if self.pareto else ' '}"

    @property
    def accuracy_text(self) -> str:
        """`91.55 ± 0.12`; without a spread where there is one network, "-" where there is none."""
        if self.accuracy_mean is None:
            return "-"
        return f"{self.accuracy_mean:.2f}" + ("" if self.accuracy_std is None else f" ± {self.accuracy_std:.2f}")

    def as_dict(self) -> dict[str, str | int]:
        """Cells of the CSV file by column."""
        return {
            "stage_depths": self.architecture.slug,
            "accuracy_mean": _cell(self.accuracy_mean, 3),
            "accuracy_std": _cell(self.accuracy_std, 3),
            "n": self.n,
            "macs": self.macs,
            "macs_ratio": _cell(self.macs_ratio, 3),
            "parameters": self.parameters,
            "seconds": _cell(self.seconds, 1),
            "pareto": self.pareto,
        }


def accuracy_rows(
    space: SearchSpace,
    architectures: Sequence[_C],
    data: ImageDataset,
    tasks: Sequence[Task],
    outcome: Outcome[TaskResult],
) -> list[AccuracyRow[_C]]:
    """One row for each of `architectures`, in their order, over the results of its tasks; there may be others."""
    classes, channels = data.num_classes, data.in_channels
    space = space.resized(data.image_size)  # MACs are those of its images
    default = space.macs(space.default, num_classes=classes, in_channels=channels)
    found: defaultdict[str, list[TaskResult]] = defaultdict(list)
    for task in tasks:
        if task.name in outcome.results:
            found[task.architecture].append(outcome.results[task.name])
    rows = []
    for architecture in architectures:
        results = found[architecture.slug]
        macs = path_macs(space, as_path(space, architecture), num_classes=classes, in_channels=channels)
        accuracies = [result.accuracy for result in results]
        rows.append(
            AccuracyRow(
                architecture=architecture,
                accuracy_mean=statistics.mean(accuracies) if accuracies else None,
                accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                n=len(accuracies),
                macs=macs,
                macs_ratio=macs / default,
                parameters=space.num_parameters(num_classes=classes, in_channels=channels),
                seconds=statistics.mean(result.seconds for result in results) if results else None,
                pareto=False,
            )
        )
    front = pareto_front([row.accuracy_mean for row in rows], [row.macs for row in rows])
    return [replace(row, pareto=on_it) for row, on_it in zip(rows, front, strict=True)]


def pareto_lines(rows: Sequence[AccuracyRow[_C]]) -> list[str]:
    """What `*` means, for the end of a printed table; nothing where there is none."""
    front = sum(row.pareto for row in rows)
    return [f"*: Pareto front, the {front} that no other is as cheap and more accurate than."] if front else []


def describe(
    space: SearchSpace, seeds: Sequence[int], training: TrainingSettings, results: Mapping[str, TaskResult]
) -> str:
    """How the networks of a table downsample and were trained, for its first line."""
    schedule = f"cosine to {training.min_lr:g}"
    if training.milestones:
        schedule = f"times {training.factor:g} after {', '.join(f'{m:g}' for m in training.milestones)} of the training"
    versions = " and ".join(sorted({result.torch for result in results.values()})) or "unknown"
    return (
        f"pool {space.pool}, seeds {seeds[0]} to {seeds[-1]}, {training.epochs} epochs, batch {training.batch_size}, "
        f"lr {training.lr:g} {schedule}, momentum {training.momentum:g}, weight decay {training.weight_decay:g}, "
        f"torch {versions}"
    )


def write_csv(path: Path, title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str | int]]) -> None:
    """A table under a line of comment, whole or not at all."""
    text = io.StringIO()
    text.write(f"# {title}\n")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
