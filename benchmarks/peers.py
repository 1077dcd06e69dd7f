"""What benchmarks compare with, and how: interleaved rounds, median ratio and its spread, measured floors.

"The authors' way" is what the code released with the paper does: one architecture at a time, float32, NCHW, eager,
BatchNorm without affine step. It is written here with torch.nn and gets its weights from our supernet, so that both
sides compute the same.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmsn.network import SupernetMixture
from bmsn.space import Architecture
from bmsn.trainer import compute_dtype


class EagerNet(nn.Module):
    """One architecture of a supernet with a small stem, by torch's own modules; float32 and NCHW until it is moved."""

    def __init__(self, nets: SupernetMixture, architecture: Architecture, supernet: int = 0) -> None:
        super().__init__()
        space = nets.space
        weights = nets.weights(nets.arena.detach()[supernet], torch.float32)
        self.pool, self.pools = space.pool, architecture.pool_positions if space.pool != "stride" else ()
        self.strides = architecture.pool_positions if space.pool == "stride" else ()
        self.layers, self.names = nn.ModuleList(), [[conv.name for conv in layer.main] for layer in space.layers]
        for index, (layer, w) in enumerate(zip(space.layers, weights.layers, strict=True)):
            block = nn.ModuleDict()
            for conv in layer.convolutions:
                stride = 2 if index in self.strides and conv.stage == "at" else 1
                o, i, k, _ = w[conv.name].shape
                block[conv.name] = nn.Conv2d(i, o, k, stride=stride, padding=k // 2, bias=False)
                block[conv.name].weight = nn.Parameter(w[conv.name].contiguous().clone())
                block[conv.name + "_norm"] = nn.BatchNorm2d(o, affine=False, track_running_stats=False)
            self.layers.append(block)
        self.head = nn.Linear(space.out_channels, nets.num_classes)
        self.head.weight, self.head.bias = (
            nn.Parameter(weights.head_weight.clone()),
            nn.Parameter(weights.head_bias.clone()),
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, (block, names) in enumerate(zip(self.layers, self.names, strict=True)):
            if index in self.pools:
                x = F.max_pool2d(x, 2) if self.pool == "max" else F.avg_pool2d(x, 2)
            y = x
            for name in names:
                y = block[name + "_norm"](block[name](y if name == names[0] else F.relu(y)))
            if index == 0:
                x = F.relu(y)
            elif "shortcut" in block:
                x = F.relu(y + block["shortcut_norm"](block["shortcut"](x)))
            else:
                x = F.relu(y + (x[:, :, ::2, ::2] if index in self.strides else x))
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def freeze(net: EagerNet, images: Tensor) -> None:
    """Every BatchNorm keeps from now on the mean and biased variance, in float32 at least, that it has on `images`."""

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        norm.running_var, norm.running_mean = torch.var_mean(x, (0, 2, 3), correction=0)

    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    net.train()(images)
    for hook in hooks:
        hook.remove()
    net.eval()


def spread_in_macs(nets: SupernetMixture, count: int) -> tuple[list[Architecture], float]:
    """`count` architectures evenly spaced in MACs, and by what their time is to be multiplied to stand for all."""
    ordered = sorted(nets.space, key=nets.space.macs)
    chosen = [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]
    return chosen, sum(map(nets.space.macs, ordered)) / sum(map(nets.space.macs, chosen))


def synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round, in turn within one process, after one round that is not counted.

    `repeats` calls go between two readings of the clock, which wait for the GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronise()
            if number:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> dict[str, float]:
    """How many times as fast `ours` is as `peer`, round by round: median, minimum and maximum."""
    ratios = [a / b for a, b in zip(seconds[peer], seconds[ours], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def report(benchmark: object, seconds: dict[str, list[float]], ours: str) -> None:
    """Into the benchmark's extra_info: the median of each, and our ratio to each peer with its spread."""
    info = benchmark.extra_info  # type: ignore[attr-defined]
    for name, values in seconds.items():
        info[f"{name} (ms)"] = round(1e3 * statistics.median(values), 4)
        if name != ours:
            spread = ratio(seconds, name, ours)
            info[f"{ours} against {name}"] = f"{spread['median']:.2f}x ({spread['min']:.2f} to {spread['max']:.2f})"
    info["torch"], info["threads"] = str(torch.__version__), torch.get_num_threads()
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    print("\n" + "\n".join(f"  {name}: {value}" for name, value in info.items()))


@functools.cache
def ceilings(device: torch.device) -> tuple[float, float]:
    """Measured: bytes a second of a large copy (read and written), FLOP a second of a large product in bmsn's dtype."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**25, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn((2, 8192, 8192) if gpu else (2, 2048, 2048), device=device).to(compute_dtype(device))
    found = interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, rounds=5)
    return 2 * source.nbytes / min(found["copy"]), 2 * len(a) ** 3 / min(found["product"])


def report_floor(
    benchmark: object, seconds: Sequence[float], device: torch.device, *, bytes_moved: int, flop: int = 0
) -> None:
    """How near the medians of `seconds` are to the least time that the bytes and the arithmetic need."""
    bandwidth, rate = ceilings(device)
    floor, time_ = max(bytes_moved / bandwidth, flop / rate), statistics.median(seconds)
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        {
            "bytes moved": bytes_moved,
            "FLOP": flop,
            "bound by": "bytes" if bytes_moved / bandwidth > flop / rate else "FLOP",
            "floor (ms)": round(1e3 * floor, 4),
            "floor / bmsn": round(floor / time_, 3),
            "GB/s": round(bytes_moved / time_ / 1e9, 1),
            "GFLOP/s": round(flop / time_ / 1e9, 1),
            "ceilings": f"{bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s",
        }
    )
