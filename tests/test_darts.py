"""DARTS and GAEA over resolutions: their alternating steps written out, what they count, find and rank by."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bmsn
import bmsn.loop
from bmsn.config import SearchConfig
from bmsn.loop import SearchLoop
from bmsn.methods import darts
from bmsn.methods.multires import forward_mixed
from bmsn.paths import mixed_macs, parse_path, path_macs
from bmsn.retrain import main as retrain
from bmsn.run import run_search
from searching import resumed_and_undisturbed, tiny_images, write_tiny_images, write_tiny_set

METHODS = ["darts", "darts-unshared-same", "darts-unshared-random", "gaea"]


def make_loop(method, **changes):
    settings = dict(space="resnet14-cifar10", data="npz:tiny", epochs=2, batch_size=16, device="cpu") | changes
    return SearchLoop(SearchConfig(method=method, **settings), tiny_images())


@pytest.mark.parametrize("method", METHODS)
def test_steps_alternate_between_weights_and_alpha(method, monkeypatch):
    """torch's SGD on a training batch, then Adam on alpha, or eq. of GAEA, on a validation batch of the new weights."""
    monkeypatch.setattr(bmsn.loop, "compute_dtype", lambda device: torch.float32)
    loop = make_loop(method, epochs=1)
    nets, problem = loop.method.nets, loop.problem
    weights = nets.arena.detach().clone().requires_grad_()
    sgd = torch.optim.SGD([weights], lr=0.1, momentum=0.9, weight_decay=1e-3)
    alpha = torch.zeros(7, 3, dtype=torch.double).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=1e-2)
    shares = torch.full((7, 3), 1 / 3, dtype=torch.double)
    for step in range(loop.num_steps):
        images, labels = problem.train_batch(step)
        sgd.param_groups[0]["lr"] = problem.learning_rate(step)
        sgd.zero_grad()
        loss = F.cross_entropy(forward_mixed(nets, weights, images, shares), labels)
        loss.backward()
        sgd.step()
        images, labels = problem.validation_batch(step)
        if method == "gaea":
            leaf = shares.clone().requires_grad_()
            logits = forward_mixed(nets, weights.detach(), images, leaf)
            F.cross_entropy(logits, labels).backward()
            shares = shares * torch.exp(-0.1 * leaf.grad)
            shares = shares / shares.sum(1, keepdim=True)
        else:
            adam.zero_grad()
            logits = forward_mixed(nets, weights.detach(), images, alpha.softmax(1))
            F.cross_entropy(logits, labels).backward()
            adam.step()
            shares = alpha.detach().softmax(1)
        outcome = loop.method.step(step)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-4)
        assert outcome.accuracy == (logits.argmax(1) == labels).double().mean().item()
    torch.testing.assert_close(nets.arena.detach(), weights.detach(), rtol=1e-3, atol=1e-4)
    found = loop.method.mixing.shares
    torch.testing.assert_close(found[1:], shares[1:], rtol=1e-4, atol=1e-6)
    assert (found[1:] - 1 / 3).abs().max() > 1e-3


def test_sets_of_weights_and_how_they_begin():
    rows = {method: make_loop(method).method.nets.arena.detach() for method in METHODS}
    assert {method: len(arena) for method, arena in rows.items()} == dict(zip(METHODS, (1, 3, 3, 1), strict=True))
    same, random = rows["darts-unshared-same"], rows["darts-unshared-random"]
    assert torch.equal(same[1], same[0])
    assert torch.equal(same[2], same[0])
    assert not torch.equal(random[1], random[0])
    assert not torch.equal(random[2], random[1])
    for arena in rows.values():
        assert torch.equal(arena[0], rows["darts"][0])


def test_alpha_lr_is_that_of_the_method_unless_given():
    assert make_loop("darts").method.mixing.lr == 1e-2
    assert make_loop("gaea").method.mixing.lr == 0.1
    assert make_loop("gaea", alpha_lr=0.5).method.mixing.lr == 0.5


def test_the_ranking_is_that_of_the_shares_along_each_architecture():
    loop = make_loop("darts")
    shares = np.random.default_rng(0).dirichlet([1, 1, 1], size=7)
    with torch.no_grad():
        loop.method.mixing.logits.copy_(torch.from_numpy(np.log(shares)) + 3)  # a shift of a row changes nothing
    likelihood = []
    for a in loop.space:
        resolutions = np.repeat([0, 1, 2], a.stage_depths)
        likelihood.append(np.prod([shares[layer, r] for layer, r in enumerate(resolutions) if layer]))
    ranking = loop.method.rank()
    assert ranking.order.tolist() == np.argsort(-np.array(likelihood)).tolist()
    np.testing.assert_allclose(ranking.estimate**6, likelihood, rtol=1e-9)
    rows = loop.rank(loop.score())
    assert [row.architecture.index for row in rows] == ranking.order.tolist()
    assert all(row.accuracy is None and row.supernet is None and row.images_seen == 0 for row in rows)

    best = (0, *shares[1:].argmax(1))
    found = loop.method.findings()
    assert found["resolution_path"] == "-".join(map(str, best))
    assert found["resolution_path_macs"] == path_macs(
        loop.space, parse_path(loop.space, found["resolution_path"]), num_classes=4
    )
    assert found["resolution_path"] in loop.method.notes()[0]
    np.testing.assert_allclose(found["shares"], shares)


