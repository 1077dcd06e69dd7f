"""A command that trains networks, with faults: `faulty_networks.py COMMAND FOLDER FAULTS FLAGS...`.

COMMAND is ground_truth or retrain. FAULTS is a comma-separated list of KIND:ARCHITECTURE:SEED:TIMES, or "-"; the fault
strikes the first TIMES times that this network is begun. Kinds: crash (the process is killed), raise, hang, nan (the
loss is not finite), images (bad input is found). FOLDER/trained.log has a line "PID ARCHITECTURE SEED" for every
network begun. The worker processes import this file too, so the faults are theirs.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import bmsn
import bmsn.tasks
from bmsn.standalone import TrainedNetwork, train_alone

command, folder, faults, *flags = sys.argv[1:]
log = Path(folder) / "trained.log"


def train_watched(
    space: bmsn.SearchSpace, architecture: bmsn.Architecture, *args: Any, **kwargs: Any
) -> TrainedNetwork:
    network = f"{architecture.slug}:{kwargs['seed']}"
    with log.open("a") as file:
        file.write(f"{os.getpid()} {network}\n")
    times = sum(line.split()[1] == network for line in log.read_text().splitlines())
    for fault in faults.split(",") if faults != "-" else ():
        kind, where, limit = fault.split(":", 1)[0], ":".join(fault.split(":")[1:3]), int(fault.split(":")[3])
        if where == network and times <= limit:
            _strike(kind)
    return train_alone(space, architecture, *args, **kwargs)


def _strike(kind: str) -> None:
    match kind:
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError("out of luck")
        case "hang":
            time.sleep(600)
        case "nan":
            raise bmsn.RunStopped("the loss is not finite")
        case "images":
            raise bmsn.InputError("the images are others")


bmsn.tasks.train_alone = train_watched
if __name__ == "__main__":
    sys.exit(importlib.import_module(f"bmsn.{command}").main(flags))
