"""Figures of a mixture over training, from the `mixture` records of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmsn.mixture import mean_entropy


@dataclass(frozen=True, kw_only=True)
class MixtureHistory:
    """What became of a mixture, at S snapshots.

    Attributes:
        steps: (S,) int64, steps done at each snapshot.
        assignments: (S, C, M), p(m|c).
        entropy: (S,) mean over c of the entropy of p(.|c), in nats.
        kl: (S,) KL(p(m) || uniform), in nats; p(m) the mean over c, weighted by how often each is drawn.
        load: (S, M) share of the visits since the snapshot before that each supernet had; NaN where there were none.
        switch_rate: (S,) share of architectures whose argmax_m p(m|c) is another one than at the snapshot before; NaN
            at the first.
        age_median, age_max: (S,) steps since the latest visit of a pair, over all C x M pairs; a pair never visited is
            as old as the run. What refreshes a[c,m] without a visit does not count.
        age_assigned: (S,) median age of the assigned pairs (c, argmax_m p(m|c)) alone.
        never_visited: (S,) share of pairs never visited.
    """

    steps: NDArray[np.int64]
    assignments: NDArray[np.float64]
    entropy: NDArray[np.float64]
    kl: NDArray[np.float64]
    load: NDArray[np.float64]
    switch_rate: NDArray[np.float64]
    age_median: NDArray[np.float64]
    age_max: NDArray[np.float64]
    age_assigned: NDArray[np.float64]
    never_visited: NDArray[np.float64]


def mixture_history(records: Sequence[Mapping[str, Any]]) -> MixtureHistory:
    """The history that `mixture` records tell, in the order of their steps; at least one record."""
    steps = np.array([record["step"] for record in records], np.int64)
    assignments = np.array([record["assignment"] for record in records], np.float64)
    visits = np.array([record["visits"] for record in records], np.int64)
    last_visit = np.array([record["last_visit"] for record in records], np.int64)
    # A run from before architectures had weights drew them equally often.
    loads = [np.average(record["assignment"], axis=0, weights=record.get("weights")) for record in records]
    since = np.diff(visits.sum(1), axis=0, prepend=0)  # (S, M) visits of each supernet since the snapshot before
    best = assignments.argmax(2)  # (S, C)
    switches = np.full(len(steps), np.nan)
    switches[1:] = (best[1:] != best[:-1]).mean(1)
    # A visit in the last of n steps has index n - 1 and age 0; -1, never, gives n.
    ages = steps[:, None, None] - 1 - last_visit
    flat = ages.reshape(len(steps), -1)
    with np.errstate(invalid="ignore"):
        load = since / since.sum(1, keepdims=True)
    return MixtureHistory(
        steps=steps,
        assignments=assignments,
        entropy=np.array([mean_entropy(p) for p in assignments]),
        kl=np.array([kl_to_uniform(p) for p in loads]),
        load=load,
        switch_rate=switches,
        age_median=np.median(flat, axis=1),
        age_max=flat.max(1).astype(np.float64),
        age_assigned=np.median(np.take_along_axis(ages, best[:, :, None], axis=2), axis=(1, 2)),
        never_visited=(last_visit < 0).mean((1, 2)),
    )


def kl_to_uniform(p: NDArray[np.float64]) -> float:
    """KL(p || uniform) of a distribution (M,), in nats; 0 log 0 = 0, and never below 0 by rounding."""
    positive = p[p > 0]
    return max(0.0, float((positive * np.log(positive * len(p))).sum()))
