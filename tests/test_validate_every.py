"""While one supernet trains alone it is validated every few steps: nothing is chosen by its accuracies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bmsn.config import SearchConfig
from bmsn.loop import SearchLoop
from bmsn.methods.problem import Problem
from searching import tiny_images


def searched(by_engine: bool = True, **settings) -> SearchLoop:
    """A whole search of 16 steps, looked at often."""
    config = SearchConfig(
        space="resnet14-cifar10", data="npz:tiny", epochs=2, batch_size=8, device="cpu", **settings
    ).filled()
    loop = SearchLoop(config, tiny_images())
    if not by_engine:
        loop.method._engine = None
    while loop.step < loop.num_steps:
        loop.advance()
    return loop


@pytest.mark.parametrize("method", ["spos", "mixture"])
@pytest.mark.parametrize("by_engine", [True, False])
def test_its_weights_are_the_same(method, by_engine, monkeypatch):
    few = searched(by_engine, method=method, supernets=1)
    monkeypatch.setattr(Problem, "validates", lambda self, step: True)
    all_steps = searched(by_engine, method=method, supernets=1)
    assert torch.equal(few.method.nets.arena, all_steps.method.nets.arena)
    assert few.method.cost.training_images == all_steps.method.cost.training_images == 128
    assert few.method.cost.validation_images * 4 == all_steps.method.cost.validation_images == 128
    visits = few.method.sampler.mixture.visits[:, 0]
    assert np.array_equal(visits, np.bincount(few.method.sampler.drawn[3:16:4], minlength=15))
    visited = visits > 0
    assert (few.method.sampler.mixture.scores[visited, 0] < 1).all()
    assert (few.method.sampler.mixture.scores[~visited, 0] == 1).all()


@pytest.mark.parametrize("by_engine", [True, False])
def test_until_the_split_there_is_one_supernet(by_engine):
    loop = searched(by_engine, supernets=2)
    mixture, drawn = loop.method.sampler.mixture, loop.method.sampler.drawn
    assert loop.method.cost.validation_images == 8 * (2 + 8)
    assert np.array_equal(mixture.visits.sum(1), np.bincount(drawn[[3, 7, *range(8, 16)]], minlength=15))


@pytest.mark.parametrize(
    "settings",
    [
        dict(supernets=2, split_after=0.0),
        dict(supernets=2, split_after=0.5, evaluate_top=3),
        dict(supernets=1, evaluate_top=3),
        dict(supernets=1, preset="paper"),
        dict(supernets=1, preset="authors"),
    ],
    ids=str,
)
def test_where_something_depends_on_them_every_step_is_validated(settings):
    assert searched(**settings).method.cost.validation_images == 128
