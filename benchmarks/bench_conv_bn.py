"""conv_bn on stacked states: ours, plain torch, and the library's convolution between sweeps of ours.

All in NHWC order and in the dtype that bmsn computes in on this machine.

    pytest benchmarks/bench_conv_bn.py --benchmark-only

A call normalises + ReLUs its input, convolves, and measures its output: what stands between two convolutions counts
once. The floor is the larger of two times: every map read and written once at a copy's speed, and the arithmetic at
the speed of a large product, both measured in the same process; ours in float32 on a CPU, Winograd's, has fewer
products and may be below it. The row `library conv + our sweeps` says for each shape whether cuDNN's or oneDNN's
convolution would win over the fused kernel.

batch_statistics alone reads each map once; its floor is that read, at a copy's speed. Eager's are rounded to bfloat16.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from peers import interleaved, report, report_floor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.conv_bn import batch_statistics, conv_bn
from bmsn.ops.norm_relu import EPS
from bmsn.trainer import compute_dtype

# channels in and out, size of the map, kernel: ResNet-20's three widths; ResNet-50's wide ends (GPU, or --full)
SHAPES = [(16, 16, 32, 3), (32, 32, 16, 3), (64, 64, 8, 3)]
WIDE = [(16, 16, 8, 3), (64, 64, 32, 3), (64, 256, 32, 1), (512, 512, 4, 3), (512, 2048, 4, 1)]


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=lambda s: "{}-{}-{}px-{}x{}".format(*s, s[3]))
def test_conv_bn(benchmark: BenchmarkFixture, device: torch.device, full: bool, shape: tuple[int, ...]) -> None:
    gpu = device.type == "cuda"
    if shape in WIDE and not (gpu or full):
        pytest.skip("takes minutes with the rest of its kind: --full")
    groups, images = (16, 256) if gpu else (2, 128)
    i, o, size, k = shape
    x = torch.randn((groups * images, i, size, size), device=device).to(compute_dtype(device))
    x = x.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn((1, o, k, k, i), device=device) * (i * k * k) ** -0.5).to(x.dtype)
    weight = weight.permute(0, 1, 4, 2, 3)
    stats = batch_statistics(x, groups)
    scratch = x.clone()

    def eager() -> Tensor:
        normed = [F.relu(F.batch_norm(part, None, None, training=True, eps=EPS)) for part in x.chunk(groups)]
        return F.conv2d(torch.cat(normed), weight[0], padding=k // 2)

    def sweeps() -> Tensor:
        bn_add_relu_pool(x, stats, full=scratch)
        y = F.conv2d(scratch, weight[0], padding=k // 2)
        batch_statistics(y, groups)
        return y

    calls = {
        "bmsn": lambda: conv_bn(x, weight, groups, stats=stats),
        "eager": eager,
        "library conv + our sweeps": sweeps,
        "library conv alone": lambda: F.conv2d(x, weight[0], padding=k // 2),
    }
    with torch.no_grad():
        found = conv_bn(x, weight, groups, stats=stats)  # the gate
        torch.testing.assert_close(found.y, eager(), rtol=2**-5, atol=2**-4)
        torch.testing.assert_close(found.stats, batch_statistics(eager(), groups), rtol=0.02, atol=0.01)
        seconds = interleaved(calls, rounds=10 if gpu else 7, repeats=10 if gpu else 3)
        benchmark.group = (
            f"conv_bn {i}->{o} {k}x{k}, {groups} groups of {images} x {size}x{size}, {x.dtype}, {device.type}"
        )
        pixels = groups * images * size * size
        moved = x.element_size() * (pixels * (i + o) + weight.numel())
        report_floor(benchmark, seconds["bmsn"], device, bytes_moved=moved, flop=2 * pixels * weight.numel())
        report(benchmark, seconds, "bmsn")
        benchmark.pedantic(calls["bmsn"], rounds=5)


def test_ours_against_the_library(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints for kernel and dtype from which width on the library is faster: `LIBRARY_FROM`."""
    if device.type != "cuda":
        pytest.skip("on a GPU: it is for Triton's choice")
    rows, groups, images, size = [], 16, 64, 16
    for kernel, dtype in product((3, 1), (torch.bfloat16, torch.float32)):
        for width in (16, 32, 64, 128, 256, 512):
            x = torch.randn((groups * images, width, size, size), device=device).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            rows_of = torch.randn((1, width, kernel, kernel, width), device=device) * (width * kernel**2) ** -0.5
            weight, stats = rows_of.to(dtype).permute(0, 1, 4, 2, 3), batch_statistics(x, groups)

            def call(choice: str, x: Tensor = x, weight: Tensor = weight, stats: Tensor = stats) -> Tensor:
                monkeypatch.setenv("BMSN_CONVOLUTION", choice)
                return conv_bn(x, weight, groups, stats=stats, backend="triton").y

            torch.testing.assert_close(call("ours"), call("library"), rtol=2**-5, atol=2**-4)  # the gate
            seconds = interleaved({c: partial(call, c) for c in ("ours", "library")}, rounds=5, repeats=10)
            ours, library = (statistics.median(seconds[choice]) for choice in ("ours", "library"))
            rows.append(f"{kernel}x{kernel} {dtype} {width:>4} {ours * 1e6:>9.1f} {library * 1e6:>9.1f} us")
            rows[-1] += f"  {'library' if library < ours else 'ours'}"
    with capsys.disabled():
        print("\nkernel, dtype, channels in and out, ours, library's", *rows, sep="\n")


@pytest.mark.parametrize("shape", [(16, 32), (64, 8)], ids=lambda s: "{}-{}px".format(*s))
def test_batch_statistics(benchmark: BenchmarkFixture, device: torch.device, shape: tuple[int, int]) -> None:
    gpu = device.type == "cuda"
    groups, images, (channels, size) = 16 if gpu else 2, 256 if gpu else 128, shape
    x = torch.randn((groups * images, channels, size, size), device=device).bfloat16() + 3
    x = x.contiguous(memory_format=torch.channels_last)

    def eager(x: Tensor = x) -> Tensor:
        found = [torch.var_mean(part, (0, 2, 3), correction=0) for part in x.chunk(groups)]
        variance, mean = (torch.stack(parts) for parts in zip(*found, strict=True))
        return torch.stack([mean, (variance + EPS).rsqrt()])

    calls = {"bmsn": lambda: batch_statistics(x, groups), "eager": eager}
    exact = eager(x.double())  # the gate: float32's precision
    torch.testing.assert_close(calls["bmsn"]().double(), exact, rtol=1e-5, atol=0)
    seconds = interleaved(calls, rounds=10 if gpu else 7, repeats=10 if gpu else 3)
    benchmark.group = f"batch_statistics {channels}, {groups} groups of {images} x {size}x{size}, {device.type}"
    report_floor(benchmark, seconds["bmsn"], device, bytes_moved=x.nbytes)
    report(benchmark, seconds, "bmsn")
    benchmark.pedantic(calls["bmsn"], rounds=5)
