"""The balance: one step of a search (EMA + balance + draw), whole solves, and the same solves by POT's `sinkhorn`.

To reach, on one CPU core, called from Python: a step at 36x4, 1/tau = 100, warm: 2 us. 560x8, 1/tau = 800, tol 1e-12:
15 us warm, 250 us cold. Against POT, 36x4, 1/tau = 100, same KL: 60 times as fast cold, 10 times warm.

A warm start is the solution before one search step: one visited pair's average has moved by 0.1 * 0.05. POT is given
its fastest method (plain Sinkhorn on costs with each row's best at 0; nothing underflows here), the stopping threshold
that means the same KL, no log and no warnings. pytest-benchmark stores the machine and the commit beside these figures.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bmsn.backend import extension, resolve
from bmsn.mixture import BalancedMixture
from bmsn.ops.balance import balance
from bmsn.ops.mixture_step import MixtureTensors, failure, mixture_step

Table = NDArray[np.float64]

pytestmark = pytest.mark.skipif(extension() is None, reason="the reference alone: nothing to compare")


def accuracies(rows: int, cols: int) -> Table:
    """Like a search's: architectures differ by 0.1, supernets by 0.03."""
    rng = np.random.default_rng(0)
    return np.clip(0.6 + 0.1 * rng.standard_normal((rows, 1)) + 0.03 * rng.standard_normal((rows, cols)), 0, 1)


def one_step_later(scores: Table, probabilities: Table) -> Table:
    """The average of an undecided architecture's favourite supernet moves by beta's share of a 0.05 surprise."""
    visited = int(np.abs(probabilities.max(axis=1) - 0.5).argmin())
    moved = scores.copy()
    moved[visited, probabilities[visited].argmax()] -= 0.1 * 0.05
    return moved


