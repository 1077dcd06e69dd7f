"""One training step of ResNet-20: ours against the authors' way, eager, compiled, and its bare convolutions; its parts.

    pytest benchmarks/bench_training.py --benchmark-only            # batch 128 (256 on a GPU), one of three compiled
    pytest benchmarks/bench_training.py --benchmark-only --full     # batches of 128, 256 and 1024; all compiled

To reach on a CPU: 3 times the authors' way (float32, NCHW, eager; per-image transforms excluded), at batch 256 with AMX
4.5 times, and 1.6 times the bare convolutions. Freed memory is kept, as the search does it; it serves all sides.

On a GPU, where batches of 256 are always run, every side enqueues 50 steps and waits for them once; a row is the time
of one. "Training alone" is what the peers do: forward, backward and SGD on a batch that is there. A "search step", of
`Engine.run`, has all that a search does besides, of which nothing is subtracted: the training batch is made, then the
validation batch, on which the supernet is validated, then balance and draw. Bare convolutions and the parts of a step
are graphs there. To reach on an H200, default architecture, batch 256: 300,000 training images a second, 5 times eager
bfloat16 channels_last, 1.5 times compiled.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import EagerNet, interleaved, report, synchronise
from pytest_benchmark.fixture import BenchmarkFixture
from random_search import SIZE, all_steps, random_search
from torch import Tensor, nn

from bmsn.cuda_graphs import CudaGraphs
from bmsn.data import BatchStream, normalisation, normalisation_table
from bmsn.engine import GraphBackend, SearchState, count_correct
from bmsn.fused_network import FusedNetwork
from bmsn.memory import keep_freed_memory
from bmsn.mixture import BalancedMixture
from bmsn.network import SupernetMixture, build_path_network
from bmsn.ops.cross_entropy import cross_entropy
from bmsn.ops.mixture_step import mixture_step
from bmsn.ops.sgd import sgd
from bmsn.paths import architecture_path
from bmsn.space import Architecture, SearchSpace
from bmsn.trainer import arena_step, batch_accuracy, compute_dtype, device_step, train_step, working_copies

SETTINGS = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
ARCHITECTURES = ("4,3,3", "1,1,8", "8,1,1")  # the default one; the earliest poolings; the latest
STEPS = 50  # enqueued on a GPU before the host waits, as in the search loop
OURS_ON_GPU = "ours, graphs, training alone"


def make_nets(device: torch.device) -> SupernetMixture:
    space = SearchSpace.named("resnet20-cifar10")
    return SupernetMixture(space, 1, 10, generator=torch.Generator().manual_seed(0)).to(device)


def make_batch(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(batch, 3, SIZE, SIZE, generator=generator), torch.randint(10, (batch,))
    return images.to(device), labels.to(device)


def step_of(net: nn.Module, run: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of torch's own, which returns the loss: `run` is `net`, or `net` compiled."""
    optimiser = torch.optim.SGD(net.parameters(), **SETTINGS)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(run(images).float(), labels)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def training_alone(
    architecture: Architecture, images: Tensor, labels: Tensor, graphs: GraphBackend | None
) -> Callable[[], Tensor]:
    """A step of ours on one batch, eagerly or as a graph: waits for nothing, returns the loss."""

    def step_on(nets: SupernetMixture) -> Callable[[], Tensor]:
        velocity, copies = torch.zeros_like(nets.arena.detach()), working_copies(nets, images.dtype)
        row, lr = (torch.tensor(value, device=images.device) for value in (0, SETTINGS["lr"]))

        def step() -> Tensor:
            return device_step(
                nets, velocity, copies, architecture, row, images, labels,
                lr=lr, momentum=SETTINGS["momentum"], weight_decay=SETTINGS["weight_decay"],
            )[0]  # fmt: skip

        return step

    step, losses = step_on(make_nets(images.device)), []
    if graphs is None:
        return step
    graph = graphs.capture(step_on(make_nets(images.device)), lambda: losses.append(step()))

    def replay() -> Tensor:
        graph.replay()
        return losses[-1]

    return replay


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def waits(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        call()
        synchronise()

    return run


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

    return run


@pytest.mark.parametrize("batch", [128, 256, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_step(
    benchmark: BenchmarkFixture, architecture: str, batch: int, device: torch.device, full: bool
) -> None:
    on_gpu = device.type == "cuda"
    if batch != (256 if on_gpu else 128) and not full:
        pytest.skip("takes minutes: --full")
    keep_freed_memory()
    nets = make_nets(device)
    chosen, dtype = nets.space.find(architecture), compute_dtype(device)
    images, labels = make_batch(batch, device)
    fast = images.to(dtype).contiguous(memory_format=torch.channels_last)

    authors, low, to_compile = (EagerNet(nets, chosen).to(device) for _ in range(3))
    low, to_compile = (net.to(dtype).to(memory_format=torch.channels_last) for net in (low, to_compile))
    bare = bare_convolutions(nets, chosen, fast)

    steps: dict[str, Callable[[], Any]] = {}  # each returns its loss
    searches: dict[str, Callable[[], Any]] = {}  # of STEPS steps
    if on_gpu:
        graphs = CudaGraphs(device)
        bare = graphs.capture(bare, bare).replay
        for engine, backend in (("graphs", graphs), ("eager", None)):
            steps[f"ours, {engine}, training alone"] = training_alone(chosen, fast, labels, backend)
            state = random_search([chosen.index] * STEPS, batch, device)
            searches[f"ours, {engine}, search step"] = all_steps(state, backend)
    else:
        velocity, copies = torch.zeros_like(nets.arena.detach()), working_copies(nets, dtype)
        steps["ours"] = partial(train_step, nets, velocity, chosen, 0, fast, labels, **SETTINGS, copies=copies)
    ours = next(iter(steps))
    steps["the authors' way"] = step_of(authors, authors, images, labels)
    steps["eager, our dtype, channels_last"] = step_of(low, low, fast, labels)
    if full or architecture == ARCHITECTURES[0]:  # half a minute to compile
        torch.compiler.reset()  # past its limit of recompilations it would run eagerly
        compiled = torch.compile(to_compile, mode="reduce-overhead" if on_gpu else None, dynamic=False)
        steps["compiled, our dtype, channels_last"] = step_of(to_compile, compiled, fast, labels)

    # The gate: the same losses from the same weights, to bfloat16's precision, over three steps.
    losses = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
    for name, found in losses.items():
        assert found == pytest.approx(losses["the authors' way"], rel=0.05), name
    firsts = [search().losses[0] for search in searches.values()]  # later on rounding may turn a draw
    assert firsts == pytest.approx(firsts[:1] * len(firsts), rel=0.05)

    num_steps = STEPS if on_gpu else 1
    calls = {name: repeated(step, num_steps) for name, step in (steps | {"bare convolutions": bare}).items()}
    seconds = {
        name: [value / num_steps for value in values]
        for name, values in interleaved(calls | searches, rounds=5).items()
    }  # fmt: skip
    benchmark.group = f"training step, ResNet-20 {architecture}, batch {batch}, {device.type}"
    if on_gpu:
        for name in (*steps, *searches):
            benchmark.extra_info[f"{name}, images/s"] = round(batch / statistics.median(seconds[name]))
        benchmark.group += f" ({STEPS} steps a call)"
    report(benchmark, seconds, ours)
    benchmark.pedantic(waits(calls[ours]), rounds=3)


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


def parts_on_host() -> dict[str, Callable[[], object]]:
    """The parts of a loop step on the CPU, one supernet, batch 128, by name."""
    device, batch = torch.device("cpu"), 128
    nets = make_nets(device)
    chosen, dtype = nets.space.default, compute_dtype(device)
    stored = np.random.default_rng(0).integers(0, 256, (4096, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.arange(len(stored)) % 10
    indices = np.arange(len(stored))
    table = normalisation_table(*normalisation(stored, indices))
    stream = BatchStream(
        stored, labels, indices, table, batch_size=batch, dtype=dtype, seed=0, purpose="train", augment=True
    )  # fmt: skip
    mixture = BalancedMixture(num_architectures=len(nets.space), num_supernets=1)
    images, targets = stream.batch(0)
    arena = nets.arena.detach()
    velocity, copies = torch.zeros_like(arena), working_copies(nets, dtype)
    row, lr, loss = (torch.tensor(value) for value in (0, 0.1, 1.0))
    gradient = torch.randn_like(arena[0]) * 1e-3

    def forward() -> Tensor:
        leaf = arena[0].detach().requires_grad_()
        return cross_entropy(nets.forward_row(leaf, images, chosen), targets)[0]

    return {
        "batch": lambda: stream.batch(1),
        "forward": forward,
        "forward and backward": lambda: forward().backward(),
        "SGD": lambda: sgd(
            arena, velocity, gradient, row, lr, loss, momentum=0.9, weight_decay=1e-3, copies=copies
        ),
        "validation": lambda: batch_accuracy(nets, chosen, 0, images, targets),
        "EMA, balance and draw": lambda: mixture.observe_and_draw(23, 0, 0.5, 100.0, 23, 0.5),
    }  # fmt: skip


def parts_of_graph(state: SearchState, graphs: GraphBackend) -> dict[str, Callable[[], object]]:
    """The parts of the first step of `state`, default architecture, each as a graph, by name."""
    nets, settings, row = state.nets, state.settings, state.mixture.supernet
    arena, weights = nets.arena.detach(), nets.arena.detach() if state.copies is None else state.copies
    images, targets = state.train.batch(0)
    validation, wanted = state.validation.batch(0)
    loss, gradient = arena.new_ones(()), torch.randn_like(arena[0]) * 1e-3
    trained, correct = loss.isfinite(), torch.full_like(row, state.validation.batch_size // 2)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        convs, head = (part.requires_grad_() for part in weights[0].detach().split(nets.part_sizes))
        logits = nets.forward_weights(nets.views(convs, head.to(arena.dtype)), images, nets.space.default)
        return cross_entropy(logits, targets)[0], convs, head

    def forward_and_backward() -> None:
        loss, *leaves = forward()
        torch.autograd.grad(loss, leaves)

    parts: dict[str, Callable[[], object]] = {
        "batch": lambda: state.train.at(state.step),
        "forward": forward,
        "forward and backward": forward_and_backward,
        "SGD": lambda: sgd(
            arena, state.velocity, gradient, row, state.lrs[0], loss,
            momentum=settings.momentum, weight_decay=settings.weight_decay, copies=state.copies,
        ),
        "validation": lambda: count_correct(state, nets.space.default, validation, wanted),
        "EMA, balance and draw": lambda: mixture_step(
            state.mixture, state.step, correct, trained, num_images=state.validation.batch_size,
            ema_decay=settings.ema_decay, tol=settings.tol, balance_every=settings.balance_every,
        ),
    }  # fmt: skip
    return {name: graphs.capture(part, part).replay for name, part in parts.items()}


def test_parts_of_a_loop_step(benchmark: BenchmarkFixture, device: torch.device) -> None:
    """What one step of the search loop takes its time for, default architecture, batch 128; on a GPU 256."""
    keep_freed_memory()
    if device.type == "cuda":
        batch, num_steps = 256, STEPS
        default = SearchSpace.named("resnet20-cifar10").default
        parts = parts_of_graph(random_search([default.index], batch, device), CudaGraphs(device))
    else:
        batch, num_steps, parts = 128, 1, parts_on_host()
    calls = {name: repeated(part, num_steps) for name, part in parts.items()}
    seconds = interleaved(calls, rounds=10)
    medians = {name: statistics.median(values) / num_steps for name, values in seconds.items()}
    medians["backward"] = medians.pop("forward and backward") - medians["forward"]
    step = medians["forward"] + medians["backward"] + medians["SGD"]
    for name, value in medians.items():
        benchmark.extra_info[name] = f"{1e3 * value:.3f} ms, {100 * value / step:.2f} % of the training step"
    benchmark.group = f"parts of a loop step, ResNet-20 4,3,3, batch {batch}, {device.type}"
    print("\n" + "\n".join(f"  {name}: {value}" for name, value in benchmark.extra_info.items()))
    benchmark.pedantic(waits(calls["forward"]), rounds=3)
