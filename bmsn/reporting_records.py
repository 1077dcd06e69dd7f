"""What the records of metrics.jsonl tell of methods other than the mixture: numbers alone, for figures.

Kinds: "tree" (mcts), "boltzmann", "few-shot", "alpha" (darts, gaea), "resolutions" (spos-unshared, spos-unshared-all).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmsn.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class Course:
    """What became of the C architectures that were searched, at S snapshots.

    Attributes:
        steps: (S,) int64, steps done at each.
        weight: (S, C), rows sum to 1: the share of the visits since the snapshot before, or the probability; NaN where
            there were none.
        value: (S, C), what each is worth to the method; NaN before its first visit.
    """

    steps: NDArray[np.int64]
    weight: NDArray[np.float64]
    value: NDArray[np.float64]


def tree_course(records: Sequence[Mapping[str, Any]]) -> Course:
    """Of `tree` records, at least one: visits and mean rewards of the leaves, which are their last layer."""
    visits = np.array([record["visits"][-1] for record in records], np.int64)
    return Course(
        steps=_steps(records),
        weight=_shares(visits),
        value=np.array([record["reward"][-1] for record in records], np.float64),  # None is NaN
    )


def probability_course(records: Sequence[Mapping[str, Any]]) -> Course:
    """Of `boltzmann` records, at least one: p(c) and a[c]."""
    return Course(
        steps=_steps(records),
        weight=np.array([record["probability"] for record in records], np.float64),
        value=np.array([record["scores"] for record in records], np.float64),
    )


def busiest(course: Course, most: int) -> tuple[list[int], Course]:
    """The `most` architectures of the largest weight over the whole search, in their order, and all others in one.

    Returns:
        Their columns, and a course with one column more, the others': their weight together; they have no value. Where
        there are no more than `most`, all columns and the course as it is.
    """
    if course.weight.shape[1] <= most:
        return list(range(course.weight.shape[1])), course
    total = np.nansum(course.weight, axis=0)
    chosen = sorted(np.argsort(-total, kind="stable")[:most].tolist())
    others = np.delete(course.weight, chosen, axis=1).sum(1, keepdims=True)
    return chosen, Course(
        steps=course.steps,
        weight=np.hstack([course.weight[:, chosen], others]),
        value=np.hstack([course.value[:, chosen], np.full_like(others, np.nan)]),
    )


def _steps(records: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    return np.array([record["step"] for record in records], np.int64)


def _shares(visits: NDArray[np.int64]) -> NDArray[np.float64]:
    since = np.diff(visits, axis=0, prepend=0)
    with np.errstate(invalid="ignore"):
        return since / since.sum(1, keepdims=True)


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A node of a search tree as a box: the boxes of a layer fill [0, 1], and one lies below that of its parent.

    Attributes:
        layer: from 0, the root's.
        pools: whether there is a pooling before the layer.
        left, width: in shares of all visits, so that `width` is the node's share.
        visits: how often it was passed; reward: their mean.
        picked: whether it is on the path of the most visited children.
    """

    layer: int
    pools: bool
    left: float
    width: float
    visits: int
    reward: float
    picked: bool


def tree_nodes(space: SearchSpace, record: Mapping[str, Any]) -> list[TreeNode]:
    """The visited nodes of a `tree` record, layer after layer; boxes are in the order of the architectures.

    Args:
        space: what was searched: a space, or what a limit left of it (`SearchSpace.restricted`).
        record: its visits and rewards are those of `space.prefix_tree()`.
    """
    waves, visits, rewards = space.prefix_tree(), record["visits"], record["reward"]
    total = visits[0][0]
    if not total:
        return []
    # From the leaves up, a node begins where the first of its children does.
    lefts = [np.cumsum([0, *visits[-1][:-1]])]
    for layer in reversed(range(1, len(waves))):
        left = np.full(len(waves[layer - 1]), total)
        np.minimum.at(left, [state.parent for state in waves[layer]], lefts[0])
        lefts.insert(0, left)
    picked = [0]
    for layer in range(1, len(waves)):
        children = [i for i, state in enumerate(waves[layer]) if state.parent == picked[-1]]
        # as the method itself: of equal ones the larger mean reward, then the one that keeps its resolution
        best = max(children, key=lambda i: (visits[layer][i], rewards[layer][i] or 0.0, not waves[layer][i].pools))
        picked.append(best)
    return [
        TreeNode(
            layer=layer,
            pools=state.pools,
            left=float(lefts[layer][place]) / total,
            width=visits[layer][place] / total,
            visits=visits[layer][place],
            reward=rewards[layer][place],
            picked=place == picked[layer],
        )
        for layer, wave in enumerate(waves)
        for place, state in enumerate(wave)
        if visits[layer][place]
    ]


@dataclass(frozen=True, kw_only=True)
class ResolutionCourse:
    """What became of R resolutions in each of L layers, at S snapshots.

    Attributes:
        steps: (S,) int64.
        values: (S, L, R), in [0, 1]: shares, or moving averages of accuracy; NaN before the first visit.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def share_course(records: Sequence[Mapping[str, Any]]) -> ResolutionCourse:
    """Of `alpha` records, at least one."""
    return ResolutionCourse(
        steps=_steps(records), values=np.array([record["shares"] for record in records], np.float64)
    )


def accuracy_course(records: Sequence[Mapping[str, Any]]) -> ResolutionCourse:
    """Of `resolutions` records, at least one."""
    visits = np.array([record["visits"] for record in records], np.int64)
    accuracy = np.array([record["accuracy"] for record in records], np.float64)
    return ResolutionCourse(steps=_steps(records), values=np.where(visits > 0, accuracy, np.nan))


def climbs(path: Sequence[int]) -> list[int]:
    """The layers of a resolution path (0: full, 1: half, ...) before which it goes up to a larger map."""
    return [layer for layer, (before, after) in enumerate(pairwise(path), start=1) if after < before]
