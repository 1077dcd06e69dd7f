"""Figures of searches against the truth, and what they come to over seeds. Numbers alone: no files, no training.

Sources: Javan et al. 2023, table 2, for what is compared; `bmsn.correlation` for the rank figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmsn import methods
from bmsn.correlation import ranking_agreement
from bmsn.intervals import bootstrap_interval, student_interval
from bmsn.paths import find_candidate
from bmsn.result import SearchResult
from bmsn.space import Architecture, SearchSpace

# The figures of a run that are summed up over seeds, in the order of the tables.
FIGURES = (
    "accuracy", "regret_top1", "regret_top3", "regret_top5", "macs_ratio", "gain_within_macs",
    "kendall_tau_b", "spearman", "partial_kendall",
)  # fmt: skip
COSTS = ("training_images", "validation_images", "training_macs", "validation_macs")
TIMINGS = ("train_seconds", "score_seconds", "total_seconds")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One search and what it is worth.

    Attributes:
        label, budget, seed: which one.
        pick: stage depths of the architecture it ranks first, as 4-3-3.
        pick_within_macs: of the one it ranks first among those of at most the default's MACs.
        path: resolutions of its layers, where the method found a network that need not be in the space, as 0-0-1-2-1.
        path_accuracy: true accuracy of that, in points; None: the truth has no row for it.
        n: architectures that the figures are over: those with a rank and a row in the truth.
        figures: by name in `FIGURES`; None where it is not defined. accuracy: true accuracy of `pick`, in points.
            regret_topk: the best true accuracy less the best among the first k. macs_ratio: MACs of `pick` over those
            of the default. gain_within_macs: true accuracy of `pick_within_macs` less that of the default.
            kendall_tau_b, spearman, partial_kendall (given MACs): of the ranking.
        undefined: reasons, for each figure that is None.
        cost: by name in `COSTS`.
        timings: by name in `TIMINGS`, in seconds; no two runs share them.
    """

    label: str
    budget: int
    seed: int
    pick: str
    pick_within_macs: str
    path: str | None
    path_accuracy: float | None
    n: int
    figures: dict[str, float | None]
    undefined: dict[str, str]
    cost: dict[str, int]
    timings: dict[str, float]


def describe_run(
    label: str,
    budget: int,
    seed: int,
    result: SearchResult,
    space: SearchSpace,
    truth: Mapping[int, float],
    of_paths: Mapping[str, float],
) -> Run:
    """The figures of a finished search.

    A ranking by accuracies counts those scored on all images alone: others' are not to be compared with them.

    Args:
        result: of the search.
        space: that was searched.
        truth: stand-alone accuracy in points, by architecture index.
        of_paths: of paths outside the space, by slug.
    """
    ranking, default = result.ranking, space.default
    method, whole = result.config["method"], [row for row in ranking if row.images_seen == result.scores["total"]]
    path = result.method.get("resolution_path")
    accuracy_of_path = None
    if path is not None:
        found = find_candidate(space, path)
        accuracy_of_path = truth.get(found.index) if isinstance(found, Architecture) else of_paths.get(path)
    agreed = ranking_agreement(ranking, whole, truth, method=method, by_accuracy=methods.get(method).by_accuracy)
    within = next(row for row in ranking if row.macs_ratio <= 1)
    figures: dict[str, float | None] = {
        "accuracy": truth.get(result.best.architecture.index),
        "macs_ratio": result.best.macs_ratio,
        "gain_within_macs": _difference(truth.get(within.architecture.index), truth.get(default.index)),
    }
    figures |= {name: agreed[name] for name in FIGURES if name not in figures}
    no_row = "no row in the truth for {}"
    reasons = {
        "accuracy": no_row.format(result.best.architecture),
        "gain_within_macs": no_row.format(
            " and ".join(str(a) for a in dict.fromkeys((within.architecture, default)) if a.index not in truth)
        ),
    } | agreed.get("undefined", {})
    return Run(
        label=label,
        budget=budget,
        seed=seed,
        pick=result.best.architecture.slug,
        pick_within_macs=within.architecture.slug,
        path=path,
        path_accuracy=accuracy_of_path,
        n=agreed["n"],
        figures={name: figures[name] for name in FIGURES},
        undefined={name: reasons[name] for name in FIGURES if figures[name] is None},
        cost={name: result.cost[name] for name in COSTS},
        timings={name: result.timings[name] for name in TIMINGS},
    )


