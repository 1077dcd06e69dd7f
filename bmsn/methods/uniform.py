"""Draws of architectures for all steps ahead: pure functions of (seed, purpose).

Uniform over architectures, or over the position of the first pooling. C(L-1, p) architectures crowd at early first
poolings: of 36 eight pool first after layer 1 and one after layer 8, so that layers at high resolution are hardly
trained there, and a search ranks late poolings too low (benchmarks/results).
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


def first_pooling_groups(space: SearchSpace) -> NDArray[np.int64]:
    """(C,) int64: the position of each architecture's first pooling, counted from 0 among those that occur."""
    return np.unique([a.pool_positions[0] for a in space], return_inverse=True)[1].astype(np.int64)


def draw_architectures(
    space: SearchSpace, num_steps: int, seed: int, *, draw: str | None, in_blocks: bool
) -> NDArray[np.int64]:
    """(num_steps,) int64: each step's architecture; `draw`: what is drawn equally often, see `SearchConfig`."""
    if draw == "first-pooling":
        return draw_by_group(first_pooling_groups(space), num_steps, seed, in_blocks=in_blocks)
    return draw_uniform(len(space), num_steps, seed, in_blocks=in_blocks)


def draw_by_group(group: NDArray[np.int64], num_steps: int, seed: int, *, in_blocks: bool) -> NDArray[np.int64]:
    """(num_steps,) int64: each step's architecture, groups equally often, and within one its architectures.

    Args:
        group: (C,) int64, each architecture's group; 0 to G - 1, none of them empty.
        num_steps, seed: as `draw_uniform`.
        in_blocks: groups, and the architectures of each, in shuffled blocks of each once instead of independently.
    """
    groups = draw_uniform(int(group.max()) + 1, num_steps, seed, in_blocks=in_blocks, purpose="first-pooling")
    drawn = np.empty(num_steps, np.int64)
    for number in range(int(group.max()) + 1):
        members, steps = np.flatnonzero(group == number), np.flatnonzero(groups == number)
        purpose = f"architectures/{number}"
        drawn[steps] = members[draw_uniform(len(members), len(steps), seed, in_blocks=in_blocks, purpose=purpose)]
    return drawn


def draw_weights(space: SearchSpace, draw: str | None) -> NDArray[np.float64]:
    """(C,): how often `draw_architectures` draws each architecture, relative to the others."""
    group = first_pooling_groups(space) if draw == "first-pooling" else np.arange(len(space))
    return 1 / np.bincount(group)[group]
