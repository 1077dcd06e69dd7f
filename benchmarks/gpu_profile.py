"""Does the host ever wait while a search runs as CUDA graphs? A profile of 50 steps after warm-up.

    python benchmarks/gpu_profile.py TRACE.json [--batch-size 256]

ResNet-20, four supernets, random images of CIFAR-10's number; architectures in turn, so the first 36 steps record all
graphs; an epoch ends inside the 50. TRACE.json is a Chrome trace (chrome://tracing, ui.perfetto.dev). The line printed:
the share of the time in which the GPU is busy, from the first graph's start on it to the last one's end; the longest
gap between two graphs there; and how often, how long the host waited between its first launch of a graph and its last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}  # CUDA graphs crash where CUPTI starts anew

import torch
from random_search import random_search
from torch.profiler import profile

from bmsn.cuda_graphs import CudaGraphs
from bmsn.engine import Engine
from bmsn.space import SearchSpace

WARM_UP, STEPS = 75, 50
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def summary(events: Sequence[dict[str, Any]]) -> str:
    """The line about the events of a Chrome trace (microseconds). ValueError: without two graphs on the GPU."""
    whole = [event for event in events if event.get("ph") == "X"]
    launches = [event for event in whole if event["name"] == "cudaGraphLaunch"]
    spans: dict[int, tuple[float, float]] = {launch["args"]["correlation"]: (0.0, 0.0) for launch in launches}
    work = sorted((e["ts"], e["ts"] + e["dur"], e["args"].get("correlation")) for e in whole if e.get("cat") in _ON_GPU)
    for start, end, launch in work:
        if launch in spans:
            first, last = spans[launch]
            spans[launch] = (first or start, max(last, end))
    graphs = sorted(span for span in spans.values() if span[1])
    if len(graphs) < 2:
        raise ValueError(f"the trace has {len(launches)} launches of graphs, {len(graphs)} with work on the GPU")
    begin, finish = graphs[0][0], max(end for _, end in graphs)
    busy, reached = 0.0, begin
    for start, end, _ in work:
        if begin <= start < finish:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
    gap = max(after[0] - before[1] for before, after in itertools.pairwise(graphs))
    enqueued = min(e["ts"] for e in launches), max(e["ts"] for e in launches)
    waits = [e["dur"] for e in whole if e["name"] in _WAITS and enqueued[0] <= e["ts"] < enqueued[1]]
    return (
        f"{len(graphs)} graphs in {(finish - begin) / 1e3:.3f} ms: GPU busy {100 * busy / (finish - begin):.1f} % of "
        f"the time, longest gap between two graphs {gap:.1f} us, the host waited {len(waits)} times "
        f"({sum(waits) / 1e3:.3f} ms) before its last launch"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("trace", type=Path, help="Chrome trace to write")
    parser.add_argument("--batch-size", type=int, default=256)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    with profile():  # sets the profiler up before a graph is recorded
        torch.zeros(1, device=device).cpu()
    architectures = list(SearchSpace.named("resnet20-cifar10"))
    drawn = [step % len(architectures) for step in range(WARM_UP + STEPS)]
    engine = Engine(random_search(drawn, given.batch_size, device), architectures, CudaGraphs(device))
    engine.run(0, WARM_UP)
    with profile() as profiled:
        engine.run(WARM_UP, WARM_UP + STEPS)
    if not engine.uses_graphs:
        print("too little memory for graphs", file=sys.stderr)
        return 1
    profiled.export_chrome_trace(str(given.trace))
    print(summary(json.loads(given.trace.read_text())["traceEvents"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
