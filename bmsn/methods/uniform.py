"""Uniform draws of architectures for all steps ahead: a pure function of (seed, purpose)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bmsn.rng import generator


def draw_uniform(
    num_choices: int, num_steps: int, seed: int, *, in_blocks: bool, purpose: str = "architectures"
) -> NDArray[np.int64]:
    """(num_steps,) int64: each step's choice, uniform: independently, or in shuffled blocks of each once."""
    random = generator(seed, purpose)
    if not in_blocks:
        return random.integers(num_choices, size=num_steps)
    blocks = np.tile(np.arange(num_choices), (-(-num_steps // num_choices), 1))
    return random.permuted(blocks, axis=1).ravel()[:num_steps]
