"""Scoring all 36 architectures of ResNet-20 on one batch of 256 images: one pass against one by one, on the CPU.

To reach with plain torch ops in bfloat16: 8 times one by one in float32, NCHW, eager (the authors' way).
"""

from __future__ import annotations

import pytest
import torch
from peers import EagerNet, interleaved, report
from pytest_benchmark.fixture import BenchmarkFixture

from bmsn.evaluator import score_architectures, score_one_by_one
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype


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
    report(benchmark, interleaved(calls, rounds=3), "one pass")
    benchmark.pedantic(calls["one pass"], rounds=3)
