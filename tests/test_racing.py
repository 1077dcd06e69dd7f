"""Racing: the guarantee on numbers alone (exact and simulated), then races of real supernets."""

from __future__ import annotations

import itertools
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.stats import binom

import bmsn
from bmsn.evaluator import Scores, score_architectures
from bmsn.racing import Elimination


def true_top(counts, keep):
    """By sums over the whole population; of equal sums the smaller index."""
    return set(sorted(range(len(counts)), key=lambda c: (-sum(counts[c]), c))[:keep])


def run_race(counts, order, keep, confidence, sizes):
    """Who is left, and how many images each candidate saw before the race was decided."""
    state = Elimination(len(counts), keep, confidence=confidence, batch_sizes=[sizes[u] for u in order])
    for unit in order:
        if state.decided:
            break
        state.observe(counts[state.alive, unit])
    return set(state.alive.tolist()), state.seen


# The guarantee. -------------------------------------------------------------------------------------------------------


def calm(rng):
    """Ten candidates whose accuracies fall by two points, 40 batches of 64: the usual case."""
    accuracies = 0.8 - 0.02 * np.arange(10)
    return rng.binomial(64, accuracies[:, None], (10, 40)), 64


def wide_gaps(rng):
    """Three good candidates, nine bad ones: what racing is for."""
    return rng.binomial(64, np.repeat([0.8, 0.4], [3, 9])[:, None], (12, 40)), 64


def trap(rng):
    """The best candidate loses 38 of 40 batches by a little and wins 2 by as much as can be: a test that trusts the
    variance it has seen, or forgets that it looks after every batch, is taken in."""
    counts = np.full((2, 40), 10)
    counts[1, :] = 11
    counts[:, :2] = [[20], [0]]
    return counts, 20


def many_traps(rng):
    """The best candidate in a trap with each of eight rivals, in batches of their own: any of the eight can fail."""
    counts = np.full((9, 40), 11)
    counts[0] = 10
    for rival in range(1, 9):
        counts[:, 2 * rival : 2 * rival + 2] = 20
        counts[0, 2 * rival : 2 * rival + 2] = 19
        counts[rival, 2 * rival : 2 * rival + 2] = 0
    return counts, 20


