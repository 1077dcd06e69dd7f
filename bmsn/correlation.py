"""How well a ranking agrees with the truth: rank correlations, the same with MACs partialled out, and regret.

Sources: Kendall 1945 (tau-b), Spearman 1904, Kendall 1942 (partial rank correlation). scipy computes the first two.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from bmsn.errors import InputError
from bmsn.paths import Candidate, as_path, find_candidate, path_macs
from bmsn.space import Architecture, SearchSpace

_BY_MACS = "MACs decide the ranking or the truth"
_OTHER_SPACE = 1.5  # times the MACs; in the named spaces the images' channels and classes make less of a difference
PUBLISHED = {"resnet20-cifar10": "cifar10_resnet20.csv"}


def load_truth(source: str, space: SearchSpace) -> dict[int, float]:
    """Stand-alone accuracy of architectures by index, in [0, 100].

    Args:
        source: "paper" (published for resnet20-cifar10: Javan et al. 2023, table 6), or a CSV file with the columns
            `stage_depths` (as 4-3-3) and `accuracy_mean`; `macs`
            (multiply-accumulates of an image), where it is there, tells networks of another size: from 1.5 times on.
        space: whose architectures they are; those that have no row are left out. Rows of paths outside the space, as
            0-0-1-2-1, are for `load_truth_of_paths`.
    Raises:
        InputError: no such table, a column or value that is not there, or an architecture of another space, also one
            that is called the same there.
    """
    truth = {c.index: accuracy for c, accuracy in _read_truth(source, space).items() if isinstance(c, Architecture)}
    if len(truth) < 3:
        raise InputError(f"truth {source}: at least 3 architectures of {space.name} are needed; got {len(truth)}")
    return truth


def load_truth_of_paths(source: str, space: SearchSpace) -> dict[str, float]:
    """The same of paths of resolutions outside the space, by slug; empty where the table has none."""
    return {c.slug: accuracy for c, accuracy in _read_truth(source, space).items() if not isinstance(c, Architecture)}


def _read_truth(source: str, space: SearchSpace) -> dict[Candidate, float]:
    if source == "paper":
        if space.name not in PUBLISHED:
            raise InputError(f"truth 'paper' is published for {', '.join(PUBLISHED)} only; the space is {space.name}")
        lines = files("bmsn").joinpath("published", PUBLISHED[space.name]).read_text().splitlines()
    else:
        try:
            lines = Path(source).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"truth {source}: {error}") from error
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    missing = {"stage_depths", "accuracy_mean"} - set(reader.fieldnames or ())
    if missing:
        raise InputError(f"truth {source}: column {', '.join(sorted(missing))} is missing; found {reader.fieldnames}")
    truth: dict[Candidate, float] = {}
    for number, row in enumerate(reader, start=1):
        try:
            candidate = find_candidate(space, row["stage_depths"] or "")
        except InputError as error:
            raise InputError(f"truth {source}: row {number}: {error}") from error
        if candidate in truth:
            raise InputError(f"truth {source}: row {number}: stage_depths {row['stage_depths']} stands there twice")
        try:
            accuracy = float(row["accuracy_mean"])
        except (TypeError, ValueError):
            accuracy = math.nan
        if not 0 <= accuracy <= 100:
            raise InputError(
                f"truth {source}: row {number}: accuracy_mean must be in [0, 100]; got {row['accuracy_mean']!r}"
            )
        _check_macs(f"truth {source}: row {number}", space, candidate, row.get("macs"))
        truth[candidate] = accuracy
    return truth


def _check_macs(place: str, space: SearchSpace, candidate: Candidate, text: str | None) -> None:
    """InputError where a network of this name has another width, depth of blocks or image size."""
    try:
        stored = float(text or "nan")
    except ValueError:
        raise InputError(f"{place}: macs must be a number; got {text!r}") from None
    here = path_macs(space, as_path(space, candidate))
    if not math.isnan(stored) and not 1 / _OTHER_SPACE < stored / here < _OTHER_SPACE:
        raise InputError(
            f"{place}: {candidate} has {stored:,.0f} MACs there and {here:,} in {space.name} with images of "
            f"{space.image_size} pixels: it is of another space, or trained on images of another size"
        )


CORRELATIONS = ("kendall_tau_b", "spearman", "partial_kendall")
REGRETS = {k: f"regret_top{k}" for k in (1, 3, 5)}


def agreement(
    predicted: Mapping[int, float],
    truth: Mapping[int, float],
    macs: Mapping[int, float],
    order: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Figures of a ranking against the truth.

    Args:
        predicted: what the ranking is by, larger is better; keys are architecture indices. Correlations are over those
            that the truth has, too.
        truth: stand-alone accuracy.
        macs: multiply-accumulates of all architectures that were searched.
        order: their indices, the best first, as the ranking was shown; None: by `predicted`, of equal ones the first.
    Returns:
        n, the architectures of the correlations; kendall_tau_b, spearman, partial_kendall (given MACs); regret_top1, 3,
        5: the best true accuracy of all that were searched less the best of the first k of the ranking, in the truth's
        units. `undefined` has the reason for each figure that is None.
    """
    common = sorted(set(predicted) & set(truth))
    p, t, m = (np.array([float(values[i]) for i in common]) for values in (predicted, truth, macs))
    result: dict[str, Any] = {"n": len(common)}
    undefined: dict[str, str] = {}
    constant = [name for name, values in (("ranking", p), ("truth", t)) if len(common) < 2 or np.ptp(values) == 0]
    if constant:
        result |= dict.fromkeys(CORRELATIONS)
        few = f"{len(common)} of them in the truth" if len(common) < 2 else f"constant {' and '.join(constant)}"
        undefined |= dict.fromkeys(CORRELATIONS, few)
    else:
        result |= {"kendall_tau_b": _kendall(p, t), "spearman": float(_stats().spearmanr(p, t).statistic)}
        result["partial_kendall"] = partial_kendall(p, t, m)
        if result["partial_kendall"] is None:
            undefined["partial_kendall"] = _BY_MACS
    known = {i: float(truth[i]) for i in macs if i in truth}
    if order is None and len(predicted) > 1 and len(set(predicted.values())) == 1:
        order = ()  # all are equal: none is the first
    elif order is None:
        order = sorted(predicted, key=lambda i: (-predicted[i], i))
    for k, name in REGRETS.items():
        found = [known[i] for i in order[:k] if i in known]
        result[name] = max(known.values()) - max(found) if found else None
        if not found:
            undefined[name] = (
                f"no row in the truth for the first{f' {k}' if k > 1 else ''}" if order else "constant ranking"
            )
    return result | ({"undefined": undefined} if undefined else {})


