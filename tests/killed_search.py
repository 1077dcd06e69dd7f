"""A search that kills itself with SIGKILL the COUNT-th time it comes to PLACE: `killed_search.py PLACE COUNT FLAGS...`.

Places: step (after a training step), fsync (within the writing of a checkpoint), saved (a checkpoint is written,
nothing after it), metrics (a metrics record is about to be written), score (the final scoring).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import bmsn.search
from bmsn.checkpoint import CheckpointStore
from bmsn.loop import SearchLoop
from bmsn.runfolder import MetricsFile

place, count, *flags = sys.argv[1:]
left = int(count)
saving = False


def visit() -> None:
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def visiting(function: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            visit()
        result = function(*args, **kwargs)
        if not before:
            visit()
        return result

    return wrapped


def save_watched(
    self: CheckpointStore, step: int, state: dict[str, Any], save: Callable[..., Any] = CheckpointStore.save
) -> Any:
    global saving
    saving = True
    try:
        return save(self, step, state)
    finally:
        saving = False


def score_watched(self: SearchLoop, score: Callable[..., Any] = SearchLoop.score) -> Any:
    if self.step == self.num_steps:
        visit()
    return score(self)


def fsync_watched(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
    if saving:
        visit()
    fsync(descriptor)


if place == "fsync":
    CheckpointStore.save, os.fsync = save_watched, fsync_watched  # type: ignore[method-assign]
elif place == "score":
    SearchLoop.score = score_watched  # type: ignore[method-assign]
else:
    owner, name, before = {
        "step": (SearchLoop, "advance", False),
        "saved": (CheckpointStore, "save", False),
        "metrics": (MetricsFile, "write", True),
    }[place]
    setattr(owner, name, visiting(getattr(owner, name), before=before))
sys.exit(bmsn.search.main(flags))
