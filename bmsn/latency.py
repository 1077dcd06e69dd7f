"""`measure_latency`: how long the networks trained alone take on this device.

Eval mode, BatchNorm folded into the convolutions, channels_last, in the dtype that this device computes in. All
networks are measured in turn, round after round, so that what else the machine does strikes them alike; the spread is
reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bmsn.checkpoint import environment
from bmsn.errors import InputError
from bmsn.network import build_network
from bmsn.space import Architecture, SearchSpace
from bmsn.trainer import compute_dtype, resolve_device

BATCH_SIZES = (1, 256)
BUSY_SPREAD = 0.1  # of a quiet machine it is about 0.02
_TIMING_SECONDS = 0.005  # a shorter forward pass is repeated within one timing


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one forward pass in milliseconds.

    Attributes:
        device: what they were measured on; dtype: computed in.
        rounds: timings of each network.
        milliseconds: by stage depths as 4-3-3 and batch size, the lower quartile, median and upper quartile.
        spread: by batch size, how far the quartiles lie apart, relative to the median: the median over networks.
    """

    device: str
    dtype: str
    rounds: int
    milliseconds: dict[str, dict[int, tuple[float, float, float]]]
    spread: dict[int, float]

    @property
    def note(self) -> str:
        """The spread in words, and a warning where the machine was busy."""
        spread = ", ".join(f"{100 * value:.0f} % at batch {size}" for size, value in self.spread.items())
        text = f"Latency on {self.device}, {self.dtype}, median of {self.rounds} rounds; quartiles apart by {spread}"
        busy = max(self.spread.values()) > BUSY_SPREAD
        return text + (": the machine was busy, so do not trust small differences." if busy else ".")

    def as_dict(self) -> dict[str, Any]:
        """Plain values; batch sizes as text, as JSON has them."""
        return {
            "device": self.device, "dtype": self.dtype, "rounds": self.rounds,
            "milliseconds": {
                slug: {str(size): list(times) for size, times in by_size.items()}
                for slug, by_size in self.milliseconds.items()
            },
            "spread": {str(size): value for size, value in self.spread.items()}, "note": self.note,
        }  # fmt: skip


def measure_latency(
    space: SearchSpace,
    architectures: Sequence[Architecture] | None = None,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    device: str = "auto",
    rounds: int = 9,
    before_each: Callable[[], None] = lambda: None,
) -> Latency:
    """Measures networks of a space, with weights that they share: what the weights are changes no time.

        >>> space = bmsn.SearchSpace.named("resnet14-cifar10")
        >>> chosen = [space.default, space.find("5,1,1")]
        >>> latency = bmsn.measure_latency(space, chosen, batch_sizes=(1,), rounds=3)
        >>> low, median, high = latency.milliseconds["5-1-1"][1]  # at batch 1
        >>> 0 < low <= median <= high
        True

    Args:
        architectures: which; None: all.
        num_classes, in_channels: of the networks.
        image_size: pixels on a side; None: the space's.
        batch_sizes: images in a forward pass.
        device: auto, cpu or cuda.
        rounds: timings of each network at each batch size.
        before_each: called before a network is built, warmed up or timed; what it raises ends the measurement.
    Raises:
        InputError: a batch size or number of rounds below 1, an architecture of another space, or no such device.
    """
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"rounds and batch_sizes must be at least 1; got {rounds} and {tuple(batch_sizes)}")
    chosen = list(space) if architectures is None else list(architectures)
    where = resolve_device(device)
    dtype = compute_dtype(where)
    with torch.random.fork_rng(devices=[]):  # building draws weights, and torch's random state belongs to the caller
        networks = _networks(space, chosen, num_classes, in_channels, where, dtype, before_each)
    size = image_size or space.image_size
    times: dict[str, dict[int, tuple[float, float, float]]] = {a.slug: {} for a in chosen}
    spread = {}
    for batch_size in batch_sizes:
        images = torch.rand(batch_size, in_channels, size, size, generator=torch.Generator()).to(where, dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        measured = _rounds(networks, images, rounds, before_each)  # (A, rounds) seconds
        quartiles = 1000 * np.quantile(measured, [0.25, 0.5, 0.75], axis=1).T
        for a, (low, median, high) in zip(chosen, quartiles.tolist(), strict=True):
            times[a.slug][batch_size] = (low, median, high)
        spread[batch_size] = statistics.median(((quartiles[:, 2] - quartiles[:, 0]) / quartiles[:, 1]).tolist())
    here = environment(where.type)
    return Latency(
        device=here["cuda_device"] or f"{here['cpu_model']}, threads: {torch.get_num_threads()}",
        dtype=str(dtype).removeprefix("torch."),
        rounds=rounds,
        milliseconds=times,
        spread=spread,
    )


def _networks(
    space: SearchSpace,
    architectures: Sequence[Architecture],
    num_classes: int,
    in_channels: int,
    device: torch.device,
    dtype: torch.dtype,
    before_each: Callable[[], None] = lambda: None,
) -> list[nn.Module]:
    """Networks without BatchNorm that share one set of parameters, which all architectures of a space can."""
    shared: list[nn.Parameter] | None = None
    networks = []
    for architecture in architectures:
        before_each()
        with torch.device("cpu" if shared is None else "meta"):  # there is no memory for 560 times the same weights
            network = fold_batch_norm(build_network(space, architecture, num_classes, in_channels).eval())
        if shared is None:
            network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            shared = list(network.parameters())
        else:
            # Modules come in the order of the layers, with their poolings between them.
            given = iter(shared)
            for module in network.modules():
                for name in module._parameters:
                    if module._parameters[name] is not None:
                        module._parameters[name] = next(given)
        networks.append(network)
    return networks


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Puts every BatchNorm that follows a convolution in a `Sequential` into its weights; in place.

    Args:
        network: in eval mode.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            for (_, first), (name, second) in pairwise(list(module.named_children())):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    folded = fuse_conv_bn_eval(first, second)
                    first.weight, first.bias = folded.weight, folded.bias
                    setattr(module, name, nn.Identity())
    return network


@torch.inference_mode()
def _rounds(
    networks: Sequence[nn.Module], images: torch.Tensor, rounds: int, before_each: Callable[[], None]
) -> np.ndarray:
    """(A, rounds) seconds of a forward pass; within a round the networks come in a shuffled order."""
    repeats = []
    for network in networks:
        before_each()
        network(images)  # kernels are chosen, memory is got
        repeats.append(max(1, math.ceil(_TIMING_SECONDS / max(1e-6, _seconds(network, images, 1)))))
    seconds = np.empty((len(networks), rounds))
    order = np.random.default_rng(0)
    for number in range(rounds):
        for place in order.permutation(len(networks)):
            before_each()
            seconds[place, number] = _seconds(networks[place], images, repeats[place])
    return seconds


def _seconds(network: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """Of one forward pass, the mean of `repeats`."""
    _wait(images.device)
    start = time.perf_counter()
    for _ in range(repeats):
        network(images)
    _wait(images.device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
