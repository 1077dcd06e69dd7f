"""What the end-to-end benchmarks compare with, and how: interleaved rounds, median ratio and its spread.

"The authors' way" is what the code released with the paper does: one architecture at a time, float32, NCHW, eager,
BatchNorm without affine step. It is written here with torch.nn and gets its weights from our supernet, so that both
sides compute the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmsn.network import SupernetMixture
from bmsn.space import Architecture


class EagerNet(nn.Module):
    """One architecture of a supernet of basic blocks, with torch's own modules; float32 and NCHW until it is moved."""

    def __init__(self, nets: SupernetMixture, architecture: Architecture, supernet: int = 0) -> None:
        super().__init__()
        space, self.pools = nets.space, architecture.pool_positions
        weights = nets.weights(nets.arena.detach()[supernet], torch.float32)
        self.layers = nn.ModuleList()
        for layer, w in zip(space.layers, weights.layers, strict=True):
            block = nn.ModuleDict()
            for conv in layer.convolutions:
                shape = w[conv.name].shape
                block[conv.name] = nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2, bias=False)
                block[conv.name].weight = nn.Parameter(w[conv.name].contiguous().clone())
                block[conv.name + "_norm"] = nn.BatchNorm2d(shape[0], affine=False, track_running_stats=False)
            self.layers.append(block)
        self.head = nn.Linear(space.out_channels, nets.num_classes)
        self.head.weight, self.head.bias = (
            nn.Parameter(weights.head_weight.clone()),
            nn.Parameter(weights.head_bias.clone()),
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.layers):
            if index in self.pools:
                x = F.max_pool2d(x, 2)
            if index == 0:
                x = F.relu(block["conv_norm"](block["conv"](x)))
                continue
            y = F.relu(block["conv1_norm"](block["conv1"](x)))
            y = block["conv2_norm"](block["conv2"](y))
            x = F.relu(y + (block["shortcut_norm"](block["shortcut"](x)) if "shortcut" in block else x))
        return self.head(x.mean((2, 3)))


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, in turn within one process, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> dict[str, float]:
    """How many times as fast `ours` is as `peer`, round by round: median, minimum and maximum."""
    ratios = [a / b for a, b in zip(seconds[peer], seconds[ours], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def report(benchmark: object, seconds: dict[str, list[float]], ours: str) -> None:
    """Into the benchmark's extra_info: the median of each, and our ratio to each peer with its spread."""
    info = benchmark.extra_info  # type: ignore[attr-defined]
    for name, values in seconds.items():
        info[f"{name} (ms)"] = round(1e3 * statistics.median(values), 2)
        if name != ours:
            spread = ratio(seconds, name, ours)
            info[f"{ours} against {name}"] = f"{spread['median']:.2f}x ({spread['min']:.2f} to {spread['max']:.2f})"
    info["torch"], info["threads"] = str(torch.__version__), torch.get_num_threads()
    print("\n" + "\n".join(f"  {name}: {value}" for name, value in info.items()))
