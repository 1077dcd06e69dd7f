"""One training step of ResNet-20, batch 128, on the CPU: ours, the authors' way, and eager in our dtype and layout.

To reach: 3 times the authors' way (float32, NCHW, eager; per-image transforms excluded). Freed memory is kept, as the
search does it; it serves all sides.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import EagerNet, interleaved, report
from pytest_benchmark.fixture import BenchmarkFixture

from bmsn.memory import keep_freed_memory
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype, train_step

BATCH = 128
SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)


def eager_step(net: EagerNet, images: torch.Tensor, labels: torch.Tensor) -> object:
    optimiser = torch.optim.SGD(net.parameters(), **SETTINGS)

    def step() -> float:
        optimiser.zero_grad()
        loss = F.cross_entropy(net(images).float(), labels)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


@pytest.mark.benchmark(group="training step, ResNet-20, batch 128, CPU")
@pytest.mark.parametrize("architecture", ["4,3,3", "1,1,8", "8,1,1"])
def test_training_step(benchmark: BenchmarkFixture, architecture: str) -> None:
    keep_freed_memory()
    space = SearchSpace.named("resnet20-cifar10")
    nets = SupernetMixture(space, 1, 10, generator=torch.Generator().manual_seed(0))
    chosen, dtype = space.find(architecture), compute_dtype(torch.device("cpu"))
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    fast = images.to(dtype).contiguous(memory_format=torch.channels_last)
    velocity = torch.zeros_like(nets.arena.detach())
    authors = eager_step(EagerNet(nets, chosen), images, labels)
    low = EagerNet(nets, chosen).to(dtype).to(memory_format=torch.channels_last)

    def ours() -> float:
        return train_step(nets, velocity, chosen, 0, fast, labels, **SETTINGS)

    # The gate: the same loss from the same weights, to bfloat16's precision, and the same after three steps.
    assert [ours() for _ in range(3)] == pytest.approx([authors() for _ in range(3)], rel=0.05)
    calls = {"ours": ours, "the authors' way": authors, "eager in the same dtype": eager_step(low, fast, labels)}
    report(benchmark, interleaved(calls, rounds=8), "ours")
    benchmark.pedantic(ours, rounds=5)