class Placed(Protocol):
    """A row of a ranking, of a search or of a report."""

    @property
    def architecture(self) -> Architecture: ...
    @property
    def rank(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def value(self) -> float | None: ...


def ranking_agreement(
    rows: Sequence[Placed],
    whole: Sequence[Placed],
    truth: Mapping[int, float],
    *,
    method: str,
    by_accuracy: bool,
) -> dict[str, Any]:
    """`agreement` of a ranking as it is shown with the truth.

    Args:
        rows: of all architectures, the best first.
        whole: those scored on all images: accuracies of others, which a race has dropped, are not to be compared with
            theirs, but every place counts for regret.
        method: of the search.
        by_accuracy: the ranking is by accuracies, and not as the method ranks on its own.
    """
    macs = {row.architecture.index: float(row.macs) for row in rows}
    if method == "macs":  # puts those of equal MACs in the order of the space
        predicted = macs
    elif by_accuracy:
        predicted = {row.architecture.index: row.value for row in whole if row.value is not None}
    else:
        predicted = {row.architecture.index: -float(row.rank) for row in rows}
    return agreement(predicted, truth, macs, [row.architecture.index for row in rows])


def why_undefined(figures: Mapping[str, Any]) -> str:
    """The reasons for what `agreement` left undefined, each once; empty where there is nothing to say, as of the
    ranking by MACs given MACs."""
    reasons = dict.fromkeys(figures.get("undefined", {}).values())
    return "; ".join(reason for reason in reasons if reason != _BY_MACS)


def partial_kendall(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, given: Sequence[float] | np.ndarray
) -> float | None:
    """Kendall's partial tau-b of x and y with `given` held fixed; None where `given` decides one of them."""
    if np.ptp(given) == 0:
        return _kendall(x, y)
    xy, xz, yz = _kendall(x, y), _kendall(x, given), _kendall(y, given)
    if max(abs(xz), abs(yz)) > 1 - 1e-9:
        return None
    return (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))


def _kendall(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    return float(_stats().kendalltau(x, y).statistic)


def _stats() -> ModuleType:
    """scipy.stats, imported at first use: it takes half a second and changes the process's warning filters."""
    with warnings.catch_warnings():
        from scipy import stats
    return stats