def test_a_path_inside_the_space_is_named_as_the_architecture():
    loop = make_loop("gaea")
    with torch.no_grad():
        loop.method.mixing.logits[torch.arange(7), torch.tensor([2, 0, 1, 1, 1, 2, 2])] += 1
    found = loop.method.findings()
    assert (found["resolution_path"], found["resolution_path_architecture"]) == ("0-0-1-1-1-2-2", "2-3-2")
    assert found["resolution_path_macs"] == loop.macs[loop.space.find("2-3-2").index]
    assert loop.rank(loop.score())[0].architecture.slug == "2-3-2"
    assert "[2,3,2]" in loop.method.notes()[0]


def test_cost_counts_all_resolutions_and_the_gradient_of_alpha():
    loop = make_loop("darts")
    for _ in range(loop.num_steps):
        loop.advance()
    loop.score()
    images, macs = 16 * loop.num_steps, mixed_macs(loop.space, num_classes=4)
    assert loop.method.cost.as_dict() == {
        "training_images": images, "validation_images": images,
        "training_macs": 3 * images * macs, "validation_macs": 2 * images * macs,
    }  # fmt: skip
    assert macs > max(loop.macs)


def test_a_loss_that_is_not_finite_changes_nothing(monkeypatch):
    loop = make_loop("darts")
    loop.advance()
    before = loop.method.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(darts, "descend", lambda *a, **k: math.nan)
        outcome = loop.method.step(1)
    assert math.isnan(outcome.loss)
    assert outcome.accuracy is None
    assert repr(loop.method.state_dict()["mixing"]) == repr(before["mixing"])
    # The weights were trained, but the loss of the validation batch is not finite: alpha stands still.
    real = darts.forward_mixed
    monkeypatch.setattr(
        darts, "forward_mixed", lambda nets, rows, *a: real(nets, rows, *a) * (1 if rows.requires_grad else math.inf)
    )
    outcome = loop.method.step(1)
    assert math.isfinite(outcome.loss)
    assert outcome.accuracy is None
    assert repr(loop.method.state_dict()["mixing"]) == repr(before["mixing"])


@pytest.mark.parametrize("method", ["darts-unshared-random", "gaea"])
def test_stopped_and_resumed_it_ends_the_same(method, tmp_path):
    spec = write_tiny_set(tmp_path / "tiny.npz")
    config = dict(space="resnet14-cifar10", data=spec, epochs=3, batch_size=16, device="cpu", score_every=1)
    first, second = resumed_and_undisturbed(SearchConfig(method=method, **config), tmp_path)
    assert first == second
    alphas = [record for record in first[1] if record["kind"] == "alpha"]
    assert len(alphas) == 12
    assert all(np.shape(record["shares"]) == (7, 3) for record in alphas)


def test_what_it_found_is_in_the_result_and_is_retrained_as_it_is(tmp_path, capsys):
    spec = write_tiny_images(tmp_path / "tiny.npz")
    out = tmp_path / "run"
    config = dict(space="resnet14-cifar10", data=spec, epochs=2, batch_size=16, device="cpu", alpha_lr=0.3)
    result = run_search(SearchConfig(method="darts", out=out, **config))
    found = json.loads((out / "result.json").read_text())["method"]
    assert found["resolution_path_architecture"] is None, "choose another seed: this path is an architecture"
    shown = result.to_table()
    assert found["resolution_path"] in shown
    assert "No architecture was scored by itself." in shown
    flags = ["--epochs", "2", "--batch-size", "16", "--device", "cpu", "--seeds", "1"]
    assert retrain([str(out), "--top", "1", *flags]) == 0
    rows = [line.split(",")[0] for line in (out / "retrain.csv").read_text().splitlines()[2:]]
    assert rows[-1] == found["resolution_path"]
    assert set(rows) == {result.best.architecture.slug, "3-2-2", found["resolution_path"]}
    assert found["resolution_path"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("darts", dict(pool="stride"), r"pool must be max or avg for method darts.*got stride"),
        ("gaea", dict(space="resnet18-cifar10"), r"pool must be max or avg for method gaea.*got stride"),
        ("darts", dict(supernets=3), "supernets must be 1 for method darts"),
        ("darts", dict(evaluate_top=3), "evaluate_top does not fit method darts: it must be 0; got 3"),
        ("darts", dict(race=3), "race does not fit method darts"),
        ("darts", dict(norm="calibrated", fast_eval=True), "norm does not fit method darts"),
        ("darts", dict(alpha_lr=0.0), "alpha_lr must be in"),
        ("darts", dict(alpha_lr=math.nan), "alpha_lr must be in"),
        ("spos", dict(alpha_lr=0.1), "alpha_lr does not fit method spos: it must be None; got 0.1"),
        ("gaea", dict(space="resnet18-imagenet", pool="avg"), "images of 8 pixels; resnet18-imagenet needs a multiple"),
    ],
)
def test_bad_input(method, changes, message):
    with pytest.raises(bmsn.InputError, match=message):
        make_loop(method, **changes)
