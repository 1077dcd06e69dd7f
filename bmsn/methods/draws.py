"""Draws of architectures for all steps ahead: pure functions of (seed, purpose).

Uniform over architectures, or over the positions of each pooling. C(L-1, p) architectures crowd where the first pooling
is early and the last one late: of 36 eight pool first after layer 1 and one after layer 8. So late layers are hardly
trained at high resolution, nor early ones at low resolution, and what has them ranks too low (benchmarks/results).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bmsn.rng import generator
from bmsn.space import SearchSpace


def draw_uniform(
    num_choices: int, num_steps: int, seed: int, *, in_blocks: bool, purpose: str = "architectures"
) -> NDArray[np.int64]:
    """(num_steps,) int64: each step's choice, uniform: independently, or in shuffled blocks of each once."""
    random = generator(seed, purpose)
    if not in_blocks:
        return random.integers(num_choices, size=num_steps)
    blocks = np.tile(np.arange(num_choices), (-(-num_steps // num_choices), 1))
    return random.permuted(blocks, axis=1).ravel()[:num_steps]


def pooling_groups(space: SearchSpace, pooling: int) -> NDArray[np.int64]:
    """(C,) int64: the position of each architecture's pooling (0: the first), counted from 0 among those that occur."""
    return np.unique([a.pool_positions[pooling] for a in space], return_inverse=True)[1].astype(np.int64)


def draw_by_group(
    group: NDArray[np.int64], num_steps: int, seed: int, *, in_blocks: bool, purpose: str
) -> NDArray[np.int64]:
    """(num_steps,) int64: each step's architecture, groups equally often, and within one its architectures.

    Args:
        group: (C,) int64, each architecture's group; 0 to G - 1, none of them empty.
        num_steps, seed, purpose: as `draw_uniform`.
        in_blocks: groups, and the architectures of each, in shuffled blocks of each once instead of independently.
    """
    num_groups = int(group.max()) + 1
    groups = draw_uniform(num_groups, num_steps, seed, in_blocks=in_blocks, purpose=purpose)
    drawn = np.empty(num_steps, np.int64)
    for number in range(num_groups):
        members, steps = np.flatnonzero(group == number), np.flatnonzero(groups == number)
        inside = draw_uniform(len(members), len(steps), seed, in_blocks=in_blocks, purpose=f"{purpose}/{number}")
        drawn[steps] = members[inside]
    return drawn


def draw_architectures(
    space: SearchSpace, num_steps: int, seed: int, *, draw: str | None, in_blocks: bool
) -> NDArray[np.int64]:
    """(num_steps,) int64: each step's architecture.

    Args:
        draw: "poolings": one of the p poolings, then its position, then an architecture that has it there, each
            uniformly; "first-pooling": the same of the first alone; else architectures uniformly.
        in_blocks: each of these draws in shuffled blocks of each once instead of independently.
    """
    poolings = _drawn_poolings(space, draw)
    if not poolings:
        return draw_uniform(len(space), num_steps, seed, in_blocks=in_blocks)
    which = draw_uniform(len(poolings), num_steps, seed, in_blocks=in_blocks, purpose="poolings")
    drawn = np.empty(num_steps, np.int64)
    for pooling in poolings:
        steps, purpose = np.flatnonzero(which == pooling), f"poolings/{pooling}"
        group = pooling_groups(space, pooling)
        drawn[steps] = draw_by_group(group, len(steps), seed, in_blocks=in_blocks, purpose=purpose)
    return drawn


def draw_weights(space: SearchSpace, draw: str | None) -> NDArray[np.float64]:
    """(C,): how often `draw_architectures` draws each architecture: their shares, which sum to 1."""
    groups = [pooling_groups(space, pooling) for pooling in _drawn_poolings(space, draw)] or [np.arange(len(space))]
    return np.mean([1 / (np.bincount(group) * (group.max() + 1))[group] for group in groups], axis=0)


def _drawn_poolings(space: SearchSpace, draw: str | None) -> range:
    """The poolings whose positions are drawn equally often: none where architectures are."""
    return {"poolings": range(space.num_pools), "first-pooling": range(1)}.get(draw or "", range(0))
