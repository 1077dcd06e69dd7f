"""A search that kills itself with SIGKILL: `killed_search.py PLACE COUNT FLAGS...`, at the COUNT-th time it comes to PLACE.

Places: step (after a training step), fsync (in the middle of a checkpoint), saved (a checkpoint is written, nothing after it),
metrics (a metrics record is about to be written), score (the final scoring).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import bmsn.checkpoint
import bmsn.loop
import bmsn.runfolder
import bmsn.search

place, count, *flags = sys.argv[1:]
left = int(count)


def killing(function: Any, before: bool) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global left
        left -= 1
        if before and left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


owner, name, before = {
    "step": (bmsn.loop.SearchLoop, "advance", False),
    "fsync": (bmsn.checkpoint.os, "fsync", True),
    "saved": (bmsn.checkpoint.CheckpointStore, "save", False),
    "metrics": (bmsn.runfolder.MetricsFile, "write", True),
    "score": (bmsn.loop.SearchLoop, "score", True),
}[place]
setattr(owner, name, killing(getattr(owner, name), before))
sys.exit(bmsn.search.main(flags))