def path_in_words(path: str, accuracy: float | None) -> str:
    """`0-0-1-2-1 (71.20 % alone)`."""
    return path if accuracy is None else f"{path} ({accuracy:.2f} % alone)"


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A figure over seeds.

    Attributes:
        n: seeds that it is defined for.
        mean: over them; None: for no seed.
        bootstrap, student: 95 % intervals of the mean (`bmsn.intervals`); None with fewer than 2 seeds.
        undefined: why it is missing for the other seeds, empty where there are none.
    """

    n: int
    mean: float | None
    bootstrap: tuple[float, float] | None
    student: tuple[float, float] | None
    undefined: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "n": self.n, "mean": self.mean, "bootstrap": self.bootstrap, "student": self.student,
            "undefined": self.undefined,
        }  # fmt: skip


def summarise(values: Sequence[float | None], reasons: Sequence[str] = ()) -> Summary:
    """Mean and intervals of the values that are there; `reasons` are those of the others."""
    known = [value for value in values if value is not None]
    return Summary(
        n=len(known),
        mean=statistics.fmean(known) if known else None,
        bootstrap=bootstrap_interval(known),
        student=student_interval(known),
        undefined="; ".join(dict.fromkeys(reasons)),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget, over seeds.

    Attributes:
        picks: how often each architecture was picked, the most frequent first.
        paths: what was found that need not be in the space, with its true accuracy (`Run.path_accuracy`).
        figures: by name in `FIGURES`.
        costs, timings: means, by name in `COSTS` and `TIMINGS`.
    """

    label: str
    budget: int
    num_runs: int
    picks: dict[str, int]
    paths: dict[str, float | None]
    figures: dict[str, Summary]
    costs: dict[str, float]
    timings: dict[str, float]


def summarise_runs(runs: Sequence[Run]) -> Row:
    """The row of runs of one method at one budget, at least one."""
    picks = [run.pick for run in runs]
    return Row(
        label=runs[0].label,
        budget=runs[0].budget,
        num_runs=len(runs),
        picks={pick: picks.count(pick) for pick in sorted(set(picks), key=lambda pick: (-picks.count(pick), pick))},
        paths={run.path: run.path_accuracy for run in runs if run.path is not None},
        figures={
            name: summarise(
                [run.figures[name] for run in runs], [run.undefined[name] for run in runs if name in run.undefined]
            )
            for name in FIGURES
        },
        costs={name: statistics.fmean(run.cost[name] for run in runs) for name in COSTS},
        timings={name: statistics.fmean(run.timings[name] for run in runs) for name in TIMINGS},
    )


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What one method has more than another: differences seed by seed, over seeds that both finished."""

    label: str
    baseline: str
    budget: int
    figures: dict[str, Summary]


def compare_pairs(runs: Sequence[Run], baseline: Sequence[Run]) -> Paired:
    """Runs of one method less those of another at the same budget."""
    others = {run.seed: run for run in baseline}
    pairs = [(run, others[run.seed]) for run in runs if run.seed in others]
    return Paired(
        label=runs[0].label,
        baseline=baseline[0].label,
        budget=runs[0].budget,
        figures={
            name: summarise(
                [_difference(run.figures[name], other.figures[name]) for run, other in pairs],
                [each.undefined[name] for pair in pairs for each in pair if name in each.undefined],
            )
            for name in FIGURES
        },
    )
