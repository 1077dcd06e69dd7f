"""How an unfinished run ranks: by its last ranking on the way or, before there is one, as its method would."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmsn import methods
from bmsn.methods.base import Ranking
from bmsn.methods.mcts import MctsSampler
from bmsn.methods.mixture import likeliest
from bmsn.paths import architecture_path
from bmsn.rank_rules import IN_WORDS, RankRule
from bmsn.space import Architecture, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A ranking.

    Attributes:
        ranked_by: what it is by, in words.
        rows: architectures from best to worst with their cells, named as in result.json.
        by_accuracy: the accuracies or rank values of the rows decide their order.
        estimate: what `ema_accuracy` of the rows is, in words.
    """

    ranked_by: str
    rows: list[tuple[Architecture, dict[str, Any]]]
    by_accuracy: bool = True
    estimate: str = "a[c,m]"


def ranking_values(record: Mapping[str, Any]) -> dict[str, float]:
    """What a `ranking` record ranks by, by slug; those not scored are left out."""
    values = record.get("rank_value") or record["accuracy"]
    return {slug: value for slug, value in values.items() if value is not None}


def unfinished_standing(
    space: SearchSpace, searched: Sequence[Architecture], config: Mapping[str, Any],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Standing:  # fmt: skip
    """What the records of metrics.jsonl tell; no rows where they tell nothing.

    Args:
        space: of the run.
        searched: what the method numbers in its records.
        config: its settings.
        records: by kind, in the order of their steps.
    """
    if "ranking" in records:
        return _from_ranking(space, config, records["ranking"][-1])
    kind = next((kind for kind in _SNAPSHOTS if kind in records), None)
    if kind is None:
        return Standing(ranked_by="nothing yet", rows=[])
    last, snapshot = records[kind][-1], _SNAPSHOTS[kind]
    found = snapshot.rank(space.restricted(searched), last)
    return Standing(
        ranked_by=snapshot.ranked_by.format(f"after step {last['step']}"),
        rows=[(searched[c], _cells(found, c, snapshot.cell)) for c in found.order.tolist()],
        by_accuracy=snapshot.by_accuracy,
        estimate=snapshot.estimate,
    )


def _from_ranking(space: SearchSpace, config: Mapping[str, Any], record: Mapping[str, Any]) -> Standing:
    """Of a `ranking` record, whose rows stand in their order."""
    method = methods.get(config.get("method") or "mixture")
    rows = [
        (space.find(slug), {
            "accuracy": accuracy, "rank_value": record.get("rank_value", {}).get(slug),
            "supernet": record["supernet"][slug],
        })
        for slug, accuracy in record["accuracy"].items()
    ]  # fmt: skip
    if not method.by_accuracy:
        return Standing(ranked_by=f"{method.ranked_by}, after epoch {record['epoch']}", rows=rows, by_accuracy=False)
    values = ranking_values(record)
    rows.sort(key=lambda row: values.get(row[0].slug, -math.inf), reverse=True)
    rule: RankRule = config.get("rank_by") or "assigned"
    return Standing(ranked_by=f"{IN_WORDS[rule]} after epoch {record['epoch']}", rows=rows)


def _cells(found: Ranking, c: int, estimate_cell: str) -> dict[str, Any]:
    estimate, supernet = float(found.estimate[c]), int(found.supernet[c])
    known = {estimate_cell: None if math.isnan(estimate) else estimate}
    return {"accuracy": None, "supernet": None if supernet < 0 else supernet} | known


# From a snapshot of a method to the ranking by it, for the architectures that it numbers. -----------------------------


def _of_mixture(space: SearchSpace, record: Mapping[str, Any]) -> Ranking:
    """By a[c, m*], m* the likeliest supernet."""
    scores, best = np.array(record["scores"]), likeliest(np.array(record["assignment"]), np.array(record["visits"]))
    return _by_estimate(scores[np.arange(len(best)), best], best)


def _of_averages(space: SearchSpace, record: Mapping[str, Any]) -> Ranking:
    """By a[c]; null: not visited yet, so that it comes last."""
    return _by_estimate(np.array(record["scores"], np.float64), np.array(record.get("supernet", [0] * len(space))))


def _of_tree(space: SearchSpace, record: Mapping[str, Any]) -> Ranking:
    """As the method itself, from its own numbers."""
    visits = np.concatenate(record["visits"]).astype(np.int64)
    means = np.nan_to_num(np.concatenate(record["reward"]).astype(np.float64))  # null: no visit
    sampler = MctsSampler(space, num_steps=0, seed=0, constant=0.0, warm_up=0.0, in_blocks=False)
    sampler.load_state_dict({"visits": visits, "rewards": visits * means})
    return sampler.rank()


def _of_resolutions(space: SearchSpace, record: Mapping[str, Any]) -> Ranking:
    """By the mean over its layers of the averages at their resolutions; one that never trained leaves nothing to say.

    So does `spos-unshared-all` itself. `spos-unshared` has an average for each architecture, which no record holds.
    """
    accuracy = np.where(np.array(record["visits"]) > 0, np.array(record["accuracy"], np.float64), np.nan)  # (L, R)
    return _by_estimate(_along_paths(space, accuracy).mean(1), np.zeros(len(space), np.int64))


def _of_shares(space: SearchSpace, record: Mapping[str, Any]) -> Ranking:
    """By the geometric mean of the shares along its path, from layer 1 on."""
    chosen = _along_paths(space, np.array(record["shares"], np.float64))[:, 1:]
    with np.errstate(divide="ignore"):  # a share of 0
        return _by_estimate(np.exp(np.log(chosen).mean(1)), np.full(len(space), -1))


def _along_paths(space: SearchSpace, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C, L): for each architecture its layers' values at their resolutions, of (L, R)."""
    layers = np.arange(space.num_layers)
    return np.array([values[layers, architecture_path(space, a).resolutions] for a in space])


def _by_estimate(estimate: NDArray[np.float64], supernet: NDArray[np.int64]) -> Ranking:
    return Ranking(np.argsort(-estimate, kind="stable"), estimate, supernet)


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """What one kind of record says.

    Attributes:
        rank: makes the ranking.
        ranked_by: what it is by, with a place for "after step 90".
        cell: where its estimate stands: as the accuracy where it is made of validation accuracies, for there is no
            other yet.
        by_accuracy: the ranking is by that alone.
        estimate: what it is, in words, where it stands as `ema_accuracy`.
    """

    rank: Callable[[SearchSpace, Mapping[str, Any]], Ranking]
    ranked_by: str
    cell: str = "accuracy"
    by_accuracy: bool = True
    estimate: str = "a[c,m]"


_AVERAGES = _Snapshot(rank=_of_averages, ranked_by="the moving averages a[c] of validation accuracies {}")
_SNAPSHOTS = {
    "mixture": _Snapshot(rank=_of_mixture, ranked_by="a[c,m] {}"),
    "boltzmann": _AVERAGES,
    "few-shot": _AVERAGES,
    "tree": _Snapshot(
        rank=_of_tree,
        ranked_by="visits in the tree, from its root down, {} (accuracies are mean rewards)",
        by_accuracy=False,
    ),
    "resolutions": _Snapshot(
        rank=_of_resolutions,
        ranked_by="the mean over layers of the moving averages of validation accuracies at their resolutions {}",
    ),
    "alpha": _Snapshot(
        rank=_of_shares,
        ranked_by="the shares of its resolutions {}",
        cell="ema_accuracy",
        by_accuracy=False,
        estimate="mean share",
    ),
}
