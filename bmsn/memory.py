"""What a command, not the library, may do to the memory of its process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_BLOCK = 32 * 2**20  # the most that glibc takes for M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed for the next allocation, for the whole process; no more than its peak.

    glibc takes every map of a training step as fresh pages from the kernel and gives them back: the page faults are 9%
    of a step of ResNet-20 on two cores. For commands: a library leaves its host's allocator alone.

    Returns:
        Whether the C library took the setting: only glibc has it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