def interleaved(calls: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.004) -> dict[str, float]:
    """Median microseconds a call of each, measured in turn within one process."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds:
                for _ in range(4):
                    call()
                count += 4
            if round_number:  # the first round warms up
                times[name].append(elapsed / count * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def divergence(probabilities: Table) -> float:
    excess = probabilities.shape[1] * probabilities.mean(axis=0) - 1
    return float(np.mean((1 + excess) * np.log1p(excess) - excess))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.benchmark(group="balance: a search step, 36x4, 1/tau 100, warm (2000 steps a round)")
def test_search_step(benchmark: BenchmarkFixture, backend: str) -> None:
    num_steps = 2000 if backend == "auto" else 100
    rng = np.random.default_rng(0)
    table = accuracies(36, 4)
    architectures, uniforms = rng.integers(0, 36, num_steps + 1).tolist(), rng.random(num_steps + 1).tolist()
    noise = (0.05 * rng.standard_normal((num_steps, 4))).tolist()
    observed = [[table[c, m] + noise[i][m] for m in range(4)] for i, c in enumerate(architectures[:-1])]

    def search(mixture: BalancedMixture) -> list[int]:
        drawn = [mixture.draw(architectures[0], 100.0, uniforms[0])]
        for i in range(num_steps):
            m = drawn[-1]
            next_one, uniform = architectures[i + 1], uniforms[i + 1]
            drawn.append(mixture.observe_and_draw(architectures[i], m, observed[i][m], 100.0, next_one, uniform))
        return drawn

    def fresh(name: str) -> BalancedMixture:
        mixture = BalancedMixture(num_architectures=36, num_supernets=4, backend=name)
        mixture.refresh(table, ema=False)
        return mixture

    gate, reference = fresh(backend), fresh("reference")
    assert search(gate)[:101] == search(reference)[:101]
    assert divergence(gate.assignment(100.0)) < 1e-12
    result = benchmark.pedantic(search, setup=lambda: ((fresh(backend),), {}), rounds=15, warmup_rounds=1)
    assert len(result) == num_steps + 1
    benchmark.extra_info["us_per_step"] = benchmark.stats.stats.median / num_steps * 1e6
    benchmark.extra_info["to_reach_us"] = 2.0
    benchmark.extra_info["torch"] = torch.__version__


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.benchmark(group="balance: 560x8, 1/tau 800, tol 1e-12")
def test_large_space(benchmark: BenchmarkFixture, start: str) -> None:
    scores, temperature = accuracies(560, 8), 1 / 800
    before = balance(scores, temperature, 1e-12)
    moved = one_step_later(scores, before.probabilities)
    warm_start = before.potentials if start == "warm" else None
    result, reference = (balance(moved, temperature, 1e-12, warm_start, backend=name) for name in ("auto", "reference"))
    assert divergence(result.probabilities) < 1e-12
    np.testing.assert_allclose(result.probabilities, reference.probabilities, rtol=0, atol=1e-9)
    benchmark(balance, moved, temperature, 1e-12, warm_start)
    benchmark.extra_info.update(
        iterations=result.iterations, to_reach_us=15.0 if start == "warm" else 250.0, torch=torch.__version__
    )


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("tol", [1e-4, 1e-12])
@pytest.mark.benchmark(group="balance: 36x4, 1/tau 100, against POT and the reference")
def test_against_pot(benchmark: BenchmarkFixture, tol: float, start: str) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    scores, temperature = accuracies(36, 4), 1 / 100
    rows, cols = np.full(36, 1 / 36), np.full(4, 1 / 4)
    threshold = math.sqrt(2 * tol / 4)  # KL = M/2 |p(m) - 1/M|^2 near uniform

    def sinkhorn(cost: Table, log: bool = False, warmstart: tuple[Table, Table] | None = None) -> object:
        return ot.sinkhorn(
            rows,
            cols,
            cost,
            temperature,
            stopThr=threshold,
            numItermax=100_000,
            log=log,
            warn=False,
            warmstart=warmstart,
        )

    before = balance(scores, temperature, tol)
    _, log = sinkhorn(scores.max(axis=1, keepdims=True) - scores, log=True)
    moved = one_step_later(scores, before.probabilities)
    pot = partial(sinkhorn, moved.max(axis=1, keepdims=True) - moved)
    ours = partial(balance, moved, temperature, tol)
    if start == "warm":
        pot = partial(pot, warmstart=(np.log(log["u"]), np.log(log["v"])))
        ours = partial(ours, warm_start=before.potentials)
    result, plan = ours(), pot()
    for probabilities in (result.probabilities, plan * 36):
        assert divergence(probabilities) < tol
    np.testing.assert_allclose(result.probabilities, plan * 36, rtol=0, atol=20 * math.sqrt(tol))

    times = interleaved({"auto": ours, "reference": partial(ours, backend="reference"), "pot": pot})
    chosen = resolve("balance")
    assert times["auto"] < times["reference"] or chosen == "reference", f"auto chose {chosen}, which is slower: {times}"
    benchmark(ours)
    benchmark.extra_info.update({f"us_{name}": value for name, value in times.items()})
    benchmark.extra_info["times_as_fast_as_pot"] = times["pot"] / times["auto"]
    benchmark.extra_info["to_reach"] = 60.0 if start == "cold" else 10.0
    benchmark.extra_info.update(iterations=result.iterations, torch=torch.__version__)


@pytest.mark.skipif(not torch.cuda.device_count(), reason="no GPU")
@pytest.mark.parametrize(("rows", "cols"), [(36, 4), (560, 8), (1024, 16)], ids=str)
@pytest.mark.benchmark(group="EMA, balance and draw on the GPU, 1/tau 100 (100 steps a round)")
def test_step_on_the_gpu(benchmark: BenchmarkFixture, rows: int, cols: int) -> None:
    num_steps, random = 100, np.random.default_rng(0)
    drawn = random.integers(0, rows, num_steps + 1), np.full(num_steps + 1, 100.0), random.random(num_steps + 1)
    sides = {device: MixtureTensors.create(rows, cols, *drawn, device) for device in ("cpu", "cuda")}
    settings = {"num_images": 256, "ema_decay": 0.9, "tol": 1e-12, "balance_every": 1}

    def search(device: str) -> None:
        state = sides[device]
        state.scores.copy_(torch.from_numpy(accuracies(rows, cols).T))
        state.potentials.zero_()
        correct, trained = torch.tensor(150, device=device), torch.tensor(True, device=device)
        step = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(num_steps):
            mixture_step(state, step, correct, trained, **settings)
            step += 1
        torch.cuda.synchronize()

    for device in sides:
        search(device)
        assert failure(sides[device].outcome.cpu(), 1e-12) is None
    torch.testing.assert_close(sides["cuda"].scores.cpu(), sides["cpu"].scores, rtol=0, atol=1e-12)
    benchmark.pedantic(search, args=("cuda",), rounds=15, warmup_rounds=1)
    benchmark.extra_info["us_per_step"] = benchmark.stats.stats.median / num_steps * 1e6
    benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
