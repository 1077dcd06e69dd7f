"""Prints, as JSON, what pytest collects and does not skip outright, with or without a GPU, real or not.

    python tests/gpu_collection.py GPU COMMANDS     # GPU: 1 or 0; COMMANDS: JSON, lists of pytest's arguments

The GPU is only told of: torch says that there is one, and Triton is there. Nothing is run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch


class Collected:
    """What one command collects: the ids of tests without a mark that skips them, and of those that take a device."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.on_device: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if not any(mark.args and mark.args[0] for mark in item.iter_markers("skipif")):
                self.runs.append(item.nodeid)
                if "device" in getattr(item, "fixturenames", ()):
                    self.on_device.append(item.nodeid)


def pretend(gpu: bool) -> None:
    torch.cuda.is_available = lambda: gpu
    torch.cuda.device_count = lambda: int(gpu)
    if importlib.util.find_spec("triton") is None:
        sys.modules["triton"] = ModuleType("triton")
        sys.modules["triton"].__spec__ = ModuleSpec("triton", None)


def main(gpu: bool, commands: list[list[str]]) -> None:
    pretend(gpu)
    found = []
    printed, sys.stdout = sys.stdout, sys.stderr
    for command in commands:
        collected = Collected()
        arguments = [argument for argument in command if not argument.startswith("--benchmark-json")]
        code = pytest.main([*arguments, "--collect-only", "-qq", "-p", "no:cacheprovider"], plugins=[collected])
        found.append({"code": int(code), "runs": collected.runs, "on_device": collected.on_device})
    sys.stdout = printed
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1] == "1", json.loads(sys.argv[2]))
