"""head on stacked states, against eager mean + linear + argmax + count; bfloat16 NHWC maps, float32 weights.

    pytest benchmarks/bench_head.py --benchmark-only

The floor is the maps read once at the speed of a large copy in the same process.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import interleaved, report, report_floor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.ops.head import head

SHAPES = [(64, 8, 10), (2048, 4, 100)]  # channels, size, classes: the ends of ResNet-20 and ResNet-50


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "{}-{}px-{}".format(*s))
def test_head(benchmark: BenchmarkFixture, device: torch.device, shape: tuple[int, ...]) -> None:
    gpu = device.type == "cuda"
    groups, images, (channels, size, classes) = 36 if gpu else 4, 256 if gpu else 128, shape
    x = torch.rand(groups * images, channels, size, size, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(1, classes, channels, device=device)
    weight -= weight.mean(2, keepdim=True)  # else the class with the largest sum is predicted everywhere
    bias = torch.randn(1, classes, device=device) * channels**-0.5
    labels = torch.randint(classes, (images,), device=device)

    def eager() -> Tensor:
        logits = F.linear(x.mean((2, 3), dtype=torch.float32), weight[0], bias[0])
        return (logits.argmax(1).view(groups, images) == labels).sum(1)

    calls = {"bmsn": lambda: head(x, labels, weight, bias, groups), "eager": eager}
    with torch.no_grad():
        found, wanted = calls["bmsn"](), eager()  # the gate
        assert (found - wanted).abs().max() <= 1
        assert found.sum() > 0
        seconds = interleaved(calls, rounds=10 if gpu else 7, repeats=10 if gpu else 3)
        benchmark.group = f"head {channels}->{classes}, {groups} groups of {images} x {size}x{size}, {device.type}"
        moved = x.nbytes + weight.nbytes
        report_floor(benchmark, seconds["bmsn"], device, bytes_moved=moved, flop=2 * len(x) * weight.numel())
        report(benchmark, seconds, "bmsn")
        benchmark.pedantic(calls["bmsn"], rounds=5)
