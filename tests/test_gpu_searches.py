"""benchmarks/gpu_searches.sh where it cannot run, and what benchmarks/gpu_profile.py reads out of a trace."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from installation import REPOSITORY


def event(name: str, start: float, duration: float, launch: int, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": {"correlation": launch}}


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the module sets two for the profiler
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("gpu_profile").summary


def test_the_line_about_a_trace(summary: Any) -> None:
    events = [
        event("cudaGraphLaunch", 0, 5, launch=1), event("cudaGraphLaunch", 10, 5, launch=2),
        event("cudaGraphLaunch", 50, 5, launch=3),
        event("cudaStreamSynchronize", 20, 30, launch=7),  # a wait between launches
        event("cudaDeviceSynchronize", 60, 500, launch=8),  # the one wait at the end
        event("a", 100, 200, 1, "kernel"), event("b", 250, 150, 1, "kernel"),  # overlap: 100 to 400
        event("c", 400, 100, 2, "kernel"), event("order", 510, 10, 9, "gpu_memcpy"),  # no graph's
        event("d", 600, 500, 3, "kernel"), event("losses", 1200, 10, 10, "gpu_memcpy"),  # after the last graph
        {"ph": "M", "name": "process_name", "args": {}},
    ]  # fmt: skip
    assert summary(events) == (
        "3 graphs in 1.000 ms: GPU busy 91.0 % of the time, longest gap between two graphs 100.0 us, "
        "the host waited 1 times (0.030 ms) before its last launch"
    )


def test_a_trace_without_graphs_is_none(summary: Any) -> None:
    with pytest.raises(ValueError, match="2 launches of graphs, 1 with work"):
        summary([event("cudaGraphLaunch", 0, 1, 1), event("cudaGraphLaunch", 1, 1, 2), event("a", 5, 1, 2, "kernel")])


@pytest.mark.parametrize(
    "arguments", [[], ["data"], ["data", "out", "0"], ["data", "out", "soon"], ["a", "b", "1", "c"]]
)
def test_wrong_use(arguments: list[str], tmp_path: Path) -> None:
    assert run(arguments, tmp_path) == (2, "usage: benchmarks/gpu_searches.sh DATA OUTDIR [MINUTES]\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run for minutes")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, said = run(["data", str(tmp_path / "out")], tmp_path)
    assert code == 2
    assert said.startswith("no GPU: ")


def run(arguments: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks" / "gpu_searches.sh"), *arguments],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    return done.returncode, done.stderr
