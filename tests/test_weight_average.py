"""The mean of the last weights: which ones, against a mean in float64; in a search, resumed, with steps ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import bmsn
import bmsn.loop
from bmsn import weight_average
from bmsn.loop import SearchLoop
from bmsn.weight_average import WeightAverage
from searching import resumed_and_undisturbed, tiny_images, write_tiny_set

SPACE = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)


# One step in all; the last one alone; a share that k divides and one that it does not; more samples than steps.
@pytest.mark.parametrize(
    ("num_steps", "share", "samples"), [(1, 1.0, 100), (20, 0.01, 100), (20, 0.5, 5), (23, 0.7, 4), (9, 1.0, 100)]
)
def test_which_weights_and_their_mean(num_steps, share, samples, monkeypatch):
    monkeypatch.setattr(weight_average, "NUM_AVERAGED", samples)
    nets = bmsn.SupernetMixture(SPACE, 2, 4, generator=torch.Generator().manual_seed(0))
    average = WeightAverage(nets, num_steps, share)
    window = max(1, round(share * num_steps))
    due = [s for s in range(1, num_steps + 1) if s > num_steps - window and (num_steps - s) % average.every == 0]
    assert samples <= len(due) < 2 * samples or len(due) == window
    assert due[-1] == num_steps
    for step in range(num_steps):
        assert average.next_after(step) == min(s for s in due if s > step)
    history = []
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            nets.arena.add_(torch.randn(nets.arena.shape, generator=torch.Generator().manual_seed(step)))
        average.update(step, nets)
        history.append(nets.arena.detach().double().numpy().copy())
        assert average.count == sum(s <= step for s in due)
    expected = np.mean([history[s - 1] for s in due], axis=0)
    np.testing.assert_allclose(average.nets.arena.detach().numpy(), expected, atol=1e-5)


def config(**changes) -> bmsn.SearchConfig:
    given = dict(
        space="resnet14-cifar10", data="npz:given", supernets=2, epochs=2, batch_size=16, device="cpu", fast_eval=True,
        average_last=0.5,
    )  # fmt: skip
    return bmsn.SearchConfig(**given | changes)


def advanced(settings: bmsn.SearchConfig) -> tuple[SearchLoop, list[torch.Tensor]]:
    """A search after its last step, and the weights after each of them."""
    loop, arenas = SearchLoop(settings, tiny_images()), []
    while loop.step < loop.num_steps:
        loop.advance()
        arenas.append(loop.method.nets.arena.detach().double())
    return loop, arenas


@pytest.mark.parametrize("method", ["mixture", "few-shot"])  # on the engine, and step by step
def test_a_search_scores_the_mean(method, monkeypatch):
    monkeypatch.setattr(bmsn.loop, "compute_dtype", lambda device: torch.float32)
    supernets = 2 if method == "mixture" else None
    loop, arenas = advanced(config(method=method, supernets=supernets))
    assert loop.num_steps == 8
    mean = torch.stack(arenas[4:]).mean(0)
    torch.testing.assert_close(loop.method.average.nets.arena.detach().double(), mean, atol=1e-6, rtol=1e-5)
    scores = loop.score()
    with torch.no_grad():
        loop.method.nets.arena.copy_(mean)
    images, labels = loop.problem.validation_half()
    expected = bmsn.score_one_by_one(loop.method.nets, images, labels, scores.pairs, batch_size=16)
    assert (scores.correct - expected.correct).abs().max() <= 1  # rounding ties
    with torch.no_grad():
        loop.method.nets.arena.copy_(arenas[-1])
    last = bmsn.score_one_by_one(loop.method.nets, images, labels, scores.pairs, batch_size=16)
    assert (last.correct - expected.correct).abs().max() > 1  # the case does tell them apart


def test_before_the_share_begins_the_present_weights_are_scored():
    loop, plain = SearchLoop(config(), tiny_images()), SearchLoop(config(average_last=0.0), tiny_images())
    for search in (loop, plain):
        while search.step < 4:
            search.advance()
    assert loop.method.average.count == 0
    assert loop.score().correct.tolist() == plain.score().correct.tolist()


def test_steps_enqueued_ahead_give_the_same_mean(monkeypatch):
    """As on a GPU: the engine runs up to the next weights that are due, and not beyond."""
    monkeypatch.setattr(weight_average, "NUM_AVERAGED", 2)
    one_by_one, _ = advanced(config(split_after=0.0))
    monkeypatch.setattr("bmsn.methods.mixture.runs_ahead", lambda device: True)
    loop = SearchLoop(config(split_after=0.0), tiny_images())
    loop._every = 8
    loop._snapshots = {8}
    stops = []
    while loop.step < loop.num_steps:
        loop.advance()
        stops.append(loop.step)
    assert stops == [6, 8]
    assert torch.equal(loop.method.average.nets.arena, one_by_one.method.average.nets.arena)
    assert loop.method.average.count == one_by_one.method.average.count == 2


def test_a_resumed_search_has_the_same_mean_and_adapts_alike(tmp_path):
    settings = replace(
        config(data=write_tiny_set(tmp_path / "tiny.npz"), adapt=2, score_every=1, rank_by="mean"), average_last=0.7
    )
    stopped, undisturbed = resumed_and_undisturbed(settings, tmp_path)
    assert "average" in undisturbed[0]["method"]
    for first, second in zip(stopped, undisturbed, strict=True):
        assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(average_last=1.5), r"average_last must be in \[0, 1\]; got 1.5"),
        (dict(method="mcts", supernets=None), "average_last does not fit method mcts: it must be 0.0; got 0.5"),
        (dict(method="spos-unshared", supernets=None), "average_last does not fit method spos-unshared"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(bmsn.InputError, match=message):
        config(**changes).filled()
