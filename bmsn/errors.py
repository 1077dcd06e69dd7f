"""The two kinds of failure that a command turns into an exit code (listed in the README)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a flag, field, file, data set or run folder. The message says what is accepted. Exit code 2."""


class RunStopped(RuntimeError):
    """A run stopped itself (NaN losses, an unsolvable balance, no memory); its last good state is kept. Exit code 3."""


def did_you_mean(name: object, accepted: Iterable[str]) -> str:
    """` (did you mean 'nearest'?)`, for the end of a message; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(accepted), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
