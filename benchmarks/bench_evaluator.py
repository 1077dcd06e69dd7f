"""Scoring all architectures of a space in one pass, against one by one and against the plan's bare convolutions.

    pytest benchmarks/bench_evaluator.py --benchmark-only [--full]

To reach on a CPU: 8 times one by one in float32, NCHW, eager (the authors' way) with plain torch ops in bfloat16, 18
times with ours where there is AMX; at most 1.6 times the floor: the plan's convolutions alone, on maps that are there,
as many states at a time as is fastest. Where it says `(6 sampled, scaled by MACs)`, six architectures evenly spaced in
MACs were timed and their time multiplied. The compiled peer, on a CPU with --full alone, is one torch.compile for each
of these six (on a GPU with CUDA graphs), the time of compiling apart; past dynamo's limit of recompilations it fails
instead of running eagerly.

`logit error` and `count error` of a row are those of what is timed, in its dtype, against float64 on three of the six:
the largest logit difference, and the images counted differently over all of them. A row of ours, or a compiled one,
with a logit error above twice eager's in the same dtype fails before anything is timed. For calibrated scoring both,
eager and float64, freeze the statistics that they themselves find on the calibration images, and 64 images are
compared. Ours measures its statistics anew in every call, on a 64th of the images.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from peers import EagerNet, freeze, interleaved, report, spread_in_macs, synchronise
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bmsn.evaluator import all_pairs, make_plan, score_architectures
from bmsn.network import SupernetMixture
from bmsn.space import Architecture, SearchSpace
from bmsn.trainer import compute_dtype

SAMPLED = "(6 sampled, scaled by MACs)"
TOGETHER = {"cpu": (1, 2, 4), "cuda": (4, 12, 36)}


class Case:
    """A supernet, images, `batch_size` of them a statistics group (None: all), and what each peer computes of them."""

    def __init__(self, name: str, batch: int, device: torch.device, batch_size: int | None = None) -> None:
        self.space, self.batch, self.device = SearchSpace.named(name), batch, device
        self.batch_size = batch_size or batch
        classes = 100 if "100" in name else 10
        self.nets = SupernetMixture(self.space, 1, classes, generator=torch.Generator().manual_seed(0)).to(device)
        matrix = self.nets.arena.detach()[:, -(self.space.out_channels + 1) * classes : -classes].view(classes, -1)
        matrix -= matrix.mean(1, keepdim=True)  # else one class has the largest row sum and is predicted everywhere
        self.images = torch.randn(batch, 3, self.space.image_size, self.space.image_size, device=device)
        self.labels = torch.randint(classes, (batch,), device=device)
        self.dtype = compute_dtype(device)
        self.fast = self.images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        self.six, self.scale = spread_in_macs(self.nets, 6)
        self.three = [self.six[place] for place in (0, 2, 5)]  # whose logits are compared: float64 takes its time

    def peers(self, architectures: Sequence[Architecture], fast: bool) -> list[EagerNet]:
        found = [EagerNet(self.nets, architecture).to(self.device) for architecture in architectures]
        return [net.to(self.dtype).to(memory_format=torch.channels_last) for net in found] if fast else found

    def one_by_one(self, networks: Sequence[Callable[[Tensor], Tensor]], fast: bool) -> Callable[[], Tensor]:
        images = self.fast if fast else self.images

        @torch.no_grad()
        def run() -> Tensor:
            return torch.stack([(net(images).argmax(1) == self.labels).sum() for net in networks]).cpu()

        return run

    def ours(self, **how: object) -> Callable[[], Tensor]:
        return lambda: score_architectures(self.nets, self.fast, self.labels, batch_size=self.batch_size, **how).correct

    @torch.no_grad()
    def logits(self, **how: object) -> dict[Architecture, Tensor]:
        """What `ours(**how)` counts by, (images, classes) of each architecture: its head keeps them."""
        pairs = all_pairs(self.nets)

        def ends(images: Tensor, batch_size: int) -> list[Architecture]:
            waves = make_plan(self.nets, images, pairs, batch_size=batch_size).waves
            return [pairs[state.pair][0] for wave in waves for state in wave.states if state.pair is not None]

        calibration = how.get("calibration_images")  # are scored first: statistics come from a pass of their own
        measured = [] if calibration is None else [None for _ in ends(calibration, len(calibration))]
        order = chain(measured, cycle(ends(self.fast, self.batch_size)))
        found: dict[Architecture | None, list[Tensor]] = {}

        def head(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, groups: int, **_: object) -> Tensor:
            logits = F.linear(x.mean((2, 3), dtype=weight.dtype), weight[0], bias[0]).view(groups, len(labels), -1)
            for part in logits:
                found.setdefault(next(order), []).append(part)
            return (logits.argmax(2) == labels).sum(1)

        with patch("bmsn.execution.head", head):
            self.ours(**how)()
        return {architecture: torch.cat(found[architecture]) for architecture in self.three}

    @torch.no_grad()
    def eager_logits(self, dtype: torch.dtype, calibration: Tensor | None) -> dict[Architecture, Tensor]:
        """One by one: batch after batch, or the first 64 images with the statistics on `calibration`, frozen."""
        found = {}
        for architecture, net in zip(self.three, self.peers(self.three, False), strict=True):
            net = net.to(dtype).to(memory_format=torch.channels_last)
            parts = self.images.split(self.batch_size)
            if calibration is not None:  # frozen, an image's logits depend on no other image
                freeze(net, calibration.to(dtype))
                parts = (self.images[:64],)
            elif dtype == torch.float64:  # which the supernet itself computes in a fraction of the time
                net = partial(self.nets.forward_row, self.nets.arena[0].double(), architecture=architecture)
            found[architecture] = torch.cat([net(part.to(dtype)) for part in parts])
        return found

    @torch.no_grad()
    def compiled_logits(self, networks: Sequence[Callable[[Tensor], Tensor]]) -> dict[Architecture, Tensor]:
        """Of networks of the six; cloned, because the next replay of a CUDA graph writes where this one did."""
        return {a: networks[self.six.index(a)](self.fast).clone() for a in self.three}

    def check(
        self,
        rows: dict[str, dict[str, object]],
        eager_row: str = "",
        compiled: dict[str, Sequence[Callable[[Tensor], Tensor]]] | None = None,
    ) -> dict[str, object]:
        """The errors of each row of ours (name: how it is scored), of `eager_row` and of networks of the six compiled.

        None is above twice eager's.
        """
        info: dict[str, object] = {}
        for calibrated in (False, True):
            chosen = {name: how for name, how in rows.items() if ("calibration_images" in how) == calibrated}
            if not chosen:
                continue
            calibration = self.images[: len(next(iter(chosen.values()))["calibration_images"])] if calibrated else None
            exact, eager = (self.eager_logits(dtype, calibration) for dtype in (torch.float64, self.dtype))
            limit = 2 * self.error(eager, exact)
            logits = {name: self.logits(**how) for name, how in chosen.items()}
            if compiled and not calibrated:
                logits |= {name: self.compiled_logits(networks) for name, networks in compiled.items()}
            for name, found in logits.items():
                assert self.error(found, exact) <= limit, f"{name}: logits {self.error(found, exact):.3g} from float64"
                info |= self.errors(name, found, exact) | {f"{name} (twice eager's)": f"{limit:.2g}"}
            if eager_row and not calibrated:
                info |= self.errors(eager_row, eager, exact)
        return info

    def error(self, found: dict[Architecture, Tensor], exact: dict[Architecture, Tensor]) -> float:
        return max(float((found[a][: len(exact[a])] - exact[a]).abs().max()) for a in self.three)

    def errors(
        self, name: str, found: dict[Architecture, Tensor], exact: dict[Architecture, Tensor]
    ) -> dict[str, object]:
        """Largest difference of a logit, and of the counts, from float64, of the architectures in `three`."""
        images = len(exact[self.three[0]])
        labels = self.labels[:images]
        right = [[int((one[a][:images].argmax(1) == labels).sum()) for a in self.three] for one in (found, exact)]
        largest = max(float(logits.abs().max()) for logits in exact.values())
        differ = sum(abs(a - b) for a, b in zip(*right, strict=True))
        return {
            f"{name} (logit error)": f"{self.error(found, exact):.2g} of {largest:.2g}",
            f"{name} (count error)": f"{differ} of {images * len(self.three)}",
        }


def bare_convolutions(case: Case, states: int) -> tuple[Callable[[], None], int]:
    """The plan's convolutions and nothing else, `states` at a time, and their multiply-accumulates."""
    nets, images = case.nets, case.fast
    plan = make_plan(nets, images, all_pairs(nets), batch_size=case.batch_size)
    weights = nets.weights(nets.arena.detach()[0], images.dtype)
    calls, macs = [], 0
    for wave in plan.waves:
        layer, w = nets.space.layers[wave.layer], weights.layers[wave.layer]
        _, height, width = plan.map_shape(wave.layer, wave.num_pools)
        for start in range(0, len(wave.states), states):
            num_images = len(images) * min(states, len(wave.states) - start)
            for conv in layer.convolutions:
                kernel, stride = w[conv.name], 1 + (wave.strides and conv.stage == "at")
                before = 1 + (wave.strides and conv.stage in ("before", "at"))
                shape = (num_images, kernel.shape[1], height * before, width * before)
                calls.append((shape, kernel, stride))
                outputs = height * width * (before // stride) ** 2
                macs += num_images * outputs * kernel.numel()
    maps = {shape: torch.randn(shape, device=images.device).to(images.dtype) for shape, *_ in calls}
    maps = {shape: x.contiguous(memory_format=torch.channels_last) for shape, x in maps.items()}

    @torch.no_grad()
    def run() -> None:
        for shape, kernel, stride in calls:
            F.conv2d(maps[shape], kernel, stride=stride, padding=kernel.shape[2] // 2)

    return run, macs


def compiled(case: Case) -> tuple[list[Callable[[Tensor], Tensor]], float]:
    """One torch.compile for each of the six, run once, and the seconds that took."""
    torch._dynamo.reset()
    mode = "reduce-overhead" if case.device.type == "cuda" else "default"
    networks = [torch.compile(net, mode=mode, fullgraph=True, dynamic=False) for net in case.peers(case.six, True)]
    start = time.perf_counter()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for net in networks:
            for _ in range(3):  # a CUDA graph is recorded after a warm-up
                net(case.fast)
    synchronise()
    return networks, time.perf_counter() - start


def measure(
    benchmark: BenchmarkFixture,
    case: Case,
    *,
    whole: bool,
    rounds: int,
    together: Sequence[int],
    with_compiled: bool,
) -> None:
    """All rows of one space and batch size.

    `whole`: every architecture of the eager peers, else six, scaled. `together`: states that the floor tries at a time.
    """
    chosen, note = (list(case.space), "") if whole else (case.six, " " + SAMPLED)
    slow, fast = case.peers(chosen, False), case.peers(chosen, True)
    benchmark.group = (
        f"scoring {len(case.space)} architectures of {case.space.name}, {case.batch} images, {case.device.type}"
    )
    # The gates: in float32 the plan and the peer agree but for rounding ties; in the dtype that is timed see `check`.
    found = score_architectures(case.nets, case.images, case.labels, [(a, 0) for a in chosen], case.batch).correct
    authors = case.one_by_one(slow, False)
    assert (found - authors()).abs().max() <= max(1, case.batch // 100)
    ours = {
        "one pass": {},
        "one pass, reference ops": {"backend": "reference"},
        "one pass, calibrated": {"norm": "calibrated", "calibration_images": case.fast[: max(2, case.batch // 64)]},
    }
    compiled_ones = {}
    if with_compiled:
        networks, seconds_compiling = compiled(case)
        benchmark.extra_info["compiling one architecture (s)"] = round(seconds_compiling / len(networks), 1)
        compiled_ones[f"one by one, compiled {SAMPLED}"] = networks
    eager = f"one by one, eager in the same dtype{note}"
    benchmark.extra_info |= case.check(ours, eager, compiled_ones)
    calls: dict[str, Callable[[], object]] = {name: case.ours(**how) for name, how in ours.items()}
    calls |= {f"one by one, the authors' way{note}": authors, eager: case.one_by_one(fast, True)}
    calls |= {name: case.one_by_one(networks, True) for name, networks in compiled_ones.items()}
    bare = {states: bare_convolutions(case, states) for states in together}
    timed = interleaved({str(states): run for states, (run, _) in bare.items()}, rounds=2)
    best = min(bare, key=lambda states: statistics.median(timed[str(states)]))
    calls["bare convolutions"] = bare[best][0]
    benchmark.extra_info["states of a bare convolution"] = f"{best}, the fastest of {', '.join(map(str, together))}"
    seconds = scaled(case, interleaved(calls, rounds))
    rate = 2 * bare[best][1] / statistics.median(seconds["bare convolutions"])
    benchmark.extra_info["bare convolutions (GFLOP/s)"] = round(rate / 1e9)
    report(benchmark, seconds, "one pass")
    benchmark.pedantic(calls["one pass"], rounds=2)
    fastest, reference = (statistics.median(seconds[name]) for name in ("one pass", "one pass, reference ops"))
    assert fastest <= reference, (
        f"auto takes {fastest:.3g} s, the reference that it could have chosen {reference:.3g} s"
    )


def scaled(case: Case, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """What was sampled stands for all architectures."""
    return {
        name: [case.scale * value for value in values] if name.endswith(SAMPLED) else values
        for name, values in seconds.items()
    }


def test_scoring(benchmark: BenchmarkFixture, device: torch.device, full: bool) -> None:
    long = full or device.type == "cuda"
    case = Case("resnet20-cifar10", 256, device)
    together = TOGETHER[device.type]
    measure(benchmark, case, whole=True, rounds=5 if long else 2, together=together, with_compiled=long)


def test_scoring_validation_half(benchmark: BenchmarkFixture, device: torch.device) -> None:
    """To reach on an H200: 150 ms, calibrated 110 ms. Two runs give the same counts."""
    if device.type != "cuda":
        pytest.skip("25,000 images are for a GPU")
    case = Case("resnet20-cifar10", 25_000, device, batch_size=256)
    eager = case.peers(case.six, fast=True)

    @torch.no_grad()
    def one_by_one() -> None:
        for net in eager:
            for batch in case.fast.split(256):
                net(batch).argmax(1)

    ours = {
        "one pass": {},
        "one pass, calibrated": {"norm": "calibrated", "calibration_images": case.fast[:256]},
    }
    peer = f"one by one, eager in the same dtype {SAMPLED}"
    benchmark.extra_info |= case.check(ours, peer)
    calls: dict[str, Callable[[], object]] = {name: case.ours(**how) for name, how in ours.items()}
    calls[peer] = one_by_one
    assert torch.equal(calls["one pass"](), calls["one pass"]())
    benchmark.group = "scoring 36 architectures of resnet20-cifar10, 25,000 images in batches of 256, cuda"
    torch.cuda.reset_peak_memory_stats()
    seconds = scaled(case, interleaved(calls, rounds=4))
    benchmark.extra_info["batches at once"] = make_plan(case.nets, case.fast, all_pairs(case.nets)).batch_size // 256
    benchmark.extra_info["peak memory (GiB)"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    report(benchmark, seconds, "one pass")
    benchmark.pedantic(calls["one pass"], rounds=2)


@pytest.mark.usefixtures("needs_full")
def test_scoring_large_batches(benchmark: BenchmarkFixture, device: torch.device) -> None:
    case, together = Case("resnet20-cifar10", 1024, device), TOGETHER[device.type]
    measure(benchmark, case, whole=device.type == "cuda", rounds=3, together=together, with_compiled=True)


@pytest.mark.usefixtures("needs_full")
def test_scoring_560_architectures(benchmark: BenchmarkFixture, device: torch.device) -> None:
    """To reach on a CPU, batch 8: 4 times one by one in the same precision."""
    on_cpu = device.type == "cpu"
    batch, together = (8, (4, 8, 16)) if on_cpu else (256, (1, 4, 8))
    case = Case("resnet50-cifar100", batch, device)
    # Compiling six ResNet-50s takes longer than benchmarks/gpu.sh has for this.
    measure(benchmark, case, whole=False, rounds=2, together=together, with_compiled=on_cpu)


@pytest.mark.usefixtures("needs_full")
def test_peak_memory_of_560_architectures(benchmark: BenchmarkFixture) -> None:
    """A process of its own scores one batch of 64 under a cap of 2 GiB, on the CPU; oneDNN's needs come on top."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), "--space", "resnet50-cifar100", "--batch-size", "64", "--max-mib", "2048"]
    benchmark.group = "peak memory of scoring 560 architectures of resnet50-cifar100, 64 images, cap 2 GiB, cpu"
    found = benchmark.pedantic(subprocess.run, (command,), dict(check=True, capture_output=True, text=True), rounds=1)
    benchmark.extra_info |= json.loads(found.stdout)
    print(f"\n  {benchmark.extra_info}")
