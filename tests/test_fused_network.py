"""FusedNetwork against the plain network it stands for: logits, gradients, running statistics, after several steps."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmsn.fused_network import FusedNetwork
from bmsn.network import build_path_network
from bmsn.paths import ResolutionPath, architecture_path
from bmsn.space import SearchSpace
from bmsn.trainer import arena_step
from global_state import unchanged
from oracles import assert_no_worse

SETTINGS = dict(momentum=0.9, weight_decay=1e-3)
# What differs in a network: block, stem, how it pools, a projection where it strides; paths that jump and that go up.
CASES: list[tuple[str, str, str]] = [
    ("resnet14-cifar10", "max", "3-2-2"),
    ("resnet14-cifar10", "avg", "1-1-5"),
    ("resnet18-cifar10", "stride", "3-2-2-2"),
    ("resnet50-food101", "stride", "3-4-6-3"),
    ("resnet18-imagenet", "max", "2-2-2-2"),
    ("resnet14-cifar10", "max", "0-2-2-1-0-0-2"),
    ("resnet14-cifar10", "avg", "0-1-0-2-0-2-1"),
]


def make_case(
    name: str, pool: str, candidate: str, dtype: torch.dtype
) -> tuple[SearchSpace, ResolutionPath, nn.Module]:
    """A small network whose BatchNorms have weights, biases and statistics of their own, one weight 0."""
    # Not narrower: with fewer than 16 channels oneDNN's float32 weight gradient of a strided 1x1 convolution writes
    # past its memory on two threads (torch 2.13).
    space = SearchSpace.named(name, width=0.25, pool=pool)  # type: ignore[arg-type]
    if candidate.startswith("0"):
        path = ResolutionPath(tuple(map(int, candidate.split("-"))))
    else:
        path = architecture_path(space, space.find(candidate))
    torch.manual_seed(5)
    network = build_path_network(space, path, num_classes=4).to(dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for parameter in (*module.parameters(), module.running_mean):
                nn.init.normal_(parameter, 0.3)
            module.weight.data[0] = 0
    return space, path, network.to(memory_format=torch.channels_last)


def make_batches(space: SearchSpace, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator, size = torch.Generator().manual_seed(6), 2 * space.total_stride
    return [
        (
            torch.randn(5, 3, size, size, generator=generator, dtype=dtype).to(memory_format=torch.channels_last),
            torch.randint(4, (5,), generator=generator),
        )
        for _ in range(3)
    ]


def train_plain(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimiser, losses = torch.optim.SGD(network.train().parameters(), lr=0.05, **SETTINGS), []
    for images, labels in batches:
        optimiser.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def train_fused(fused: FusedNetwork, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    velocity, losses = torch.zeros_like(fused.arena), []
    for images, labels in batches:
        loss, _ = arena_step(
            fused.arena, velocity, None, torch.tensor(0), fused.num_convs, partial(fused.forward, images=images),
            images.dtype, labels, lr=torch.tensor(0.05, dtype=images.dtype), **SETTINGS,
        )  # fmt: skip
        losses.append(loss.item())
    return losses


def trained_plain(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[float], nn.Module]:
    plain = copy.deepcopy(network)
    return train_plain(plain, batches), plain


@pytest.mark.parametrize(("name", "pool", "candidate"), CASES)
def test_it_trains_as_the_plain_network_under_torchs_sgd(name: str, pool: str, candidate: str) -> None:
    space, path, network = make_case(name, pool, candidate, torch.float64)
    batches = make_batches(space, torch.float64)
    plain_losses, plain = trained_plain(network, batches)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with unchanged():
        fused = FusedNetwork(space, path, network)
    losses = train_fused(fused, batches)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())  # till it is asked for
    fused.write_back(len(batches))
    assert losses == pytest.approx(plain_losses, rel=1e-9)
    for (key, value), wanted in zip(network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "pool", "candidate"), CASES)
def test_float32_is_no_worse_than_the_plain_network_in_float32(name: str, pool: str, candidate: str) -> None:
    """One step; what the compiled ops compute, against the plain network in float64."""
    space, path, wide = make_case(name, pool, candidate, torch.float64)
    batches = make_batches(space, torch.float64)[:1]
    narrow = copy.deepcopy(wide).float()
    narrow_batches = [(images.float(), labels) for images, labels in batches]
    fused = FusedNetwork(space, path, narrow)
    train_fused(fused, narrow_batches)
    _, eager = trained_plain(narrow, narrow_batches)
    _, oracle = trained_plain(wide, batches)
    fused.write_back(1)
    parts = [torch.cat([t.flatten() for t in net.parameters()]) for net in (narrow, eager, oracle)]
    assert_no_worse(parts[0], eager=parts[1], oracle=parts[2], factor=4)
    buffers = [[b for b in net.buffers() if b.is_floating_point()] for net in (narrow, eager, oracle)]
    found, plain, exact = (torch.cat(values) for values in buffers)
    assert_no_worse(found, eager=plain, oracle=exact, factor=4)


def test_bfloat16_stays_near_the_same_in_float32() -> None:
    """One step; the working copies are what the weights round to."""
    space, path, network = make_case("resnet14-cifar10", "max", "3-2-2", torch.float32)
    ((images, labels), *_) = make_batches(space, torch.float32)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        fused = FusedNetwork(space, path, copy.deepcopy(network))
        copies = fused.arena.bfloat16() if dtype == torch.bfloat16 else None
        loss, _ = arena_step(
            fused.arena, torch.zeros_like(fused.arena), copies, torch.tensor(0), fused.num_convs,
            partial(fused.forward, images=images.to(dtype)), dtype, labels, lr=torch.tensor(0.05), **SETTINGS,
        )  # fmt: skip
        assert copies is None or torch.equal(copies, fused.arena.bfloat16())
        found.append((loss, fused))
    (exact, wide), (rounded, low) = found
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)
    torch.testing.assert_close(low.arena, wide.arena, rtol=0.0, atol=0.1)
