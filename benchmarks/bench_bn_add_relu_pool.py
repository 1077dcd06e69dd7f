"""bn_add_relu_pool on stacked states, against eager batch_norm + add + ReLU (+ max-pool); bfloat16 NHWC.

    pytest benchmarks/bench_bn_add_relu_pool.py --benchmark-only

The op has its statistics already, the peer takes them in the same call: its two extra reads are not its fault, and the
row says what they cost together. The floor is each map once at the speed of a large copy in the same process.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import interleaved, report, report_floor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.conv_bn import batch_statistics
from bmsn.ops.norm_relu import EPS

SHAPES = [(16, 32), (64, 8)]  # channels, size: the ends of ResNet-20


@pytest.mark.parametrize("outputs", ["full", "pooled", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "{}-{}px".format(*s))
def test_bn_add_relu_pool(
    benchmark: BenchmarkFixture, device: torch.device, shape: tuple[int, int], outputs: str
) -> None:
    gpu = device.type == "cuda"
    groups, images, (channels, size) = 16 if gpu else 2, 256 if gpu else 128, shape
    shape_nchw = (groups * images, channels, size, size)
    y, shortcut = (torch.randn(shape_nchw, device=device).bfloat16() for _ in range(2))
    y, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (y, shortcut))
    stats = batch_statistics(y, groups)
    full = torch.empty_like(y) if outputs != "pooled" else None
    pooled = torch.empty_like(y[:, :, ::2, ::2]) if outputs != "full" else None

    def eager() -> list[Tensor]:
        parts = [F.batch_norm(part, None, None, training=True, eps=EPS) for part in y.chunk(groups)]
        z = F.relu(torch.cat(parts) + shortcut)
        return ([] if full is None else [z]) + ([] if pooled is None else [F.max_pool2d(z, 2)])

    def ours() -> None:
        bn_add_relu_pool(y, stats, shortcut, full=full, pooled=pooled)

    calls = {"bmsn": ours, "eager": eager}
    with torch.no_grad():
        ours()  # the gate
        for found, wanted in zip([t for t in (full, pooled) if t is not None], eager(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-5)  # eager rounds norm(y) too
        seconds = interleaved(calls, rounds=10 if gpu else 7, repeats=10 if gpu else 3)
        benchmark.group = (
            f"bn_add_relu_pool {channels}, {groups} groups of {images} x {size}x{size}, writes {outputs}, {device.type}"
        )
        moved = sum(t.nbytes for t in (y, shortcut, full, pooled) if t is not None)
        report_floor(benchmark, seconds["bmsn"], device, bytes_moved=moved)
        report(benchmark, seconds, "bmsn")
        benchmark.pedantic(ours, rounds=5)
