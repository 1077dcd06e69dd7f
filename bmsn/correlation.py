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
from typing import Any

import numpy as np

from bmsn.errors import InputError
from bmsn.space import SearchSpace

PUBLISHED = {"resnet20-cifar10": "cifar10_resnet20.csv"}


def load_truth(source: str, space: SearchSpace) -> dict[int, float]:
    """Stand-alone accuracy of architectures by index, in [0, 100].

    Args:
        source: "paper" (published for resnet20-cifar10: Javan et al. 2023, table 6), or a CSV file with the columns
            `stage_depths` (as 4-3-3) and `accuracy_mean`.
        space: whose architectures they are; those that have no row are left out.
    Raises:
        InputError: no such table, a column or value that is not there, or an architecture of another space.
    """
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
    truth: dict[int, float] = {}
    for number, row in enumerate(reader, start=1):
        index = space.find(row["stage_depths"] or "").index
        try:
            accuracy = float(row["accuracy_mean"])
        except (TypeError, ValueError):
            accuracy = math.nan
        if not 0 <= accuracy <= 100:
            raise InputError(
                f"truth {source}: row {number}: accuracy_mean must be in [0, 100]; got {row['accuracy_mean']!r}"
            )
        truth[index] = accuracy
    if len(truth) < 3:
        raise InputError(f"truth {source}: at least 3 architectures of {space.name} are needed; got {len(truth)}")
    return truth


def agreement(predicted: Mapping[int, float], truth: Mapping[int, float], macs: Mapping[int, float]) -> dict[str, Any]:
    """Figures of a ranking against the truth, over the architectures that both have.

    Args:
        predicted: what the ranking is by, larger is better; keys are architecture indices.
        truth: stand-alone accuracy.
        macs: multiply-accumulates, for the partial correlation.
    Returns:
        n, kendall_tau_b, spearman, partial_kendall (given MACs), and regret_top1, 3, 5: the best true accuracy among
        the n less the best among the first k of the ranking, in the truth's units. A figure that is not defined (a
        constant ranking) is None, and `undefined` says why.
    """
    common = sorted(set(predicted) & set(truth))
    p, t, m = (np.array([float(values[i]) for i in common]) for values in (predicted, truth, macs))
    result: dict[str, Any] = {"n": len(common)}
    constant = [name for name, values in (("ranking", p), ("truth", t)) if len(common) < 2 or np.ptp(values) == 0]
    if constant:
        result |= {
            "kendall_tau_b": None,
            "spearman": None,
            "partial_kendall": None,
            "undefined": f"constant {' and '.join(constant)}",
        }
    else:
        result |= {"kendall_tau_b": _kendall(p, t), "spearman": float(_stats().spearmanr(p, t).statistic)}
        result["partial_kendall"] = partial_kendall(p, t, m)
    order = np.argsort(-p, kind="stable")
    for k in (1, 3, 5):
        result[f"regret_top{k}"] = float(t.max() - t[order[:k]].max()) if common else None
    return result


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
