"""Randomness as a pure function of (seed, purpose, step): Philox counters, no generator state to save.

What is drawn on the host comes from numpy's Philox (4x64 bits), what is drawn inside a batch from Philox-4x32-10, which
CPU and GPU compute alike.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """A generator for one purpose at one step; its first draws overlap with no other step's (2^128 apart)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key, counter=step << 128))


def torch_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for a `torch.Generator`."""
    return int(generator(seed, purpose).integers(2**63))


def philox_key(seed: int, purpose: str) -> int:
    """A 63-bit key for `philox`: ops take signed integers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def philox(key: int, counter: Tensor) -> Tensor:
    """Philox-4x32-10, the reference of csrc/philox.h and of Triton's `tl.philox`.

    Args:
        key: 64 bits, the low word first.
        counter: (..., 4) int64, each a 32-bit word.
    Returns:
        Four random 32-bit words for each counter, int64, shape of `counter`.
    """
    a, b, c, d = counter.unbind(-1)
    low, high = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        # Products of 64 bits wrap in int64; the shift brings the sign down, the mask takes it away.
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 & _WORD ^ b ^ low, second & _WORD, first >> 32 & _WORD ^ d ^ high, first & _WORD
        low, high = low + 0x9E3779B9 & _WORD, high + 0xBB67AE85 & _WORD
    return torch.stack((a, b, c, d), -1)


def below(count: int, words: Tensor) -> Tensor:
    """Uniform in 0..count-1, up to count / 2^32, from 32-bit words; count < 2^31."""
    return count * words >> 32
