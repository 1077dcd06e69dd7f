"""What many files hold, as one sha256, remembered from one start to the next: a large folder is read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bmsn.errors import InputError
from bmsn.progress import Progress

logger = logging.getLogger(__name__)

_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system: a file may change twice within one tick of it
_SLICE = 32  # files a thread takes at a time


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """By what files are known to be unchanged without reading them.

    Attributes:
        digest: sha256 (hex) of each file's absolute path, size, mtime, ctime and inode. The kernel sets the ctime to
            the present whenever a file changes; no program sets it back.
        settled: all of them lie so long back that a later change is seen.
    """

    digest: str
    settled: bool


def stamp(files: Sequence[Path]) -> Stamp:
    """Raises InputError, naming the file that is missing or no regular file."""
    now, newest, digest = time.time_ns(), 0, hashlib.sha256()
    for file in files:
        try:
            found = file.stat()
        except OSError as error:
            raise InputError(f"{file}: {'a broken symlink' if file.is_symlink() else error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise InputError(f"{file}: no regular file")
        newest = max(newest, found.st_ctime_ns)
        digest.update(
            json.dumps([str(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]).encode()
        )
    return Stamp(digest=digest.hexdigest(), settled=newest < now - _SETTLED_NS)


def content_digest(files: Sequence[Path], name: str) -> str:
    """sha256 (hex) of the sha256 of each file, hashed in threads (hashlib frees the GIL).

    Args:
        files: in the order that counts.
        name: of the data set, for the progress.
    Raises:
        InputError: naming the file that cannot be read.
    """

    def hash_slice(start: int) -> list[bytes]:
        return [_hash(file) for file in files[start : start + _SLICE]]

    whole = hashlib.sha256()
    with (
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
        Progress(logger, f"{name}: read", len(files), "files") as progress,
    ):
        for digests in pool.map(hash_slice, range(0, len(files), _SLICE)):
            whole.update(b"".join(digests))
            progress.add(len(digests))
    return whole.hexdigest()


def _hash(file: Path) -> bytes:
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").digest()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


def remembered_digest(files: Sequence[Path], name: str, memory: Path) -> tuple[str, Stamp]:
    """`content_digest` as `memory` has it where the files' stamp is still the same, else computed and stored there.

    Args:
        files: in the order that counts.
        name: of the data set, for the progress.
        memory: a file of one stamp and one digest; damaged or missing, it is written anew. Held by this process alone.
    Returns:
        The digest, and the stamp taken before anything was read.
    Raises:
        InputError: naming the file that cannot be read.
        OSError: `memory` cannot be written.
    """
    current = stamp(files)
    with contextlib.suppress(OSError, ValueError):
        known, digest = memory.read_text().split()
        if known == current.digest:
            return digest, current
    digest = content_digest(files, name)
    if current.settled:
        partial = memory.with_suffix(".partial")
        partial.write_text(f"{current.digest} {digest}\n")
        os.replace(partial, memory)
    return digest, current
