"""conv_scale on stacked states: ours against eager conv * scale + shift + shortcut and ReLU; NHWC, in bmsn's dtype.

    pytest benchmarks/bench_conv_scale.py --benchmark-only

This is a block's last convolution with frozen statistics. The floor is the larger of two times: every map read or
written once at a copy's speed, and the arithmetic at the speed of a large product, both measured in the same process.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench_conv_bn import SHAPES, WIDE
from peers import interleaved, report, report_floor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.ops.conv_scale import conv_scale
from bmsn.trainer import compute_dtype


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=lambda s: "{}-{}-{}px-{}x{}".format(*s, s[3]))
def test_conv_scale(benchmark: BenchmarkFixture, device: torch.device, full: bool, shape: tuple[int, ...]) -> None:
    gpu = device.type == "cuda"
    if shape in WIDE and not (gpu or full):
        pytest.skip("takes minutes with the rest of its kind: --full")
    groups, images = (16, 256) if gpu else (2, 128)
    i, o, size, k = shape
    dtype = compute_dtype(device)
    x, shortcut = (torch.randn((groups * images, c, size, size), device=device).to(dtype) for c in (i, o))
    x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    weight = (torch.randn((1, o, k, k, i), device=device) * (i * k * k) ** -0.5).to(dtype).permute(0, 1, 4, 2, 3)
    scale, shift = torch.rand((groups, o), device=device) + 0.5, torch.randn((groups, o), device=device)
    into = torch.empty_like(shortcut)  # as in a plan, which writes to memory that is there

    def ours() -> Tensor:
        return conv_scale(x, weight, groups, scale=scale, shift=shift, relu=True, shortcut=shortcut, into=into)

    def composed(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, weight, padding=k // 2) * scale + shift + shortcut)

    per_image = [t.repeat_interleave(images, 0)[:, :, None, None] for t in (scale, shift)]
    low = [t.to(dtype) for t in per_image]
    first = [t[:images].double() for t in (x, *per_image, shortcut)]  # one group is enough for the gate

    def eager() -> Tensor:
        return composed(x, weight[0], *low, shortcut)

    calls = {
        "bmsn": ours,
        "eager": eager,
        "library conv alone": lambda: F.conv2d(x, weight[0], padding=k // 2),
    }
    with torch.no_grad():
        exact = composed(first[0], weight[0].double(), *first[1:])  # the gate: at most twice eager's error
        errors = [float((call()[:images] - exact).abs().max()) for call in (ours, eager)]
        assert errors[0] <= 2 * errors[1]
        benchmark.extra_info["largest error"] = "{:.2g}, eager {:.2g}".format(*errors)
        seconds = interleaved(calls, rounds=10 if gpu else 7, repeats=10 if gpu else 3)
        benchmark.group = (
            f"conv_scale {i}->{o} {k}x{k}, {groups} groups of {images} x {size}x{size}, {dtype}, {device.type}"
        )
        pixels = groups * images * size * size
        moved = x.element_size() * (pixels * (i + 2 * o) + weight.numel())
        report_floor(benchmark, seconds["bmsn"], device, bytes_moved=moved, flop=2 * pixels * weight.numel())
        report(benchmark, seconds, "bmsn")
        benchmark.pedantic(ours, rounds=5)
