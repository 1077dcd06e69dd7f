"""Randomness as a pure function of (seed, purpose, step): Philox counters, no generator state to save.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """A generator for one purpose at one step; its first draws overlap with no other step's (2^128 apart)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key, counter=step << 128))


def torch_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for a `torch.Generator`."""
    return int(generator(seed, purpose).integers(2**63))
