"""Logits of all 36 architectures at full width in one pass, against float64; counts of bfloat16 against float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.evaluator import all_pairs, make_plan, score_architectures
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from oracles import assert_no_worse


@pytest.fixture(scope="module")
def nets() -> SupernetMixture:
    generator = torch.Generator().manual_seed(0)
    found = SupernetMixture(SearchSpace.named("resnet20-cifar10"), 1, 10, generator=generator)
    head = found.arena.detach()[:, -650:]
    head[:, :640].view(10, 64).sub_(head[:, :640].view(10, 64).mean(1, keepdim=True))  # else one class is predicted
    return found


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def exact(nets: SupernetMixture, images: Tensor) -> Tensor:
    return one_by_one(nets, images)


@torch.no_grad()
def one_by_one(nets: SupernetMixture, images: Tensor) -> Tensor:
    """(36, N, 10)"""
    return torch.stack([nets(images, architecture, 0) for architecture in nets.space])


def one_pass(nets: SupernetMixture, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What `score_architectures` counts, before it is counted: (36, N, 10)."""
    pairs, found = all_pairs(nets), {}
    plan = make_plan(nets, images, pairs, batch_size=len(images))
    ends: Iterator[int] = iter([state.pair for wave in plan.waves for state in wave.states if state.pair is not None])

    def head(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, num_states: int, **_: object) -> Tensor:
        logits = F.linear(x.mean((2, 3), dtype=weight.dtype), weight[0], bias[0]).view(num_states, len(labels), -1)
        found.update({next(ends): part for part in logits})
        return logits.argmax(2).eq(labels).sum(1)

    monkeypatch.setattr("bmsn.execution.head", head)
    score_architectures(nets, images, torch.zeros(len(images), dtype=torch.int64), pairs, batch_size=len(images))
    return torch.stack([found[index] for index in range(len(pairs))])


def test_float32_logits_are_within_1e_4(
    nets: SupernetMixture, images: Tensor, exact: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = one_pass(nets, images.float(), monkeypatch)
    assert exact.std() > 0.05
    assert (found - exact).abs().max() < 1e-4


def test_bfloat16_logits_are_at_most_twice_as_far_from_float64_as_eager_ones(
    nets: SupernetMixture, images: Tensor, exact: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = one_pass(nets, images.bfloat16(), monkeypatch)
    monkeypatch.setenv("BMSN_BACKEND", "reference")
    eager = one_by_one(nets, images.bfloat16())
    for ours, theirs, wide in zip(found, eager, exact, strict=True):
        assert_no_worse(ours, eager=theirs, oracle=wide)


def test_bfloat16_counts_are_not_biased(nets: SupernetMixture) -> None:
    """Paired over all architectures: what bfloat16 counts more than float32 is within three standard errors of 0."""
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(128, 3, 32, 32, generator=generator), torch.randint(10, (128,), generator=generator)
    narrow, wide = (score_architectures(nets, images.to(dtype), labels) for dtype in (torch.bfloat16, torch.float32))
    more = (narrow.correct - wide.correct).double()
    assert more.abs().max() > 0  # there are ties to tell
    assert more.mean().abs() <= 3 * more.std() / len(more) ** 0.5
