"""`split_after`: one supernet trains alone, and then all of them begin as its copies."""

from __future__ import annotations

import pytest
import torch

import bmsn
from bmsn.loop import SearchLoop
from searching import resumed_and_undisturbed, tiny_images, write_tiny_set


def config(**changes) -> bmsn.SearchConfig:
    given = dict(
        space="resnet14-cifar10", data="npz:given", supernets=3, epochs=4, batch_size=16, device="cpu", fast_eval=True,
        split_after=0.5,
    )  # fmt: skip
    return bmsn.SearchConfig(**given | changes)


def advance(loop: SearchLoop, steps: int) -> None:
    while loop.step < steps:
        loop.advance()


@pytest.mark.parametrize("method", ["mixture", "few-shot"])  # on the engine, and step by step
def test_copies_of_one(method):
    changes = {"method": method} | ({"supernets": None} if method == "few-shot" else {})
    loop = SearchLoop(config(**changes), tiny_images())
    assert loop.num_steps == 16
    rows, start = loop.method.nets.arena, loop.method.nets.arena.detach().clone()
    advance(loop, 7)
    assert torch.equal(rows[1:], start[1:])
    assert not torch.equal(rows[0], start[0])
    advance(loop, 8)
    for tensor in (rows.detach(), loop.method.velocity):
        assert torch.equal(tensor, tensor[:1].expand_as(tensor))
    advance(loop, 16)
    trained = [m for m in range(len(rows)) if not torch.equal(rows[m], rows[(m + 1) % len(rows)])]
    assert len(trained) > 1


@pytest.mark.parametrize("method", ["mixture", "few-shot"])
def test_until_the_split_the_supernet_that_trains_stands_for_all(method):
    """Rankings on the way, fresh tables and averaged weights know none that has not trained."""
    changes = {"method": method} | ({"supernets": None} if method == "few-shot" else {})
    loop = SearchLoop(config(**changes, refresh_every=6, average_last=0.9), tiny_images())
    untouched = SearchLoop(config(**changes), tiny_images())
    advance(loop, 7)
    advance(untouched, 7)
    rows = loop.method.nets.arena
    assert torch.equal(rows[0], untouched.method.nets.arena[0])
    averaged = loop.method.average.nets.arena
    assert loop.method.average.count > 1
    assert torch.equal(averaged, averaged[:1].expand_as(averaged))
    first, second = (untouched.method.score([(a, m) for a in untouched.space], watching=True) for m in (0, 1))
    assert first.correct.tolist() == second.correct.tolist()
    if method == "mixture":
        assert (untouched.method.rank().supernet == 0).all()
    advance(untouched, 16)
    last = untouched.method.nets.arena.detach().clone()
    untouched.method.score(untouched.method.pairs(), watching=True)
    assert torch.equal(untouched.method.nets.arena, last)
    assert not torch.equal(last[0], last[1])


def test_only_the_first_is_drawn_and_the_schedule_begins_at_the_split():
    loop = SearchLoop(config(), tiny_images())
    sampler, mixture = loop.method.sampler, loop.method.sampler.mixture
    advance(loop, 7)
    assert mixture.visits[:, 0].sum() == 1  # of four steps alone one is validated
    assert (mixture.scores[:, 1:] == 1).all()
    advance(loop, 8)
    assert (mixture.scores == mixture.scores[:, :1]).all()
    assert (mixture.scores != 1).any()
    assert mixture.visits[:, 0].sum() == 2
    advance(loop, 16)
    assert (mixture.visits.sum(0)[1:] > 0).all()
    assert [sampler.temperature(step) for step in (0, 4, 8, 12, 16)] == [1, 1, 1, 50.5, 100]


def test_the_first_half_is_that_of_one_supernet():
    """Weights and draws of architectures are those of `spos` with as many steps and its learning rate."""
    split = SearchLoop(config(), tiny_images())
    one = SearchLoop(config(supernets=1, split_after=0.0), tiny_images())
    for loop in (split, one):
        loop.method.nets.arena.data[0] = 0.05 * torch.randn(
            loop.method.nets.arena.shape[1], generator=torch.Generator().manual_seed(0)
        )
        loop.method._engine.load(loop.method.sampler.supernet)
        advance(loop, 8)
    assert torch.equal(split.method.nets.arena[2], one.method.nets.arena[0])


def test_steps_enqueued_ahead_stop_at_the_split(monkeypatch):
    """As on a GPU."""
    one_by_one = SearchLoop(config(), tiny_images())
    advance(one_by_one, 16)
    monkeypatch.setattr("bmsn.methods.mixture.runs_ahead", lambda device: True)
    loop = SearchLoop(config(), tiny_images())
    loop._every, loop._snapshots = 16, {16}
    stops = []
    while loop.step < loop.num_steps:
        loop.advance()
        stops.append(loop.step)
    assert stops == [8, 16]
    assert torch.equal(loop.method.nets.arena, one_by_one.method.nets.arena)


def test_the_whole_search_may_be_one_supernets():
    loop = SearchLoop(config(split_after=1.0), tiny_images())
    advance(loop, 16)
    rows = loop.method.nets.arena
    assert torch.equal(rows, rows[:1].expand_as(rows))


def test_a_resumed_search_splits_alike(tmp_path):
    settings = config(data=write_tiny_set(tmp_path / "tiny.npz"), epochs=2, split_after=0.75)
    stopped, undisturbed = resumed_and_undisturbed(settings, tmp_path)
    for first, second in zip(stopped, undisturbed, strict=True):
        assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(split_after=1.5), r"split_after must be in \[0, 1\]; got 1.5"),
        (dict(method="mcts", supernets=None), "split_after does not fit method mcts: it must be 0.0; got 0.5"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(bmsn.InputError, match=message):
        config(**changes).filled()
