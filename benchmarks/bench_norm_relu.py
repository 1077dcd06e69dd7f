"""norm_relu and norm_add_relu, forward and backward, against eager batch_norm (+ add) + ReLU: bfloat16, channels_last.

affine_norm_relu is what networks alone have: with an affine step.

    pytest benchmarks/bench_norm_relu.py --benchmark-only

The shapes are ResNet-20's at batch 128. Bytes moved are those of two sweeps each way: GB/s compares with a copy's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from peers import interleaved, report
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.backend import extension
from bmsn.ops.norm_relu import (
    affine_norm_relu,
    affine_norm_relu_reference,
    norm_add_relu,
    norm_add_relu_reference,
    norm_relu,
    norm_relu_reference,
)

SHAPES = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
# tensors read or written, forward + backward
PASSES = {"norm_relu": 3 + 5, "norm_add_relu": 4 + 7, "affine_norm_relu": 3 + 5, "affine_norm_add_relu": 4 + 7}

pytestmark = pytest.mark.skipif(extension() is None, reason="the reference alone: nothing to compare")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_norm_relu(benchmark: BenchmarkFixture, name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, shortcut, grad = (
        torch.randn(shape, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    x.requires_grad_()
    shortcut.requires_grad_()
    affine = torch.randn((1, 2, shape[1]), generator=generator).requires_grad_()

    def step(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def forward_and_backward() -> Tensor:
            x.grad = shortcut.grad = affine.grad = None
            y = run()
            y.backward(grad)
            return y

        return forward_and_backward

    if name == "norm_relu":
        calls = {"bmsn": step(lambda: norm_relu(x)), "eager": step(lambda: norm_relu_reference(x))}
    elif name.startswith("affine"):
        inputs = (x, affine, shortcut) if "add" in name else (x, affine)
        calls = {
            "bmsn": step(lambda: affine_norm_relu(*inputs)[0]),
            "eager": step(lambda: affine_norm_relu_reference(*inputs)[0]),
        }
    else:
        calls = {
            "bmsn": step(lambda: norm_add_relu(x, shortcut, normalise_shortcut=False)),
            "eager": step(lambda: norm_add_relu_reference(x, shortcut, normalise_shortcut=False)),
        }
    torch.testing.assert_close(calls["bmsn"](), calls["eager"](), rtol=2**-6, atol=2**-5)  # eager rounds norm(x) too
    seconds = interleaved(calls, rounds=40)
    moved = PASSES[name] * x.numel() * x.element_size()
    benchmark.group = f"{name}, forward and backward, {shape}, bfloat16, CPU"
    benchmark.extra_info["bytes moved"] = moved
    benchmark.extra_info["bmsn (GB/s)"] = round(moved / statistics.median(seconds["bmsn"]) / 1e9, 1)
    report(benchmark, seconds, "bmsn")
    benchmark.pedantic(calls["bmsn"], rounds=20)
