"""The steps that benchmarks/bench_training.py times on a GPU, on the CPU: graphs are recorded in Python here."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
import torch

from bmsn.trainer import train_step, working_copies
from engines import RecordedGraphs
from installation import REPOSITORY

CPU, BATCH = torch.device("cpu"), 4


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("bench_training")


def test_training_alone_is_a_step_of_the_search(bench: ModuleType) -> None:
    nets = bench.make_nets(CPU)
    chosen = nets.space.default
    images, labels = bench.make_batch(BATCH, CPU)
    images = images.contiguous(memory_format=torch.channels_last)
    velocity, copies = torch.zeros_like(nets.arena.detach()), working_copies(nets, images.dtype)
    wanted = [
        train_step(nets, velocity, chosen, 0, images, labels, **bench.SETTINGS, copies=copies) for _ in range(3)
    ]  # fmt: skip
    for graphs in (None, RecordedGraphs()):
        step = bench.training_alone(chosen, images, labels, graphs)
        assert [float(step()) for _ in range(3)] == wanted
    assert wanted[2] != wanted[0]


def test_all_steps_of_a_search_are_run_at_every_call(bench: ModuleType) -> None:
    drawn = [35, 0, 35]
    states = [bench.random_search(drawn, BATCH, CPU, num_images=16) for _ in range(2)]
    runs = [bench.all_steps(state, graphs) for state, graphs in zip(states, (None, RecordedGraphs()), strict=True)]
    for _ in range(2):  # 2 steps an epoch: the second call goes back to the first epoch
        eager, recorded = (run() for run in runs)
        assert np.isfinite(eager.losses).all()
        np.testing.assert_array_equal(recorded.losses, eager.losses)
        assert [int(state.step) for state in states] == [3, 3]
    assert states[0].mixture.visits.sum(1)[[0, 35]].tolist() == [2, 4]
    assert torch.equal(states[0].nets.arena, states[1].nets.arena)


def test_a_search_that_gave_graphs_up_is_not_timed_as_graphs(bench: ModuleType) -> None:
    state = bench.random_search([0], BATCH, CPU, num_images=16)
    with pytest.raises(AssertionError):
        bench.all_steps(state, RecordedGraphs(memory=0))()


def test_each_part_of_a_step_does_its_work(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    state = bench.random_search([23], BATCH, CPU, num_images=16)
    parts = bench.parts_of_graph(state, RecordedGraphs())
    visits, arena = state.mixture.visits.clone(), state.nets.arena.detach().clone()
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(type(state.train), "at", lambda stream, step: asked.append(step))
    for name, part in parts.items():
        part()
        assert (name == "batch") == bool(asked), name
        asked.clear()
        assert (name == "SGD") == (not torch.equal(state.nets.arena, arena)), name
        arena = state.nets.arena.detach().clone()
        assert (name == "EMA, balance and draw") == (not torch.equal(state.mixture.visits, visits)), name
        visits = state.mixture.visits.clone()
