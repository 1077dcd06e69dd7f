"""From the counts of a scoring to a ranking: by a rule of `bmsn.rank_rules`, or as a method ranks on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmsn.correlation import agreement
from bmsn.cost import pareto_front
from bmsn.errors import InputError
from bmsn.evaluator import Scores
from bmsn.methods.base import Ranking
from bmsn.racing import Race, images_seen
from bmsn.rank_rules import IN_WORDS, RANK_RULES, RankRule, rank_values
from bmsn.result import RankedArchitecture, SearchResult
from bmsn.space import Architecture


def record_scores(scores: Scores | Race, assignment: NDArray[np.float64] | None) -> dict[str, Any]:
    """Plain values for result.json, one a pair: `SearchResult.scores`.

    Args:
        assignment: (C, M), p(m|c), where every architecture that was scored was scored with every supernet; None: not
            so, and there is one accuracy of each.
    """
    record = {
        "architecture": [a.slug for a, _ in scores.pairs],
        "supernet": [m for _, m in scores.pairs],
        "correct": scores.correct.tolist(),
        "images_seen": images_seen(scores),
        "total": scores.total,
    }
    if assignment is not None:
        record["probability"] = [float(assignment[a.index, m]) for a, m in scores.pairs]
    return record


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands behind an architecture's place.

    Attributes:
        value: what it is ranked by.
        supernet: whose accuracy is shown.
        correct, seen: of the images scored in that supernet.
    """

    value: float
    supernet: int
    correct: int
    seen: int


def standings(record: Mapping[str, Any], rule: RankRule) -> dict[str, Standing]:
    """The architectures that were scored, by slug.

    Args:
        record: of `record_scores`.
        rule: all but `assigned` need every pair.
    Raises:
        InputError: pairs are missing.
    """
    slugs: list[str] = list(dict.fromkeys(record["architecture"]))
    columns = (record[name] for name in ("architecture", "supernet", "correct", "images_seen"))
    counts = {(slug, m): (correct, seen) for slug, m, correct, seen in zip(*columns, strict=True)}
    if "probability" not in record:
        if rule != "assigned" or len(counts) != len(slugs):
            raise InputError(f"rank_by {rule} needs the accuracies of all pairs (score pairs); each has one here")
        return {slug: Standing(correct / seen, m, correct, seen) for (slug, m), (correct, seen) in counts.items()}
    correct, probability = (
        np.array(record[name], float).reshape(len(slugs), -1) for name in ("correct", "probability")
    )
    values, supernets = rank_values(rule, correct / record["total"], probability)
    return {
        slug: Standing(value, supernet, *counts[slug, supernet])
        for slug, value, supernet in zip(slugs, values.tolist(), supernets.tolist(), strict=True)
    }


def rank_architectures(
    record: Mapping[str, Any],
    own: Ranking,
    rule: RankRule | None,
    architectures: Sequence[Architecture],
    macs: Sequence[int],
    default_macs: int,
) -> tuple[RankedArchitecture, ...]:
    """Architectures from best to worst.

    By a rule: after those scored on all images come those that a race dropped, by their accuracy on the images they
    saw, and then those not scored, as the method ranks them.

    Args:
        record: of `record_scores`.
        own: how the method ranks; it decides between equal values.
        rule: what to rank by; None: `own`, with accuracies beside it.
        architectures: those searched, in the numbering of `own`; macs: of each.
        default_macs: of the space's default architecture.
    """
    known = standings(record, rule or "assigned")
    by_estimate = np.argsort(np.argsort(-own.estimate, kind="stable"))  # NaN: last
    rows = []
    for index in own.order.tolist():
        standing, estimate = known.get(architectures[index].slug), float(own.estimate[index])
        supernet = int(own.supernet[index]) if standing is None else standing.supernet
        row = RankedArchitecture(
            rank=0,
            architecture=architectures[index],
            accuracy=None,
            standard_error=None,
            images_seen=0,
            supernet=supernet if supernet >= 0 else None,
            macs=macs[index],
            macs_ratio=macs[index] / default_macs,
            ema_accuracy=None if math.isnan(estimate) else estimate,
            ema_rank=None if math.isnan(estimate) else int(by_estimate[index]) + 1,
            pareto=False,
        )
        rows.append(row if standing is None else _with_standing(row, standing, rule))
    return _placed(rows if rule is None else _sorted(rows, record["total"]), record["total"])


def rerank(result: SearchResult, rule: RankRule) -> SearchResult:
    """The result that the same search would have had with another `rank_by`; without figures against a truth.

    Raises:
        InputError: not all pairs were scored.
    """
    known, total = standings(result.scores, rule), result.scores["total"]
    rows = [
        _with_standing(row, known[row.architecture.slug], rule) if row.architecture.slug in known else row
        for row in _by_estimate(result.ranking)
    ]
    return replace(
        result,
        ranking=_placed(_sorted(rows, total), total),
        config={**result.config, "rank_by": rule},
        method={**result.method, "ranked_by": IN_WORDS[rule]},
        truth={},
    )


def rules_against_truth(
    record: Mapping[str, Any],
    ranked: Sequence[RankedArchitecture],
    truth: Mapping[int, float],
    macs: Mapping[int, float],
) -> dict[str, dict[str, Any]]:
    """`agreement` of every rule with the truth, by rule; empty where not all pairs were scored.

    Args:
        record: of `record_scores`.
        ranked: the architectures by any rule; of equal ones the method's own ranking decides, as in `rerank`.
    """
    if "probability" not in record:
        return {}
    indices = {row.architecture.slug: row.architecture.index for row in _by_estimate(ranked)}
    found: dict[str, dict[str, Any]] = {}
    for rule in RANK_RULES:
        known = standings(record, rule)
        values = {index: known[slug].value for slug, index in indices.items() if slug in known}
        order = sorted(values, key=lambda index: -values[index])
        is_constant = len(set(values.values())) == 1  # then none is the first
        found[rule] = agreement(values, truth, macs, None if is_constant else order)
    return found


def _by_estimate(ranked: Sequence[RankedArchitecture]) -> list[RankedArchitecture]:
    """As the method ranks them."""
    return sorted(ranked, key=lambda row: row.ema_rank or math.inf)


def _with_standing(row: RankedArchitecture, standing: Standing, rule: RankRule | None) -> RankedArchitecture:
    accuracy = standing.correct / standing.seen
    return replace(
        row,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / standing.seen),
        images_seen=standing.seen,
        supernet=standing.supernet,
        rank_value=None if rule in (None, "assigned", "best") else standing.value,
    )


def _sorted(rows: Sequence[RankedArchitecture], total: int) -> list[RankedArchitecture]:
    """By value, of equal ones as they come; after them those on fewer than `total` images, then those on none."""
    return sorted(rows, key=lambda row: (row.images_seen < total, row.images_seen == 0, -(row.value or 0.0)))


def _placed(rows: Sequence[RankedArchitecture], total: int) -> tuple[RankedArchitecture, ...]:
    """The rows with their places, and with the Pareto front among those on all images."""
    accuracies = [row.accuracy if row.images_seen == total else None for row in rows]
    front = pareto_front(accuracies, [row.macs for row in rows])
    return tuple(
        replace(row, rank=rank, pareto=on_it) for rank, (row, on_it) in enumerate(zip(rows, front, strict=True), 1)
    )
