"""One training step of ResNet-20: ours against the authors' way, eager, compiled, and its bare convolutions; its parts.

    pytest benchmarks/bench_training.py --benchmark-only            # batch 128 (256 on a GPU), one of three compiled
    pytest benchmarks/bench_training.py --benchmark-only --full     # batches of 128, 256 and 1024; all compiled

To reach on a CPU: 3 times the authors' way (float32, NCHW, eager; per-image transforms excluded), at batch 256 with AMX
4.5 times, and 1.6 times the bare convolutions. Freed memory is kept, as the search does it; it serves all sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import EagerNet, interleaved, report
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bmsn.data import BatchStream, normalisation, normalisation_table
from bmsn.fused_network import FusedNetwork
from bmsn.memory import keep_freed_memory
from bmsn.mixture import BalancedMixture
from bmsn.network import SupernetMixture, build_path_network
from bmsn.ops.cross_entropy import cross_entropy
from bmsn.ops.sgd import sgd
from bmsn.paths import architecture_path
from bmsn.space import Architecture, SearchSpace
from bmsn.trainer import arena_step, batch_accuracy, compute_dtype, train_step, working_copies

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
ARCHITECTURES = ("4,3,3", "1,1,8", "8,1,1")  # the default one; the earliest poolings; the latest
SIZE = 32


def make_nets(device: torch.device) -> SupernetMixture:
    space = SearchSpace.named("resnet20-cifar10")
    return SupernetMixture(space, 1, 10, generator=torch.Generator().manual_seed(0)).to(device)


def make_batch(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(batch, 3, SIZE, SIZE, generator=generator), torch.randint(10, (batch,))
    return images.to(device), labels.to(device)


def step_of(net: nn.Module, run: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """A step of torch's own: `run` is `net`, or `net` compiled."""
    optimiser = torch.optim.SGD(net.parameters(), **SETTINGS)

    def step() -> float:
        optimiser.zero_grad()
        loss = F.cross_entropy(run(images).float(), labels)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def bare_convolutions(nets: SupernetMixture, architecture: Architecture, images: Tensor) -> Callable[[], None]:
    """Forward, data-gradient and weight-gradient convolutions of a step alone, on maps that are there."""
    size, calls, like = SIZE, [], {"dtype": images.dtype, "device": images.device}
    for index, layer in enumerate(nets.space.layers):
        size //= 2 if index in architecture.pool_positions else 1
        for conv in layer.convolutions:
            channels = (conv.in_channels or images.shape[1], conv.out_channels)
            shapes = [(len(images), c, size, size) for c in channels]
            weight = (channels[1], channels[0], conv.kernel, conv.kernel)
            maps = (torch.randn(shape, **like) for shape in (*shapes, weight))
            x, grad, w = (t.contiguous(memory_format=torch.channels_last) for t in maps)
            padding, wanted = conv.kernel // 2, (index > 0, True, False)
            calls.append(partial(F.conv2d, x, w, padding=padding))
            rest = (None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, wanted)
            calls.append(partial(torch.ops.aten.convolution_backward, grad, x, w, *rest))

    def run() -> None:
        for call in calls:
            call()
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("batch", [128, 256, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_step(
    benchmark: BenchmarkFixture, architecture: str, batch: int, device: torch.device, full: bool
) -> None:
    if batch != (256 if device.type == "cuda" else 128) and not full:
        pytest.skip("takes minutes: --full")
    keep_freed_memory()
    nets = make_nets(device)
    chosen, dtype = nets.space.find(architecture), compute_dtype(device)
    images, labels = make_batch(batch, device)
    fast = images.to(dtype).contiguous(memory_format=torch.channels_last)
    velocity, copies = torch.zeros_like(nets.arena.detach()), working_copies(nets, dtype)

    authors, low, to_compile = (EagerNet(nets, chosen).to(device) for _ in range(3))
    low, to_compile = (net.to(dtype).to(memory_format=torch.channels_last) for net in (low, to_compile))

    def ours() -> float:
        return train_step(nets, velocity, chosen, 0, fast, labels, **SETTINGS, copies=copies)

    calls = {
        "ours": ours,
        "the authors' way": step_of(authors, authors, images, labels),
        "eager, our dtype, channels_last": step_of(low, low, fast, labels),
        "bare convolutions": bare_convolutions(nets, chosen, fast),
    }
    if full or architecture == ARCHITECTURES[0]:  # half a minute to compile
        compiled = torch.compile(to_compile, mode="reduce-overhead" if device.type == "cuda" else None)
        calls["compiled, our dtype, channels_last"] = step_of(to_compile, compiled, fast, labels)

    # The gate: the same losses from the same weights, to bfloat16's precision, over three steps.
    losses = {name: [call() for _ in range(3)] for name, call in calls.items() if name != "bare convolutions"}
    for name, found in losses.items():
        assert found == pytest.approx(losses["the authors' way"], rel=0.05), name
    benchmark.group = f"training step, ResNet-20 {architecture}, batch {batch}, {device.type}"
    report(benchmark, interleaved(calls, rounds=5), "ours")
    benchmark.pedantic(ours, rounds=3)


@pytest.mark.parametrize(("name", "architecture"), [("resnet14-cifar10", "3,2,2"), ("resnet20-cifar10", "4,3,3")])
def test_step_of_a_network_alone(
    benchmark: BenchmarkFixture, name: str, architecture: str, device: torch.device
) -> None:
    """What retraining and ground truth do at each step, against the plain network under autocast and torch's SGD."""
    keep_freed_memory()
    space, batch, dtype = SearchSpace.named(name), 128, compute_dtype(device)
    path = architecture_path(space, space.find(architecture))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_path_network(space, path).to(device, memory_format=torch.channels_last)
    images, labels = make_batch(batch, device)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    fused = FusedNetwork(space, path, network)
    velocity, copies = torch.zeros_like(fused.arena), fused.arena.to(dtype) if dtype == torch.bfloat16 else None
    row, lr = torch.tensor(0, device=device), torch.tensor(SETTINGS["lr"], device=device)
    optimiser = torch.optim.SGD(network.parameters(), **SETTINGS)

    def ours() -> float:
        forward = partial(fused.forward, images=images)
        loss, _ = arena_step(
            fused.arena, velocity, copies, row, fused.num_convs, forward, dtype, labels,
            lr=lr, momentum=SETTINGS["momentum"], weight_decay=SETTINGS["weight_decay"],
        )  # fmt: skip
        return loss.item()

    def eager() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    calls = {"ours": ours, "eager, autocast, channels_last": eager}
    ours_first, eagers = ([call() for _ in range(3)] for call in calls.values())
    assert ours_first == pytest.approx(eagers, rel=0.05)
    benchmark.group = f"step of a network alone, {name} {architecture}, batch {batch}, {device.type}"
    report(benchmark, interleaved(calls, rounds=5), "ours")
    benchmark.pedantic(ours, rounds=3)


def test_parts_of_a_loop_step(benchmark: BenchmarkFixture, device: torch.device) -> None:
    """What one step of the search loop takes its time for, default architecture, batch 128."""
    keep_freed_memory()
    nets, batch = make_nets(device), 128
    chosen, dtype = nets.space.default, compute_dtype(device)
    stored = np.random.default_rng(0).integers(0, 256, (4096, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.arange(len(stored)) % 10
    indices = np.arange(len(stored))
    table = normalisation_table(*normalisation(stored, indices))
    stream = BatchStream(
        stored, labels, indices, table, batch_size=batch, dtype=dtype, seed=0, purpose="train", augment=True
    )  # fmt: skip
    mixture = BalancedMixture(num_architectures=len(nets.space), num_supernets=1)
    images, targets = (t.to(device) for t in stream.batch(0))
    arena = nets.arena.detach()
    velocity, copies = torch.zeros_like(arena), working_copies(nets, dtype)
    row, lr, loss = (torch.tensor(value, device=device) for value in (0, 0.1, 1.0))
    gradient = torch.randn_like(arena[0]) * 1e-3

    def forward() -> Tensor:
        leaf = arena[0].detach().requires_grad_()
        return cross_entropy(nets.forward_row(leaf, images, chosen), targets)[0]

    def waits(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {
        "batch": lambda: [t.to(device) for t in stream.batch(1)],
        "forward": forward,
        "forward and backward": lambda: forward().backward(),
        "SGD": lambda: sgd(
            arena, velocity, gradient, row, lr, loss, momentum=0.9, weight_decay=1e-3, copies=copies
        ),
        "validation": lambda: batch_accuracy(nets, chosen, 0, images, targets),
        "EMA, balance and draw": lambda: mixture.observe_and_draw(23, 0, 0.5, 100.0, 23, 0.5),
    }  # fmt: skip
    seconds = interleaved({name: waits(call) for name, call in calls.items()}, rounds=10)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["backward"] = medians.pop("forward and backward") - medians["forward"]
    step = medians["forward"] + medians["backward"] + medians["SGD"]
    for name, value in medians.items():
        benchmark.extra_info[name] = f"{1e3 * value:.3f} ms, {100 * value / step:.2f} % of the training step"
    benchmark.group = f"parts of a loop step, ResNet-20 4,3,3, batch {batch}, {device.type}"
    print("\n" + "\n".join(f"  {name}: {value}" for name, value in benchmark.extra_info.items()))
    benchmark.pedantic(waits(calls["forward"]), rounds=3)
