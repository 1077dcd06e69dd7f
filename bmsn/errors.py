"""The kinds of failure that a command turns into an exit code (listed in the README)."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import TypeGuard

# What a disk answers that takes no more, whatever is written: full, over a quota or a limit, failing, read-only.
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))


class InputError(ValueError):
    """Bad input: a flag, field, file, data set or run folder. The message says what is accepted. Exit code 2."""


class RunStopped(RuntimeError):
    """A run stopped itself (NaN losses, an unsolvable balance, no memory); its last good state is kept. Exit code 3."""


def is_disk_error(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether it says that a disk takes no more: no fault of ours, and of use to nobody as a traceback."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def did_you_mean(name: object, accepted: Iterable[str]) -> str:
    """` (did you mean 'nearest'?)`, for the end of a message; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(accepted), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
