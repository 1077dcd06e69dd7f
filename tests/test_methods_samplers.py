"""Methods on toy problems with known answers: what is observed is made up, and no network takes a step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bmsn import methods
from bmsn.config import Procedure, SearchConfig
from bmsn.errors import InputError
from bmsn.loop import SearchLoop
from bmsn.methods.averages import MovingAverages
from bmsn.methods.boltzmann import BoltzmannSampler
from bmsn.methods.draws import pooling_groups
from bmsn.methods.few_shot import FewShotSampler
from bmsn.methods.mcts import MctsSampler
from bmsn.methods.mixture import MixtureSampler
from bmsn.methods.supernet import SupernetMethod
from bmsn.methods.unshared import UnsharedPaths
from bmsn.paths import architecture_path
from bmsn.space import SearchSpace
from searching import tiny_images

TINY = SearchSpace(5, 2, [4] * 5, image_size=8)  # 6 architectures: 12, 13, 14, 23, 24, 34
LARGER = SearchSpace.named("resnet14-cifar10", width=0.25)  # 15


def mcts(space=TINY, num_steps=400, seed=0, constant=0.5, warm_up=0.0, in_blocks=False) -> MctsSampler:
    return MctsSampler(space, num_steps, seed, constant=constant, warm_up=warm_up, in_blocks=in_blocks)


def boltzmann(space=TINY, num_steps=400, seed=0, decay=0.9, warm_up=0.0, in_blocks=False) -> BoltzmannSampler:
    return BoltzmannSampler(space, num_steps, seed, decay=decay, warm_up=warm_up, in_blocks=in_blocks)


def mixture(space=TINY, num_supernets=2, num_steps=400, seed=0) -> MixtureSampler:
    return MixtureSampler(
        space, num_supernets, num_steps, seed,
        procedure=Procedure(), balance_every=1, temperature=lambda step: 1 + 99 * step / num_steps,
    )  # fmt: skip


def play(sampler, num_steps, reward, first=0) -> list[int]:
    """The architectures proposed, each observed with `reward(step, architecture)`."""
    proposed = []
    for step in range(first, num_steps):
        architecture, supernet = sampler.propose(step)
        sampler.observe(step, architecture, supernet, reward(step, architecture))
        proposed.append(architecture)
    return proposed


def noisy(means, seed=0):
    """Shares of 16 coins, as accuracies of a minibatch are."""
    random = np.random.default_rng(seed)
    return lambda step, architecture: random.binomial(16, means[architecture]) / 16


def make_loop(method, **changes) -> SearchLoop:
    settings = dict(space="resnet14-cifar10", data="npz:tiny", batch_size=16, device="cpu") | changes
    return SearchLoop(SearchConfig(method=method, **settings), tiny_images())


# All that try one architecture, or path, a step. ----------------------------------------------------------------------


@pytest.mark.parametrize(("best", "wanted"), [("5,1,1", {4: 0}), ("2,4,1", {1: 0, 2: 1, 5: 1}), ("1,1,5", {2: 2})])
@pytest.mark.parametrize(
    "method", [name for name in methods.names() if issubclass(methods.get(name), SupernetMethod | UnsharedPaths)]
)
def test_finds_the_best_arm(method, best, wanted):
    """Accuracy is a matter of the resolution of one layer, or of three, and only one architecture has it right."""
    loop = make_loop(method, epochs=400)
    space, coins = loop.space, np.random.default_rng(0)

    def mean(path):
        return 0.2 + 0.6 * np.mean([path.resolutions[layer] == r for layer, r in wanted.items()])

    paths = [architecture_path(space, architecture) for architecture in space]
    for step in range(loop.num_steps):
        if isinstance(loop.method, UnsharedPaths):
            path = loop.method.propose(step)
            loop.method.observe(step, path, coins.binomial(64, mean(path)) / 64)
        else:
            architecture, supernet = loop.method.sampler.propose(step)
            accuracy = coins.binomial(64, mean(paths[architecture])) / 64
            loop.method.sampler.observe(step, architecture, supernet, accuracy)
    order = loop.method.rank().order
    assert space[int(order[0])] == space.find(best)
    assert sorted(order.tolist()) == list(range(15))


# The balanced mixture, and that of one. -------------------------------------------------------------------------------


def test_a_single_supernet_learns_every_mean():
    """SPOS: each average forgets the 1 that it began with, and ends within its noise of the mean that is known."""
    means, num_steps = np.linspace(0.3, 0.8, 6)[[3, 0, 5, 1, 4, 2]], 1200
    sampler = mixture(num_supernets=1, num_steps=num_steps)
    assert np.bincount(play(sampler, num_steps, lambda step, c: means[c])).tolist() == [200] * 6
    ranking = sampler.rank()
    assert ranking.estimate == pytest.approx(means, abs=1e-8)  # 0.9^200 = 7e-10
    assert ranking.order.tolist() == [2, 4, 0, 5, 3, 1]
    assert ranking.supernet.tolist() == [0] * 6
    noise = []
    for seed in range(50):
        sampler = mixture(num_supernets=1, num_steps=num_steps, seed=seed)
        play(sampler, num_steps, noisy(means, seed))
        noise.append(sampler.rank().estimate - means)
    # Variance of the average of accuracies, each of 16 coins: (1 - 0.9) / (1 + 0.9) of theirs.
    deviation = np.sqrt(means * (1 - means) / 16 * 0.1 / 1.9)
    assert np.abs(np.mean(noise, axis=0) / deviation * 50**0.5).max() < 3.5
    assert 1e-3 < stats.chi2(300).cdf(((noise / deviation) ** 2).sum()) < 1 - 1e-3


def test_the_mixture_gives_each_supernet_the_half_that_it_is_good_at():
    sampler = mixture(num_steps=1200)
    steps = []
    for step in range(1200):
        architecture, supernet = sampler.propose(step)
        good = (architecture < 3) == (supernet == 1)
        sampler.observe(step, architecture, supernet, 0.3 + 0.01 * architecture + 0.4 * good)
        steps.append((architecture, supernet))
    ranking = sampler.rank()
    assert ranking.supernet.tolist() == [1, 1, 1, 0, 0, 0]
    assert ranking.order.tolist() == [5, 4, 3, 2, 1, 0]
    assert ranking.estimate == pytest.approx(0.7 + 0.01 * np.arange(6), abs=1e-6)
    assert np.bincount([c for c, _ in steps]).tolist() == [200] * 6  # in blocks
    assert sampler.metrics(1200)["load"] == pytest.approx([0.5, 0.5])
    assert sampler.mixture.visits.sum() == 1200
    late = steps[-300:]
    assert sum((c < 3) == (m == 1) for c, m in late) > 290


def test_a_refresh_replaces_the_table_of_the_mixture():
    sampler, table = mixture(), np.linspace(0.2, 0.8, 12).reshape(6, 2)
    assert sampler.pairs() == [(c, m) for c in range(6) for m in range(2)]
    sampler.refresh(sampler.pairs(), table.ravel())
    assert np.array_equal(sampler.mixture.scores, table)


# Monte-Carlo tree search. ---------------------------------------------------------------------------------------------


def assert_eq6(space, history, proposed, constant) -> None:
    """Every decision of `proposed` is one that eq. 6 allows, from the list of all (architecture, reward) so far."""
    alike = list(space)  # architectures that share the decisions taken so far
    for layer in range(1, space.num_layers):
        here = [(a, r) for a, r in history if space[a] in alike]
        values = {}
        for pools in (False, True):
            below = [a for a in alike if (layer in a.pool_positions) == pools]
            if below:
                rewards = [r for a, r in here if space[a] in below]
                n = len(rewards)
                values[pools] = math.fsum(rewards) / n + constant * (math.log(len(here)) / n) ** 0.5 if n else math.inf
        pools = layer in space[proposed].pool_positions
        assert values[pools] == pytest.approx(max(values.values()), rel=1e-12)
        alike = [a for a in alike if (layer in a.pool_positions) == pools]
    assert alike == [space[proposed]]


@pytest.mark.parametrize(("space", "constant"), [(TINY, 0.3), (TINY, 1.5), (LARGER, 0.7)])
def test_every_descent_is_that_of_eq_6(space, constant):
    sampler, history = mcts(space, constant=constant), []
    reward = noisy(np.linspace(0.3, 0.8, len(space)))
    for step in range(150):
        proposed, _ = sampler.propose(step)
        assert sampler.propose(step)[0] == proposed  # asking changes nothing
        assert_eq6(space, history, proposed, constant)
        value = reward(step, proposed)
        sampler.observe(step, proposed, 0, value)
        history.append((proposed, value))


@pytest.mark.parametrize("best", range(6))
def test_the_most_visited_path_is_the_best_leaf(best):
    means = np.full(6, 0.4)
    means[best] = 0.8
    sampler = mcts()
    proposed = play(sampler, 400, noisy(means, seed=best))
    assert sampler.rank().order[0] == best
    assert np.bincount(proposed, minlength=6).argmax() == best
    assert sampler.findings()["path"][0]["keep"] + sampler.findings()["path"][0]["pool"] == 400


def test_a_large_constant_explores_and_none_exploits():
    means = [0.5, 0.5, 0.5, 0.5, 0.5, 0.6]
    wide, greedy = (play(mcts(constant=c), 400, lambda step, a: means[a]) for c in (50.0, 0.0))
    # With c = 50 rewards do not matter: of two children each is taken equally often. Two such decisions lead to
    # poolings before 1, 2 and before 3, 4; three to the others.
    assert np.bincount(wide, minlength=6) / 400 == pytest.approx([1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 4], abs=0.02)
    assert np.bincount(greedy, minlength=6).max() > 390


def test_ranking_goes_down_the_tree_by_visits():
    sampler = mcts()
    # Visits of the leaves 12, 13, 14, 23, 24, 34. 9 do not pool before layer 1, so [24] and [34] come before [13],
    # which has more visits than either; and 6 of the 9 pool before layer 2, so [24] comes before [34].
    for architecture, count in enumerate([1, 4, 0, 5, 1, 3]):
        for _ in range(count):
            sampler.observe(0, architecture, 0, 0.25 * architecture)
    ranking = sampler.rank()
    assert ranking.order.tolist() == [3, 4, 5, 1, 2, 0]
    assert mcts().rank().order.tolist() == [5, 4, 3, 2, 1, 0]  # all equal: keep before pool
    assert ranking.estimate.tolist()[:2] == [0.0, 0.25]
    assert math.isnan(ranking.estimate[2])
    assert sampler.findings()["path"] == [
        {"layer": 1, "keep": 9, "pool": 5},
        {"layer": 2, "keep": 3, "pool": 6},
        {"layer": 3, "keep": 1, "pool": 5},
        {"layer": 4, "keep": 5, "pool": None},
    ]
    snapshot = sampler.snapshot(14)
    assert snapshot["visits"] == [[14], [9, 5], [3, 4, 6, 1], [0, 1, 3, 1, 4, 5], [1, 4, 0, 5, 1, 3]]
    assert snapshot["reward"][-1][3] == 0.75


def test_a_skipped_step_leaves_the_tree_alone():
    sampler = mcts()
    sampler.observe(0, 3, 0, None)
    assert sampler.visits.sum() == 0
    with pytest.raises(InputError, match="architecture 3 must be finite; got nan"):
        sampler.observe(0, 3, 0, math.nan)


# Boltzmann exploration. -----------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_eq_7():
    sampler = boltzmann(num_steps=1000)
    for architecture, accuracies in enumerate([[0.5], [0.6, 0.2], [], [0.55], [0.1], [0.52]]):
        for accuracy in accuracies:
            sampler.observe(0, architecture, 0, accuracy)
    a = [0.5, 0.9 * 0.6 + 0.1 * 0.2, 1.0, 0.55, 0.1, 0.52]  # the third was not seen
    for step, k in ((0, 1.0), (500, 50.5), (999, 1 + 99 * 0.999)):
        total = math.fsum(math.exp(k * value) for value in a)
        assert sampler.inverse_temperature(step) == pytest.approx(k)
        assert sampler.probabilities(step) == pytest.approx([math.exp(k * value) / total for value in a])
        entropy = stats.entropy([math.exp(k * value) / total for value in a])
        assert sampler.metrics(step)["entropy"] == pytest.approx(entropy)


def test_draws_follow_the_probabilities():
    sampler = boltzmann(num_steps=4000)
    for architecture in range(6):
        sampler.observe(0, architecture, 0, 0.5 + 0.02 * architecture)
    p = np.array([sampler.probabilities(step) for step in range(4000)])
    counts = np.bincount([sampler.propose(step)[0] for step in range(4000)], minlength=6)
    z = (counts - p.sum(0)) / np.sqrt((p * (1 - p)).sum(0))
    assert np.abs(z).max() < 3.5
    assert [boltzmann(seed=1).propose(step) for step in range(50)] != [boltzmann().propose(step) for step in range(50)]


@pytest.mark.parametrize("warm_up", [0.0, 0.5])
def test_boltzmann_settles_on_the_best_arm(warm_up):
    sampler = boltzmann(LARGER, num_steps=1500, warm_up=warm_up)
    proposed = play(sampler, 1500, noisy(np.r_[np.full(14, 0.4), 0.9]))
    assert sampler.rank().order[0] == 14
    late = np.bincount(proposed[-100:], minlength=15)
    assert late[14] > 90


def test_what_was_never_drawn_ranks_last():
    sampler = boltzmann()
    for architecture, accuracy in ((4, 0.2), (2, 0.3)):
        sampler.observe(0, architecture, 0, accuracy)
    ranking = sampler.rank()
    assert ranking.order.tolist() == [2, 4, 0, 1, 3, 5]
    assert np.isnan(ranking.estimate[[0, 1, 3, 5]]).all()
    sampler.observe(0, 0, 0, None)
    assert sampler.averages.visits.tolist() == [0, 0, 1, 0, 1, 0]
    with pytest.raises(InputError, match="architecture 0 must be finite; got inf"):
        sampler.observe(0, 0, 0, math.inf)


# Warm-up. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mcts, boltzmann])
def test_the_warm_up_is_uniform_whatever_is_observed(make):
    sampler = make(LARGER, num_steps=6000, warm_up=0.5)
    proposed = play(sampler, 6000, lambda step, architecture: float(architecture == 3))
    counts = np.bincount(proposed[:3000], minlength=15)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert counts.max() > 200  # independent draws; blocks would give each exactly 200
    assert np.bincount(proposed[3000:], minlength=15)[3] > 1000  # and afterwards it is not
    blocks = make(LARGER, num_steps=6000, warm_up=0.5, in_blocks=True)
    assert np.bincount(play(blocks, 3000, lambda *_: 0.5), minlength=15).tolist() == [200] * 15


def test_the_inverse_temperature_starts_after_the_warm_up():
    sampler = boltzmann(num_steps=1000, warm_up=0.5)
    assert [sampler.inverse_temperature(step) for step in (0, 500, 750, 1000)] == [1, 1, 50.5, 100]
    assert sampler.probabilities(499).tolist() == [1 / 6] * 6
    whole = boltzmann(num_steps=1000, warm_up=1.0)
    assert whole.inverse_temperature(1000) == 1
    assert len(set(play(whole, 1000, lambda *_: 0.5))) == 6


# Few-shot. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),  # architectures whose first pooling is before layer 1, 2, ...: C(L - 1 - first, p - 1)
    [("resnet14-cifar10", [5, 4, 3, 2, 1]), ("resnet20-cifar10", [8, 7, 6, 5, 4, 3, 2, 1]),
     ("resnet18-imagenet", [15, 10, 6, 3, 1])],
)  # fmt: skip
def test_supernets_are_split_by_the_first_pooling(name, sizes):
    space = SearchSpace.named(name)
    groups = pooling_groups(space, 0)
    assert np.bincount(groups).tolist() == sizes
    assert all(space[i].pool_positions[0] == group + 1 for i, group in enumerate(groups))
    sampler = FewShotSampler(space, 10, 0, decay=0.9, in_blocks=True)
    assert sampler.pairs() == [(i, space[i].stage_depths[0] - 1) for i in range(len(space))]


@pytest.mark.parametrize("in_blocks", [True, False])
def test_supernets_train_equally_often_and_so_do_architectures_within_one(in_blocks):
    sampler = FewShotSampler(LARGER, 3000, 5, decay=0.9, in_blocks=in_blocks)
    proposed = [sampler.propose(step) for step in range(3000)]
    assert all(supernet == LARGER[architecture].pool_positions[0] - 1 for architecture, supernet in proposed)
    loads = np.bincount([supernet for _, supernet in proposed])
    visits = np.bincount([architecture for architecture, _ in proposed])
    if in_blocks:
        assert loads.tolist() == [600] * 5
        assert visits.tolist() == [120] * 5 + [150] * 4 + [200] * 3 + [300] * 2 + [600]
    else:
        assert stats.chisquare(loads).pvalue > 1e-3
        assert all(stats.chisquare(visits[sampler.group == m]).pvalue > 1e-3 for m in range(4))
        assert len(set(loads)) > 1


def test_moving_averages():
    averages = MovingAverages(3, 0.75)
    for accuracy in (0.4, 0.8, 0.0):
        averages.observe(1, accuracy)
    averages.observe(2, 0.4)
    assert averages.values[1] == pytest.approx(0.75 * (0.75 * 0.4 + 0.25 * 0.8))
    assert averages.visits.tolist() == [0, 3, 1]
    assert averages.order().tolist() == [2, 1, 0]  # 0.4 before 0.375 before unknown


@pytest.mark.parametrize("make", [boltzmann, lambda: FewShotSampler(TINY, 400, 0, decay=0.9, in_blocks=True)])
def test_a_refresh_replaces_the_moving_averages(make):
    sampler = make()
    sampler.observe(0, 1, 0, 0.5)
    sampler.refresh(sampler.pairs(), np.linspace(0.1, 0.6, 6))
    assert sampler.rank().estimate.tolist() == np.linspace(0.1, 0.6, 6).tolist()
    assert sampler.averages.visits.tolist() == [0, 1, 0, 0, 0, 0]


# Without training. ----------------------------------------------------------------------------------------------------


def order_by(method, problem, **changes) -> list[int]:
    return methods.get(method)(replace(problem, **changes)).rank().order.tolist()


def test_chance_ranks_in_every_order_equally_often():
    problem = make_loop("random").problem
    configs = [replace(problem.config, seed=seed) for seed in range(3000)]
    three = SearchSpace(4, 2, [4] * 4, image_size=8)  # architectures, in 6 orders
    orders = [order_by("random", problem, config=config, space=three) for config in configs]
    assert stats.chisquare(np.unique(orders, axis=0, return_counts=True)[1]).pvalue > 1e-3
    assert len(set(map(tuple, orders))) == 6
    first = [order_by("random", problem, config=config)[0] for config in configs]
    assert stats.chisquare(np.bincount(first, minlength=15)).pvalue > 1e-3


def test_macs_rank_the_dearest_first():
    problem = make_loop("macs").problem
    assert order_by("macs", problem, space=TINY, macs=(5, 7, 7, 1, 9, 3)) == [4, 1, 2, 0, 5, 3]  # equal ones by index
    # A pooling before layer l leaves the l layers before it as they were: the later both are, the dearer.
    order = [LARGER[i].pool_positions for i in order_by("macs", problem)]
    place = {positions: rank for rank, positions in enumerate(order)}
    assert order[0] == (5, 6)
    assert order[-1] == (1, 2)
    assert all(place[a, b] < place[c, d] for a, b in order for c, d in order if a >= c and b >= d and (a, b) != (c, d))


# State. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: mixture(LARGER),
        lambda: mcts(LARGER, warm_up=0.25),
        lambda: boltzmann(LARGER, warm_up=0.25),
        lambda: FewShotSampler(LARGER, 400, 0, decay=0.9, in_blocks=True),
    ],
    ids=["mixture", "mcts", "boltzmann", "few-shot"],
)
@pytest.mark.parametrize("at", [50, 230], ids=["in the warm-up", "after it"])
def test_a_sampler_goes_on_from_its_state(make, at):
    def reward(step, architecture):
        return (7 * step + 3 * architecture) % 16 / 16

    whole, first, second = make(), make(), make()
    expected = play(whole, 400, reward)
    play(first, at, reward)
    state = first.state_dict()
    assert play(first, 400, reward, first=at) == expected[at:]
    second.load_state_dict(state)  # a copy: what `first` did since is not in it
    assert play(second, 400, reward, first=at) == expected[at:]
    assert second.rank().order.tolist() == whole.rank().order.tolist()
    assert np.array_equal(second.rank().estimate, whole.rank().estimate, equal_nan=True)
