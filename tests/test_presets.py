"""Presets, what wins over them, schedules and draws: what a search does before it has seen an image."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from scipy import stats

from bmsn.config import SearchConfig
from bmsn.errors import InputError
from bmsn.loop import SearchLoop
from bmsn.methods.draws import draw_architectures, draw_uniform, draw_weights
from bmsn.paths import architecture_path
from bmsn.search import main
from bmsn.space import SearchSpace
from bmsn.trainer import learning_rate
from searching import tiny_images


@pytest.mark.parametrize(
    ("preset", "space", "expected", "procedure"),
    [
        ("default", "resnet20-cifar10", dict(batch_size=256, lr=0.1, min_lr=1e-3, weight_decay=1e-3, schedule="inverse",
         balance_every=1, epochs=400, score="best", momentum=0.9, split_after=0.5),
         dict(ema_decay=0.9, tol=1e-12, milestones=(), anneal="step")),
        ("paper", "resnet20-cifar10", dict(batch_size=256, lr=0.1, min_lr=0.0, weight_decay=1e-3,
         schedule="temperature", balance_every=1, epochs=400, score="best"),
         dict(ema_decay=0.9, tol=1e-4, milestones=(), anneal="step", visits="independent")),
        ("authors", "resnet20-cifar10", dict(batch_size=128, lr=0.1, min_lr=1e-3, weight_decay=0.0, schedule="inverse",
         balance_every="epoch", epochs=101, score="pairs"),
         dict(ema_decay=0.9, tol=1e-4, anneal="epoch", visits="independent")),
        ("authors", "resnet18-cifar10", dict(epochs=400, weight_decay=5e-3, score="best"),
         dict(ema_decay=0.95, milestones=(0.5, 0.75), factor=0.1)),
        ("paper", "resnet50-cifar100", dict(epochs=1000), dict(milestones=(0.24, 0.48, 0.64), factor=0.2)),
        ("authors", "resnet50-food101", dict(weight_decay=1e-3, lr=0.1), dict(milestones=())),
    ],
)  # fmt: skip
def test_presets_are_the_published_ones(preset, space, expected, procedure):
    config = SearchConfig(data="cifar10:somewhere", space=space, preset=preset).filled()
    assert config.supernets == 4
    assert {name: getattr(config, name) for name in expected} == expected
    assert {name: getattr(config.procedure, name) for name in procedure} == procedure


def test_the_built_in_set_has_settings_of_its_own():
    config = SearchConfig().filled()
    assert (config.space, config.supernets, config.epochs, config.batch_size) == ("resnet14-cifar10", 2, 36, 64)
    assert (config.score, config.rank_by) == ("pairs", "best")
    assert config.split_after == 0.5
    assert SearchConfig(method="few-shot").filled().split_after == 0.5
    assert SearchConfig(method="spos").filled().split_after == 0
    other = dict(data="cifar10:somewhere", space="resnet20-cifar10")
    assert [SearchConfig(method=m, **other).filled().split_after for m in ("few-shot", "spos")] == [0.5, 0]
    assert SearchConfig(split_after=0.0).filled().split_after == 0
    paper = SearchConfig(preset="paper").filled()
    assert (paper.batch_size, paper.score, paper.split_after) == (256, "best", 0)
    other = SearchConfig(supernets=3, batch_size=128, score="best").filled()
    assert (other.epochs, other.batch_size, other.score, other.rank_by) == (54, 128, "best", "assigned")
    raced = SearchConfig(race=3).filled()
    assert (raced.score, raced.rank_by) == ("best", "assigned")


def test_what_is_drawn_equally_often_is_the_presets_choice():
    assert SearchConfig().filled().draw == SearchConfig(method="spos").filled().draw == "poolings"
    assert SearchConfig(preset="paper").filled().draw == SearchConfig(preset="authors").filled().draw == "architectures"
    assert SearchConfig(draw="architectures").filled().draw == "architectures"
    few_shot = SearchConfig(method="few-shot").filled()
    assert few_shot.draw is None  # it has no choice
    assert few_shot.filled() == few_shot
    with pytest.raises(InputError, match="draw does not fit method mcts: it must be None; got architectures"):
        SearchConfig(method="mcts", draw="architectures").filled()


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("draw", ["poolings", "first-pooling", "architectures"])
def test_architectures_are_drawn_as_often_as_their_weights_say(draw, in_blocks):
    space, num_steps = SearchSpace.named("resnet20-cifar10"), 36 * 8 * 40
    drawn = draw_architectures(space, num_steps, 0, draw=draw, in_blocks=in_blocks)
    weights = draw_weights(space, draw)
    expected = num_steps * weights / weights.sum()
    assert stats.chisquare(np.bincount(drawn, minlength=36), expected).pvalue > 1e-3
    late, early, middle = (
        expected[space.find(depths).index] / num_steps for depths in ((8, 1, 1), (1, 1, 8), (4, 3, 3))
    )
    if draw == "architectures":
        assert late == early == middle == pytest.approx(1 / 36)
    elif draw == "first-pooling":
        assert (late, early, middle) == pytest.approx((1 / 8, 1 / 64, 1 / 40))
    else:
        assert late == early == pytest.approx((1 / 8 + 1 / 64) / 2)
        assert middle == pytest.approx((1 / 8 / 5 + 1 / 8 / 6) / 2)


@pytest.mark.parametrize("space", ["resnet14-cifar10", "resnet18-cifar10"])
def test_every_position_of_a_pooling_is_drawn_equally_often(space):
    """Those of the pooling that was drawn: in blocks, each of its L - p positions once a block."""
    space, num_steps = SearchSpace.named(space), 6000
    which = draw_uniform(space.num_pools, num_steps, 0, in_blocks=True, purpose="poolings")
    drawn = draw_architectures(space, num_steps, 0, draw="poolings", in_blocks=True)
    positions = np.array([a.pool_positions for a in space])[drawn, which]
    for pooling in range(space.num_pools):
        counts = np.bincount(positions[which == pooling] - pooling - 1)
        assert len(counts) == space.num_layers - space.num_pools
        assert np.ptp(counts) <= 1


@pytest.mark.parametrize("max_macs", [None, "0.9x"])
def test_a_search_balances_by_what_it_draws(max_macs):
    config = SearchConfig(
        space="resnet14-cifar10", data="npz:given", supernets=2, epochs=15, batch_size=16, max_macs=max_macs,
        split_after=0.0,
    )  # fmt: skip
    loop = SearchLoop(config, tiny_images())
    sampler, searched = loop.method.sampler, list(loop.method.problem.space)
    assert len(searched) == (15 if max_macs is None else 8)
    drawn = np.bincount(sampler.drawn, minlength=len(searched))
    expected = sampler.mixture.weights / len(searched) * len(sampler.drawn)
    assert stats.chisquare(drawn, expected).pvalue > 1e-3
    assert np.ptp(expected) > 1
    while loop.step < 20:
        loop.advance()
    # The engine's potentials, from the balance of the last step, and not those that the host solves for on its own.
    z = sampler.mixture.scores * sampler.temperature(20) + sampler.mixture.potentials
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sampler.mixture.weights @ p / len(searched), 0.5, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sampler.metrics(20)["load"], 0.5, rtol=0, atol=1e-5)
    assert abs(p.mean(axis=0)[0] - 0.5) > 1e-4


@pytest.mark.parametrize("method", ["spos-unshared", "spos"])
@pytest.mark.parametrize("draw", ["first-pooling", "architectures"])
def test_methods_draw_as_they_are_told(method, draw):
    config = SearchConfig(
        space="resnet14-cifar10", data="npz:given", method=method, epochs=15, batch_size=16, draw=draw, seed=3
    )  # fmt: skip
    loop = SearchLoop(config, tiny_images())
    wanted = draw_architectures(loop.space, loop.num_steps, 3, draw=draw, in_blocks=True).tolist()
    if method == "spos":
        assert loop.method.sampler.drawn[: loop.num_steps].tolist() == wanted
    else:
        paths = [architecture_path(loop.space, loop.space[index]) for index in wanted]
        assert [loop.method.propose(step) for step in range(loop.num_steps)] == paths


def test_architectures_are_drawn_uniformly():
    blocks = draw_uniform(15, 15 * 400 + 7, 3, in_blocks=True)
    assert all(sorted(block) == list(range(15)) for block in blocks[: 15 * 400].reshape(400, 15).tolist())
    assert len(set(blocks[-7:].tolist())) == 7  # a block that is cut off holds none twice
    independent = draw_uniform(15, 15 * 400 + 7, 3, in_blocks=False)
    for drawn in (blocks, independent):
        assert drawn.shape == (15 * 400 + 7,)
        firsts = np.bincount(drawn[: 15 * 400 : 15], minlength=15)  # 400 draws of a place in the block
        assert stats.chisquare(firsts).pvalue > 1e-3
        assert not np.array_equal(drawn, draw_uniform(15, 15 * 400 + 7, 4, in_blocks=drawn is blocks))
    assert np.bincount(independent, minlength=15).max() > 410  # where blocks give each exactly 400


def test_learning_rate_follows_the_schedules():
    authors = SearchConfig(data="cifar10:x", space="resnet18-cifar10", preset="authors").filled().procedure
    assert [learning_rate(p, 0.1, 0.0, authors) for p in (0.0, 0.49, 0.5, 0.75)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001]
    )
    default = SearchConfig().procedure
    assert [learning_rate(p, 0.1, 1e-3, default) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.0505, 1e-3])


def test_given_flags_win_over_preset_and_file(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("preset: authors\nlr: 0.2\nseed: 3\n")
    assert main(["--config", str(file), "--seed", "4", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["lr"], printed["seed"], printed["batch_size"], printed["supernets"]) == (0.2, 4, 128, 2)
