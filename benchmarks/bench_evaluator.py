"""Scoring all 36 architectures of ResNet-20 on one batch of 256 images: one pass against one by one, on the CPU.

To reach with plain torch ops in bfloat16: 8 times one by one in float32, NCHW, eager (the authors' way). The floor is
the convolutions of the plan alone, on maps that are there, as many states at a time as is fastest; at most 1.6 of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peers import EagerNet, interleaved, report
from pytest_benchmark.fixture import BenchmarkFixture

from bmsn.evaluator import all_pairs, make_plan, score_architectures, score_one_by_one
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype


def bare_convolutions(nets: SupernetMixture, images: torch.Tensor, states: int) -> tuple[Callable[[], None], int]:
    """The plan's convolutions and nothing else, `states` at a time, and their multiply-accumulates."""
    plan, weights = make_plan(nets, images, all_pairs(nets)), nets.weights(nets.arena.detach()[0], images.dtype)
    calls, macs = [], 0
    for wave in plan.waves:
        layer, w = nets.space.layers[wave.layer], weights.layers[wave.layer]
        _, height, width = plan.map_shape(wave.layer, wave.num_pools)
        for start in range(0, len(wave.states), states):
            num_images = len(images) * min(states, len(wave.states) - start)
            for conv in layer.convolutions:
                kernel = w[conv.name]
                x = torch.randn(num_images, height, width, kernel.shape[1]).to(images.dtype).permute(0, 3, 1, 2)
                calls.append((x, kernel, kernel.shape[2] // 2))
                macs += num_images * height * width * kernel.numel()

    @torch.no_grad()
    def run() -> None:
        for x, kernel, padding in calls:
            F.conv2d(x, kernel, padding=padding)

    return run, macs


@pytest.mark.benchmark(group="scoring 36 architectures of ResNet-20, 256 images, CPU")
def test_scoring(benchmark: BenchmarkFixture) -> None:
    space = SearchSpace.named("resnet20-cifar10")
    nets = SupernetMixture(space, 1, 10, generator=torch.Generator().manual_seed(0))
    dtype = compute_dtype(torch.device("cpu"))
    images, labels = torch.randn(256, 3, 32, 32), torch.randint(10, (256,))
    fast = images.to(dtype).contiguous(memory_format=torch.channels_last)
    authors = [EagerNet(nets, architecture) for architecture in space]
    low = [EagerNet(nets, architecture).to(dtype).to(memory_format=torch.channels_last) for architecture in space]

    @torch.no_grad()
    def one_by_one(networks: list[EagerNet], batch: torch.Tensor) -> list[int]:
        return [int((net(batch).argmax(1) == labels).sum()) for net in networks]

    # The gate: in float32 the plan, our one by one and the peer agree but for rounding ties.
    expected = one_by_one(authors, images)
    for scorer in (score_architectures, score_one_by_one):
        counts = scorer(nets, images, labels).correct.tolist()
        assert max(abs(a - b) for a, b in zip(counts, expected, strict=True)) <= 1
    calls = {
        "one pass": lambda: score_architectures(nets, fast, labels),
        "one pass, reference ops": lambda: score_architectures(nets, fast, labels, backend="reference"),
        "one by one, the authors' way": lambda: one_by_one(authors, images),
        "one by one, eager in the same dtype": lambda: one_by_one(low, fast),
    }
    bare = {states: bare_convolutions(nets, fast, states) for states in (1, 2, 4, 8)}
    timed = interleaved({str(states): run for states, (run, _) in bare.items()}, rounds=2)
    best = min(bare, key=lambda states: statistics.median(timed[str(states)]))
    calls[f"bare convolutions, {best} states at a time"] = bare[best][0]
    seconds = interleaved(calls, rounds=3)
    floor = statistics.median(seconds[f"bare convolutions, {best} states at a time"])
    benchmark.extra_info["bare convolutions (GFLOP/s)"] = round(2 * bare[best][1] / floor / 1e9)
    report(benchmark, seconds, "one pass")
    benchmark.pedantic(calls["one pass"], rounds=3)
