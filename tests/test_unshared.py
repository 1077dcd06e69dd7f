"""SPOS without sharing between resolutions: its step against torch.optim.SGD; what it draws, scores, finds, counts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bmsn
import bmsn.loop
from bmsn.config import SearchConfig
from bmsn.loop import SearchLoop
from bmsn.methods import unshared
from bmsn.methods.multires import forward_path, path_places
from bmsn.paths import architecture_path, parse_path, path_architecture, path_macs
from searching import plain, resumed_and_undisturbed, tiny_images, write_tiny_set

METHODS = ["spos-unshared", "spos-unshared-all"]


def make_loop(method, **changes):
    settings = dict(space="resnet14-cifar10", data="npz:tiny", epochs=2, batch_size=16, device="cpu") | changes
    return SearchLoop(SearchConfig(method=method, **settings), tiny_images())


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_torchs_sgd_which_leaves_out_what_a_step_did_not_use(method, monkeypatch):
    """Momentum and weight decay of a layer at another resolution stand still, as parameters without a gradient do."""
    monkeypatch.setattr(bmsn.loop, "compute_dtype", lambda device: torch.float32)
    loop = make_loop(method)
    nets, problem = loop.method.nets, loop.problem
    # A parameter for each (layer, resolution) and for the head, known to SGD from its first use on.
    own: dict[tuple[int, int, int], torch.Tensor] = {}

    def parts(path):
        found = []
        for row, columns in path_places(nets, path):
            key = (row, columns.start, columns.stop)
            if key not in own:
                own[key] = start[row, columns].clone().requires_grad_()
                optimiser.add_param_group({"params": [own[key]]})
            found.append(own[key])
        return found

    start = nets.arena.detach().clone()
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(loop.num_steps):
        path = loop.method.propose(step)
        images, labels = problem.train_batch(step)
        row = torch.cat(parts(path))
        optimiser.zero_grad()
        F.cross_entropy(forward_path(nets, row, images, path), labels).backward()
        for group in optimiser.param_groups:
            group["lr"] = problem.learning_rate(step)
        optimiser.step()
        loop.advance()
    expected = start.clone()
    for (row, first, stop), value in own.items():
        expected[row, first:stop] = value.detach()
    torch.testing.assert_close(nets.arena.detach(), expected, rtol=1e-3, atol=1e-5)
    untouched = expected == start
    assert torch.equal(nets.arena.detach()[untouched], start[untouched])
    assert 0 < untouched.sum() < untouched.numel()


def test_over_the_architectures_it_draws_as_spos_does():
    loop, spos = make_loop("spos-unshared", epochs=8), make_loop("spos", epochs=8)
    for step in range(loop.num_steps):
        index, _ = spos.method.sampler.propose(step)
        assert loop.method.propose(step) == architecture_path(loop.space, loop.space[index])
        spos.method.sampler.observe(step, index, 0, 0.5)


def test_over_all_paths_it_draws_each_resolution_of_each_layer_equally_often():
    loop = make_loop("spos-unshared-all", epochs=500)
    drawn = [loop.method.propose(step) for step in range(loop.num_steps)]
    assert len(drawn) == 2000
    assert 650 < len(set(drawn)) <= 729  # of 729; 682 expected
    for layer in range(1, 7):
        counts = Counter(path.resolutions[layer] for path in drawn)
        assert all(abs(counts[r] - 2000 / 3) < 5 * math.sqrt(2000 * 2 / 9) for r in range(3))
    assert all(path.resolutions[0] == 0 for path in drawn)
    assert sum(min(path.steps) < 0 for path in drawn) > 1000


@pytest.mark.parametrize("method", METHODS)
def test_what_it_knows_of_layers_and_architectures(method):
    loop = make_loop(method, epochs=5)
    accuracies, paths = [], []
    for step in range(loop.num_steps):
        paths.append(loop.method.propose(step))
        outcome = loop.method.step(step)
        accuracies.append(outcome.accuracy)
        assert outcome.trained == f"path {paths[-1]}"
    visits, averages = np.zeros((7, 3), int), np.zeros((7, 3))
    for path, accuracy in zip(paths, accuracies, strict=True):
        for layer, r in enumerate(path.resolutions):
            averages[layer, r] = 0.9 * averages[layer, r] + 0.1 * accuracy if visits[layer, r] else accuracy
            visits[layer, r] += 1
    snapshot = loop.method.snapshot(loop.num_steps)
    np.testing.assert_array_equal(snapshot["visits"], visits)
    np.testing.assert_allclose(snapshot["accuracy"], averages)
    if method == "spos-unshared":
        expected = np.full(15, np.nan)
        for path, accuracy in zip(paths, accuracies, strict=True):
            index = path_architecture(loop.space, path).index
            expected[index] = accuracy if np.isnan(expected[index]) else 0.9 * expected[index] + 0.1 * accuracy
    else:
        routes = [architecture_path(loop.space, a).resolutions for a in loop.space]
        expected = np.array([np.mean([averages[layer, r] for layer, r in enumerate(route)]) for route in routes])
    ranking = loop.method.rank()
    np.testing.assert_allclose(ranking.estimate, expected)
    ordered = ranking.estimate[ranking.order]
    known = np.isfinite(ordered)
    assert known.sum() > 5
    assert not known[np.count_nonzero(known) :].any()  # what was never drawn comes last
    assert (np.diff(ordered[known]) <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_cost_counts_each_path_by_itself(method):
    loop = make_loop(method)
    macs = lambda path: path_macs(loop.space, path, num_classes=4)  # noqa: E731
    drawn = [loop.method.propose(step) for step in range(loop.num_steps)]
    for _ in drawn:
        loop.advance()
    scores = loop.score()
    scored = [architecture_path(loop.space, a) for a in loop.space]
    cost = loop.method.cost
    assert cost.training_images == 16 * len(drawn)
    assert cost.training_macs == 3 * 16 * sum(map(macs, drawn))
    if method == "spos-unshared":
        assert cost.validation_images == 16 * len(drawn) + 64 * 15
        assert cost.validation_macs == 16 * sum(map(macs, drawn)) + 64 * sum(map(macs, scored))
    else:
        found = loop.method.findings()
        assert cost.validation_images == 16 * len(drawn) + 64 * (15 + found["paths_scored"])
    assert scores.total == 64
    before = loop.method.cost.as_dict()
    loop.method.score(loop.method.pairs(), watching=True)
    assert loop.method.cost.as_dict() == before


def test_the_best_path_is_no_worse_than_the_best_architecture_and_its_accuracy_is_its_own():
    loop = make_loop("spos-unshared-all", epochs=6)
    for _ in range(loop.num_steps):
        loop.advance()
    scores = loop.score()
    found = loop.method.findings()
    path = parse_path(loop.space, found["resolution_path"])
    images, labels = loop.problem.validation_half()
    nets, correct = loop.method.nets, 0
    row = torch.cat([nets.arena[r, columns] for r, columns in path_places(nets, path)])
    for start in range(0, 64, 16):
        logits = forward_path(nets, row, images[start : start + 16], path)
        correct += int((logits.argmax(1) == labels[start : start + 16]).sum())
    assert found["resolution_path_accuracy"] == correct / 64
    assert correct >= int(scores.correct.max())
    assert found["resolution_path_macs"] == path_macs(loop.space, path, num_classes=4)
    assert found["resolution_path"] in loop.method.notes()[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_changes_nothing(method, monkeypatch):
    loop = make_loop(method)
    before = loop.method.state_dict()
    monkeypatch.setattr(
        unshared, "descend", lambda row, velocity, *a, **k: (row.fill_(9), velocity.fill_(9), math.nan)[2]
    )
    outcome = loop.method.step(0)
    assert math.isnan(outcome.loss)
    assert outcome.accuracy is None
    assert plain(loop.method.state_dict()) == plain(before)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_it_ends_the_same(method, tmp_path):
    spec = write_tiny_set(tmp_path / "tiny.npz")
    config = dict(space="resnet14-cifar10", data=spec, epochs=3, batch_size=16, device="cpu", score_every=1)
    first, second = resumed_and_undisturbed(SearchConfig(method=method, **config), tmp_path)
    assert first == second


def test_a_space_that_strides_has_architectures_but_no_way_up():
    loop = make_loop("spos-unshared", pool="stride", epochs=1)
    loop.advance()
    assert loop.score().total == 64
    with pytest.raises(bmsn.InputError, match=r"pool must be max or avg for method spos-unshared-all.*got stride"):
        make_loop("spos-unshared-all", pool="stride")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(supernets=2), "supernets must be 1 for method spos-unshared"),
        (dict(race=3), "race does not fit method spos-unshared: it must be 0; got 3"),
        (dict(refresh_every=2), "refresh_every does not fit method spos-unshared"),
        (dict(norm="calibrated", fast_eval=True), "norm does not fit method spos-unshared: it must be batch"),
        (dict(alpha_lr=0.1), "alpha_lr does not fit method spos-unshared"),
        (dict(space="resnet18-imagenet", pool="max"), "images of 8 pixels; resnet18-imagenet needs a multiple of 32"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(bmsn.InputError, match=message):
        make_loop("spos-unshared", **changes)