@pytest.mark.parametrize(
    ("population", "keep", "confidence"),
    [(calm, 1, 0.95), (calm, 3, 0.9), (wide_gaps, 3, 0.95), (trap, 1, 0.8), (many_traps, 1, 0.8)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_error_rate_over_1000_races(population, keep, confidence):
    rng = np.random.default_rng(11)
    errors, share_seen = 0, []
    counts, size = population(rng)
    for number in range(1000):
        if number % 50 == 0:
            counts, size = population(rng)
        left, seen = run_race(counts, rng.permutation(40), keep, confidence, [size] * 40)
        errors += left != true_top(counts, keep)
        share_seen.append(seen.mean() / (40 * size))
    assert errors <= binom.ppf(0.999, 1000, 1 - confidence)
    if population is wide_gaps:
        assert np.mean(share_seen) < 0.45
    if population is trap:
        assert errors > 0.1 * 1000  # the case comes near the bound: a test much looser would break it


def test_error_probability_is_exact_over_all_orders():
    """All 120 orders of five batches: no margin. Small tables of random counts, biased so that early looks mislead."""
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(40):
        num_candidates, keep = int(rng.integers(2, 5)), 1
        sizes = [3, 3, 3, 3, 2]
        lucky = rng.random((num_candidates, 5)) < 0.3
        counts = np.where(lucky, np.array(sizes), rng.integers(0, 2, (num_candidates, 5)))
        top = true_top(counts, keep)
        errors = sum(run_race(counts, o, keep, 0.6, sizes)[0] != top for o in itertools.permutations(range(5)))
        assert errors <= 0.4 * 120
        wrong += errors
    assert wrong > 0  # some race does err: the bound is not kept by never deciding


def slow_elimination(counts, order, keep, confidence, size):
    """The definition, pair by pair, in plain Python: who is alive after each batch."""
    num, drawn = len(counts), []
    alive, history = list(range(num)), []
    capital = {(a, b): 1.0 for a in range(num) for b in range(num)}
    for unit in order:
        left = len(order) - len(drawn)
        for a, b in itertools.permutations(alive, 2):
            null_sum = -1 if a < b else 0
            lead = sum(counts[a][u] - counts[b][u] for u in drawn)
            mean = (null_sum - lead) / left
            if size + mean > 1e-9:
                capital[a, b] *= 1 + 0.95 * (counts[a][unit] - counts[b][unit] - mean) / (size + mean)
            if lead + counts[a][unit] - counts[b][unit] - size * (left - 1) > null_sum:
                capital[a, b] = float("inf")
        drawn.append(unit)
        evidence = {}
        for b in alive:
            weakest = sorted(capital[a, b] for a in range(num) if a != b)[: num - keep]
            evidence[b] = sum(weakest) / (num - keep)
        if len(drawn) == len(order):
            alive = sorted(sorted(alive, key=lambda c: -sum(counts[c]))[:keep])
        else:
            worst = sorted(alive, key=lambda b: -evidence[b])[: len(alive) - keep]
            alive = [b for b in alive if b not in worst or evidence[b] < keep / (1 - confidence)]
        history.append(list(alive))
        if len(alive) == keep:
            break
    return history


@pytest.mark.parametrize("keep", [1, 3])
def test_drops_are_those_of_the_definition(keep):
    rng = np.random.default_rng(keep)
    dropped_early = 0
    for _ in range(10):
        counts = rng.binomial(16, rng.uniform(0.1, 0.9, 8)[:, None], (8, 30))
        counts[5] = counts[2]  # equal everywhere: the tie rule
        order = rng.permutation(30).tolist()
        expected = slow_elimination(counts.tolist(), order, keep, 0.9, 16)
        state = Elimination(8, keep, confidence=0.9, batch_sizes=[16] * 30)
        for unit, alive in zip(order, expected, strict=False):
            state.observe(counts[state.alive, unit])
            assert state.alive.tolist() == alive
        dropped_early += sum(len(alive) < 8 for alive in expected[:15])
    assert dropped_early > 10  # there was something to compare


def test_blocks_do_not_change_the_result(monkeypatch):
    counts = np.random.default_rng(0).binomial(16, np.linspace(0.1, 0.9, 9)[:, None], (9, 30))
    whole = run_race(counts, range(30), 2, 0.9, [16] * 30)
    monkeypatch.setattr("bmsn.racing._BLOCK", 20)
    blocks = run_race(counts, range(30), 2, 0.9, [16] * 30)
    assert whole[0] == blocks[0] == {7, 8}
    assert whole[1].tolist() == blocks[1].tolist()


# Edges. ---------------------------------------------------------------------------------------------------------------


def test_equal_counts_are_decided_by_order_and_not_before_the_end():
    state = Elimination(4, 2, confidence=0.95, batch_sizes=[10] * 6)
    for _ in range(5):
        state.observe(np.full(4, 7))
        assert len(state.alive) == 4
    state.observe(np.full(4, 7))
    assert state.top.tolist() == [0, 1]


@pytest.mark.parametrize("value", [0, 10])
def test_constant_counts_at_the_ends_of_the_range(value):
    """Candidate 2 is right where the others are wrong and the reverse: the largest gap there is, no division by 0."""
    counts = np.full((3, 30), value)
    counts[2] = 10 - value
    left, seen = run_race(counts, range(30), 1, 0.95, [10] * 30)
    assert left == ({2} if value == 0 else {0})
    if value == 0:
        assert seen.max() < 150  # even without statistics half of the images prove it


def test_one_batch_is_scored_and_ranked():
    state = Elimination(3, 2, confidence=0.95, batch_sizes=[5])
    state.observe(np.array([1, 5, 4]))
    assert state.top.tolist() == [1, 2]


def test_a_small_last_batch_counts_as_what_it_is():
    """After two batches of 10 candidate 0 leads by 3: the batch of 2 that is left cannot turn that, one of 10 could."""
    for sizes, decided in (([10, 10, 2], True), ([10, 10, 10], False)):
        state = Elimination(2, 1, confidence=0.999, batch_sizes=sizes)
        state.observe(np.array([6, 5]))
        state.observe(np.array([7, 5]))
        assert state.decided is decided


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 6], [1, 2, -1]], ids=["too few", "above the size", "negative"])
def test_impossible_counts_are_refused(counts):
    state = Elimination(3, 1, confidence=0.95, batch_sizes=[5, 5])
    with pytest.raises(bmsn.InputError, match=r"counts must be 3 integers in 0\.\.5"):
        state.observe(np.array(counts))


# Races of real supernets. ---------------------------------------------------------------------------------------------

BATCH = 4


@pytest.fixture(scope="module")
def case():
    """Two supernets and 90 images; the labels are what pair 7 answers, so its accuracy is 1."""
    generator = torch.Generator().manual_seed(2)
    space = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
    nets = bmsn.SupernetMixture(space, 2, 5, generator=generator).double()
    images = torch.randn(90, 3, 8, 8, generator=generator, dtype=torch.double)
    with torch.no_grad():
        labels = torch.cat([nets(batch, space[3], 1).argmax(1) for batch in images.split(BATCH)])
    return nets, images, labels


def test_the_race_finds_what_scoring_everything_finds(case):
    nets, images, labels = case
    scores = score_architectures(nets, images, labels, batch_size=BATCH)
    for keep in (1, 4):
        result = bmsn.race(nets, images, labels, keep, batch_size=BATCH)
        order = np.argsort(-scores.correct.numpy(), kind="stable")[:keep].tolist()
        assert list(result.top) == order
        assert result.ranking == tuple(scores.pairs[index] for index in order)
        assert result.correct[order].tolist() == scores.correct[order].tolist()
        assert result.seen[order].tolist() == [90] * keep
        assert result.seen.min() >= BATCH
        assert result.share_seen == pytest.approx(result.seen.double().mean().item() / 90)
    alone = bmsn.race(nets, images, labels, 1, batch_size=BATCH)
    assert alone.ranking == ((nets.space[3], 1),)
    assert alone.decided_early
    assert alone.decided_after < 90
    assert alone.share_seen < 0.9


