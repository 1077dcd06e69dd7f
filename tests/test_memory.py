"""keep_freed_memory: glibc takes it, freed blocks stay with the process; where there is no mallopt it says so."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from bmsn.memory import keep_freed_memory

FAULTS = """
import ctypes, resource, sys
from bmsn.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 30 * 2**20  # above glibc's own threshold, below the one that it takes at most

def touch():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_blocks_are_used_again():
    faults = int(subprocess.run([sys.executable, "-c", FAULTS, "keep"], check=True, capture_output=True).stdout)
    assert faults < 100  # of 7680 pages


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("bmsn.memory.sys.platform", "darwin")
    assert keep_freed_memory() is False
