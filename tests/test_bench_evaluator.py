"""The tables of benchmarks/bench_evaluator.py, on a narrow space with clocks that stand still: which rows, of what."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bmsn.space import SearchSpace
from installation import REPOSITORY

CPU = torch.device("cpu")
EAGER, COMPILED = "one by one, eager in the same dtype", "one by one, compiled (6 sampled, scaled by MACs)"


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group, self.extra_info = "", dict[str, Any]()

    def pedantic(self, function: Callable[[], object], rounds: int) -> None:
        function()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Every call of a table takes one second, and the space is narrow."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = importlib.import_module("bench_evaluator")
    space = SearchSpace.named("resnet14-cifar10", width=0.25)
    monkeypatch.setattr(module, "SearchSpace", SimpleNamespace(named=lambda name: space))
    monkeypatch.setattr(module, "interleaved", one_second_each)
    return module


def one_second_each(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    return {name: [1.0] * rounds for name in calls}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What torch.compile is asked for; it compiles nothing."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda net, **settings: asked.append(settings) or net)
    return asked


def test_compiled_peers_are_a_row_of_the_same_table(bench: ModuleType, compilations: list[dict[str, object]]) -> None:
    benchmark, case = Benchmark(), bench.Case("narrow", 8, CPU)
    bench.measure(benchmark, case, whole=True, rounds=2, together=(1,), with_compiled=True)
    info = benchmark.extra_info
    assert len(compilations) == 6
    assert all(asked["fullgraph"] and not asked["dynamic"] for asked in compilations)
    assert info[f"{EAGER} (ms)"] == info["one pass (ms)"] == 1000
    assert info[f"{COMPILED} (ms)"] == pytest.approx(1000 * case.scale, rel=1e-6)  # the six stand for all
    ratio = f"{case.scale:.2f}"
    assert info[f"one pass against {COMPILED}"] == f"{ratio}x ({ratio} to {ratio})"
    assert info[f"{COMPILED} (logit error)"] == info[f"{EAGER} (logit error)"]  # the same network here
    assert "compiling one architecture (s)" in info


def test_compiled_peers_that_compute_something_else_are_not_timed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda net, **settings: lambda images: 1.5 * net(images))
    with pytest.raises(AssertionError, match=r"compiled .*: logits"):
        bench.measure(
            Benchmark(), bench.Case("narrow", 8, CPU), whole=True, rounds=1, together=(1,), with_compiled=True
        )


@pytest.mark.parametrize(
    ("test", "full", "expected"),
    [
        ("test_scoring", False, False),  # minutes of compiling
        ("test_scoring", True, True),
        ("test_scoring_large_batches", True, True),
        ("test_scoring_560_architectures", True, True),
    ],
)
def test_every_long_table_on_a_cpu_has_compiled_peers(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, test: str, full: bool, expected: bool
) -> None:
    asked = []
    monkeypatch.setattr(bench, "Case", lambda *arguments: None)
    monkeypatch.setattr(bench, "measure", lambda *a, with_compiled, **k: asked.append(with_compiled))
    getattr(bench, test)(None, CPU, *([full] if test == "test_scoring" else []))
    assert asked == [expected]