def test_a_dropped_pair_has_the_counts_of_the_batches_it_saw(case):
    nets, images, labels = case
    asked = []

    def score(mixture, batch, batch_labels, pairs, batch_size):
        asked.append((batch, batch_labels, tuple(pairs)))
        return score_architectures(mixture, batch, batch_labels, pairs, batch_size)

    result = bmsn.race(nets, images, labels, 1, batch_size=BATCH, seed=5, score=score)
    units = [u.tolist() for u in torch.arange(90).split(BATCH)]
    position = {tuple(images[u[0]].flatten().tolist()): u for u in units}
    raced = [(position[tuple(batch[0].flatten().tolist())], pairs) for batch, _, pairs in asked if len(pairs) > 1]
    assert sum(len(u) for u, _ in raced) == result.decided_after
    assert [u for u, _ in raced] != units[: len(raced)]  # in an order of its own
    for index, pair in enumerate(result.pairs):
        if index in result.top:
            continue
        seen = [u for u, pairs in raced if pair in pairs]
        correct = sum(int(score_architectures(nets, images[u], labels[u], [pair]).correct) for u in seen)
        assert (correct, sum(map(len, seen))) == (int(result.correct[index]), int(result.seen[index]))


def test_the_seed_decides_the_order(case):
    nets, images, labels = case
    first, again, other = (bmsn.race(nets, images, labels, 1, batch_size=BATCH, seed=s) for s in (1, 1, 2))
    assert first.seen.tolist() == again.seen.tolist()
    assert first.seen.tolist() != other.seen.tolist()


def test_keeping_all_or_seeing_one_batch_is_plain_scoring(case):
    nets, images, labels = case
    pairs = [(a, 0) for a in nets.space]
    scores = score_architectures(nets, images, labels, pairs, batch_size=BATCH)
    everything = bmsn.race(nets, images, labels, 15, pairs=pairs, batch_size=BATCH)
    assert everything.decided_after == 0
    assert everything.correct.tolist() == scores.correct.tolist()
    assert everything.seen.tolist() == [90] * 15
    one = bmsn.race(nets, images, labels, 2, pairs=pairs, batch_size=128)
    scores = score_architectures(nets, images, labels, pairs, batch_size=128)
    assert not one.decided_early
    assert one.correct.tolist() == scores.correct.tolist()


def test_bytes_are_normalised_as_by_the_evaluator(case):
    nets, _, labels = case
    pixels = torch.randint(256, (90, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scores = score_architectures(nets, pixels, labels, batch_size=BATCH)
    result = bmsn.race(nets, pixels, labels, 2, batch_size=BATCH)
    order = np.argsort(-scores.correct.numpy(), kind="stable")[:2].tolist()
    assert list(result.top) == order
    assert result.correct[order].tolist() == scores.correct[order].tolist()


def test_weights_that_are_not_finite_are_named_once_a_race(case, caplog):
    nets, images, labels = case
    spoilt = deepcopy(nets)
    spoilt.arena.detach()[0, 100] = torch.nan
    for races in (1, 2):
        result = bmsn.race(spoilt, images[:20], labels[:20], 1, batch_size=BATCH)
        assert result.decided_after > BATCH  # several calls
        assert len(caplog.records) == races
    assert all(r.getMessage().startswith("supernets [0] have weights that are not finite") for r in caplog.records)
    assert all("their 15 architectures" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(keep=0), r"keep must be in 1\.\.30.*got 0"),
        (dict(keep=31), r"keep must be in 1\.\.30.*got 31"),
        (dict(confidence=1.0), r"confidence must be in \(0, 1\); got 1.0"),
        (dict(confidence=float("nan")), "confidence must be in .* got nan"),
        (dict(batch_size=1), "batch_size must be at least 2; got 1"),
        (dict(labels=torch.zeros(3, dtype=torch.long)), "labels must be 90 integers; got .3,"),
        (dict(images=torch.zeros(0, 3, 8, 8), labels=torch.zeros(0, dtype=torch.long)), "non-empty"),
        (dict(pairs=[]), r"keep must be in 1\.\.0"),
    ],
)
def test_bad_arguments_are_named(case, changes, words):
    nets, images, labels = case
    arguments = dict(images=images, labels=labels, keep=2, batch_size=BATCH) | changes
    with pytest.raises(bmsn.InputError, match=words):
        bmsn.race(nets, arguments.pop("images"), arguments.pop("labels"), arguments.pop("keep"), **arguments)


def test_a_last_batch_that_is_too_small_is_found_before_the_first(case):
    """Of 9 images of 4x4 pixels the last batch is one image, whose last map is one pixel."""
    nets = case[0]

    def never(*arguments: object, **settings: object) -> Scores:
        raise AssertionError("scored before it was checked")

    with pytest.raises(bmsn.InputError, match="at least 2 values"):
        bmsn.race(nets, torch.zeros(9, 3, 4, 4), torch.zeros(9, dtype=torch.long), 1, batch_size=4, score=never)
