"""The learning of alpha on problems whose answer is known, without images."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from bmsn.methods.mixing import Simplex, Softmax
from bmsn.paths import ResolutionPath

CPU = torch.device("cpu")
COSTS = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.1, 0.2], [-1.0, 2.0, 0.5], [0.7, 0.6, -0.4]], dtype=torch.double)


def linear(shares):
    return (COSTS * shares).sum()


def make(kind, lr):
    return kind(4, 3, lr=lr, device=CPU)


def test_exponentiated_gradient_on_a_linear_loss_is_the_closed_form():
    """Its gradient is constant: after n steps s is proportional to exp(-n lr cost), which tends to the best vertex."""
    mixing = make(Simplex, 0.5)
    for step in range(1, 201):
        before = mixing.shares
        assert mixing.descend(linear) == pytest.approx(float((COSTS * before).sum()), abs=1e-12)
        closed = torch.exp(-0.5 * step * COSTS)
        torch.testing.assert_close(mixing.shares, closed / closed.sum(1, keepdim=True), rtol=1e-9, atol=1e-300)
    assert mixing.path == ResolutionPath((0, 1, 0, 2))
    assert mixing.shares[1:].amax(1).min() > 0.9999
    assert mixing.shares.min() > 0  # not even exp(-300) is lost


def test_shares_that_exp_cannot_hold_still_come_back():
    mixing = make(Simplex, 500.0)
    for _ in range(3):
        mixing.descend(linear)
    for _ in range(6):
        mixing.descend(lambda shares: -linear(shares))
    assert mixing.path == ResolutionPath((0, 0, 1, 0))
    assert mixing.logits.isfinite().all()


def test_adam_on_the_logits_follows_its_definition():
    """Kingma & Ba 2015, algorithm 1, with the gradient of the softmax written out."""
    mixing, logits = make(Softmax, 1e-2), torch.zeros(4, 3, dtype=torch.double)
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    for step in range(1, 30):
        mixing.descend(linear)
        s = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
        gradient = s * (COSTS - (COSTS * s).sum(1, keepdim=True))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        logits = logits - 1e-2 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(mixing.logits.detach()[1:], logits[1:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "lr", "steps"), [(Softmax, 1e-2, 1500), (Simplex, 0.1, 1500)])
def test_both_find_the_mixture_that_a_convex_loss_wants(kind, lr, steps):
    wanted = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    mixing = make(kind, lr)
    for _ in range(steps):
        mixing.descend(lambda shares: ((shares - wanted) ** 2).sum())
    torch.testing.assert_close(mixing.shares, wanted.expand(4, 3), rtol=1e-3, atol=1e-3)
    path = ResolutionPath((0, 1, 2, 0))
    assert mixing.mean_share(path) == pytest.approx((0.3 * 0.1 * 0.6) ** (1 / 3), rel=0.01)


@pytest.mark.parametrize("kind", [Softmax, Simplex])
def test_equal_shares_give_the_highest_resolution_and_a_loss_that_is_not_finite_changes_nothing(kind):
    mixing = make(kind, 0.1)
    assert mixing.path == ResolutionPath((0, 0, 0, 0))
    torch.testing.assert_close(mixing.shares, torch.full((4, 3), 1 / 3, dtype=torch.double))
    before = copy.deepcopy(mixing.state_dict())
    assert math.isnan(mixing.descend(lambda shares: linear(shares) * math.nan))
    assert math.isnan(mixing.descend(lambda shares: linear(shares).clamp(min=1e300) * 1e300))
    assert repr(mixing.state_dict()) == repr(before)


@pytest.mark.parametrize("kind", [Softmax, Simplex])
def test_saved_and_loaded_it_goes_on_bit_for_bit(kind):
    first, second = make(kind, 0.05), make(kind, 0.05)
    for _ in range(5):
        first.descend(linear)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for mixing in (first, second):
        for _ in range(5):
            mixing.descend(linear)
    assert torch.equal(first.logits, second.logits)
