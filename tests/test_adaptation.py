"""Steps of adaptation before an architecture is scored: against torch's SGD, alone or in company, and their cost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import bmsn
from bmsn.adaptation import score_adapted
from bmsn.loop import SearchLoop
from searching import tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
SGD = dict(lr=0.05, momentum=0.9, weight_decay=1e-3)


@pytest.fixture
def nets() -> bmsn.SupernetMixture:
    return bmsn.SupernetMixture(SPACE, 2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """80 validation images: two statistics groups of 32 and one of 16. Their mean tells the class, faintly."""
    labels = torch.arange(80) % 4
    noise = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (noise + 0.3 * labels[:, None, None, None]).contiguous(memory_format=torch.channels_last), labels


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = (torch.arange(24) + step) % 4
    noise = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(100 + step))
    return (noise + 0.3 * labels[:, None, None, None]).contiguous(memory_format=torch.channels_last), labels


def adapted(nets, images, pairs, steps=3, score=bmsn.score_one_by_one):
    return score_adapted(nets, *images, pairs, steps=steps, batch=batch, batch_size=32, score=score, **SGD)


def test_against_torchs_sgd(nets, images):
    """A leaf trained by `torch.optim.SGD`, scored by the mixture's own forward pass."""
    pairs = [(SPACE[index], m) for index in (0, 7, 14) for m in range(2)]
    counts = adapted(nets, images, pairs).correct.tolist()
    expected, before = [], bmsn.score_one_by_one(nets, *images, pairs, batch_size=32).correct.tolist()
    for architecture, m in pairs:
        row = nets.arena[m].detach().clone().requires_grad_()
        optimiser = torch.optim.SGD([row], **SGD)
        for step in range(3):
            x, y = batch(step)
            optimiser.zero_grad()
            F.cross_entropy(nets.forward_row(row, x, architecture), y).backward()
            optimiser.step()
        with torch.no_grad():
            parts = zip(images[0].split(32), images[1].split(32), strict=True)
            expected.append(sum(int((nets.forward_row(row, x, architecture).argmax(1) == y).sum()) for x, y in parts))
    assert counts == expected
    assert counts != before  # three steps do something
    assert sum(counts) > sum(before)


def test_a_score_depends_on_its_own_pair_alone(nets, images):
    pairs = [(SPACE[index], m) for index in (3, 9) for m in range(2)]
    weights, state = nets.arena.detach().clone(), torch.get_rng_state()
    together = adapted(nets, images, pairs)
    assert together.pairs == tuple(pairs)
    assert together.total == 80
    backwards = adapted(nets, images, pairs[::-1])
    assert backwards.correct.flip(0).tolist() == together.correct.tolist()
    assert [int(adapted(nets, images, [pair]).correct) for pair in pairs] == together.correct.tolist()
    assert torch.equal(nets.arena, weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_steps_change_nothing(nets, images):
    pairs = [(SPACE[0], 0), (SPACE[14], 1)]
    plain = bmsn.score_one_by_one(nets, *images, pairs, batch_size=32)
    assert adapted(nets, images, pairs, steps=0).correct.tolist() == plain.correct.tolist()


def test_with_calibrated_statistics(nets, images):
    """Statistics are measured on the adapted weights: at a learning rate of 0, those of the plain ones."""
    score = partial(bmsn.score_architectures, norm="calibrated", calibration_images=batch(9)[0])
    pairs = [(SPACE[4], 1)]
    plain = score(nets, *images, pairs, batch_size=32)
    still = score_adapted(
        nets, *images, pairs, steps=2, batch=batch, batch_size=32, score=score, lr=0.0, momentum=0.9, weight_decay=0.0
    )
    assert still.correct.tolist() == plain.correct.tolist()


def config(**changes) -> bmsn.SearchConfig:
    given = dict(
        space="resnet14-cifar10", data="npz:given", supernets=2, epochs=2, batch_size=16, device="cpu", fast_eval=True
    )
    return bmsn.SearchConfig(**given | changes)


def test_a_search_counts_the_steps_it_adapts_by():
    """Eight training steps, then for each of the 15 architectures 3 steps of 16 images and 64 validation images."""
    loop = SearchLoop(config(adapt=3, adapt_lr=0.02), tiny_images())
    while loop.step < loop.num_steps:
        loop.advance()
    before = loop.method.cost.as_dict()
    loop.method.score([(loop.problem.space[0], 0)], watching=True)
    assert loop.method.cost.as_dict() == before  # rankings that only watch are not counted
    first = loop.score()
    cost = loop.method.cost.as_dict()
    macs = [loop.space.macs(a, num_classes=4) for a in loop.space]
    assert cost["training_images"] - before["training_images"] == 15 * 3 * 16
    assert cost["training_macs"] - before["training_macs"] == 3 * 3 * 16 * sum(macs)
    assert cost["validation_images"] - before["validation_images"] == 15 * 64
    assert first.correct.tolist() == loop.score().correct.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(adapt=-1), r"adapt must be in \[0, 1000000\]; got -1"),
        (dict(adapt_lr=-0.1), r"adapt_lr must be in \[0, 100\]; got -0.1"),
        (dict(adapt=5, race=3), "adapt trains each architecture before it is scored: race must be 0; got 3"),
        (dict(adapt=5, method="boltzmann", supernets=None), "adapt does not fit method boltzmann: it must be 0; got 5"),
        (dict(start_accuracy=2.0), r"start_accuracy must be in \[0, 1\]; got 2.0"),
        (dict(start_accuracy=0.5, method="few-shot", supernets=None), "start_accuracy does not fit method few-shot"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(bmsn.InputError, match=message):
        config(**changes).filled()


def test_averages_start_where_they_are_told_to():
    """a[c,m] of the pairs that no step has visited."""
    for start in (1.0, 0.25):
        loop = SearchLoop(config(start_accuracy=start, split_after=0.0), tiny_images())
        loop.advance()
        mixture = loop.method.sampler.mixture
        assert (mixture.scores[mixture.visits == 0] == start).all()
        (visited,) = mixture.scores[mixture.visits == 1]
        assert visited != start
