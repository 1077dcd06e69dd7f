"""A convolution in training on a CPU, pass by pass: ours and oneDNN's, in the dtype that bmsn computes in here.

    pytest benchmarks/bench_conv2d.py --benchmark-only

Ours normalises what it loads and measures what it stores, so oneDNN's convolution is timed alone and with the sweeps of
ours that it needs around it. To reach: no row of ours slower than oneDNN's alone, or it is not taken (`MAX_CHANNELS`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peers import interleaved, report
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.ops.conv2d import has_cpp_gradient
from bmsn.ops.conv_bn import batch_statistics
from bmsn.ops.norm_relu import norm_relu
from bmsn.trainer import compute_dtype

SHAPES = [(16, 16, 32), (16, 16, 16), (32, 32, 16), (64, 64, 8)]  # channels in and out, size of the map: ResNet-20's
WIDE = [(16, 32, 16), (32, 64, 8), (64, 64, 32), (128, 128, 8), (128, 128, 16)]
PASSES = ("forward", "data gradient", "weight gradient")


@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=lambda s: "{}-{}-{}px".format(*s))
def test_conv2d(benchmark: BenchmarkFixture, full: bool, shape: tuple[int, int, int], passed: str) -> None:
    i, o, size = shape
    if shape in WIDE and not full:
        pytest.skip("takes minutes with the rest of its kind: --full")
    x, grad = (torch.randn((128, c, size, size), dtype=compute_dtype(torch.device("cpu"))) for c in (i, o))
    weight = torch.randn((o, i, 3, 3), dtype=x.dtype) * (9 * i) ** -0.5
    x, grad, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad, weight))
    if not has_cpp_gradient(x, weight):
        pytest.skip(f"no kernel of ours in {x.dtype} on this CPU")
    calls = _calls(x, weight, grad, passed)
    wanted, found = calls["oneDNN + our sweeps"](), calls["bmsn"]()  # the gate
    precision = 1e-5 if x.dtype == torch.float32 else 2**-5
    torch.testing.assert_close(found, wanted, rtol=precision, atol=precision * wanted.abs().max().item())
    seconds = interleaved(calls, rounds=9)
    benchmark.group = f"conv2d {passed}, {i}->{o}, 128 x {size}x{size}, {x.dtype}"
    report(benchmark, seconds, "bmsn")
    benchmark.pedantic(calls["bmsn"], rounds=3)


def _calls(x: Tensor, weight: Tensor, grad: Tensor, passed: str) -> dict[str, Callable[[], Tensor]]:
    """The convolution of relu(norm(x)): what ours does at once, and what oneDNN leaves to sweeps."""
    ops, stats = torch.ops.bmsn, batch_statistics(x, 1)
    normed = norm_relu(x, stats=stats[None])
    if passed == "forward":

        def sweeps() -> Tensor:
            y = F.conv2d(norm_relu(x, stats=stats[None]), weight, padding=1)
            batch_statistics(y, 1)
            return y

        return {
            "bmsn": lambda: ops.conv_forward(x, weight, stats, False, True)[0],
            "oneDNN + our sweeps": sweeps,
            "oneDNN alone": lambda: F.conv2d(normed, weight, padding=1),
        }

    def theirs(of_x: bool) -> Tensor:
        places = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, ..., groups
        mask = (of_x, not of_x, False)
        return torch.ops.aten.convolution_backward(grad, normed, weight, None, *places, mask)[int(not of_x)]

    if passed == "data gradient":
        through = x.detach().requires_grad_()
        after = norm_relu(through, stats=stats[None])
        return {
            "bmsn": lambda: ops.normed_conv_gradient(grad, weight, x, stats),
            "oneDNN + our sweeps": lambda: torch.autograd.grad(after, through, theirs(True), retain_graph=True)[0],
            "oneDNN alone": lambda: theirs(True),
        }
    return {
        "bmsn": lambda: ops.conv_weight_gradient(x, stats, grad),
        "oneDNN + our sweeps": lambda: theirs(False),  # the sweep was the forward pass's
    }
