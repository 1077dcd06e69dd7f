"""The rules that rank architectures by a table of accuracies, against tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

import bmsn
from bmsn.rank_rules import IN_WORDS, RANK_RULES, rank_values

# Three architectures in two supernets, of which the second is better at all of them: column means 0.5 and 0.7, 0.6 in
# all. No two rules give the same values.
ACCURACY = np.array([[0.50, 0.90], [0.70, 0.72], [0.30, 0.48]])
ASSIGNMENT = np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])  # a tie goes to the first
BY_HAND = {
    "assigned": ([0.50, 0.72, 0.30], [0, 1, 0]),
    "best": ([0.90, 0.72, 0.48], [1, 1, 1]),
    "mean": ([0.70, 0.71, 0.39], [0, 1, 0]),
    "weighted": ([0.75 * 0.50 + 0.25 * 0.90, 0.25 * 0.70 + 0.75 * 0.72, 0.39], [0, 1, 0]),
    "level": ([0.50 - 0.50 + 0.60, 0.72 - 0.70 + 0.60, 0.30 - 0.50 + 0.60], [0, 1, 0]),
}


@pytest.mark.parametrize("rule", RANK_RULES)
def test_by_hand(rule):
    values, supernets = rank_values(rule, ACCURACY, ASSIGNMENT)
    np.testing.assert_allclose(values, BY_HAND[rule][0], atol=1e-12)
    assert supernets.tolist() == BY_HAND[rule][1]
    assert rule in IN_WORDS


def test_with_one_supernet_all_rules_are_its_accuracy():
    accuracy = np.random.default_rng(0).random((15, 1))
    for rule in RANK_RULES:
        np.testing.assert_allclose(rank_values(rule, accuracy, np.ones((15, 1)))[0], accuracy[:, 0], atol=1e-12)


def test_sums_of_the_same_accuracies_are_equal():
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point; as a rank it is."""
    accuracy = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    assert accuracy[0].sum() != accuracy[1].sum()
    for rule in ("mean", "weighted"):
        first, second = rank_values(rule, accuracy, np.full((2, 3), 1 / 3))[0]
        assert first == second


def test_levels_are_those_of_the_additive_fit():
    """Against least squares on indicator columns, an oracle that knows nothing of means."""
    rng = np.random.default_rng(1)
    accuracy, assignment = rng.random((7, 3)), rng.dirichlet(np.ones(3), 7)
    c, m = (index.ravel() for index in np.indices(accuracy.shape))
    design = np.concatenate([np.eye(7)[c], np.eye(3)[m]], 1)
    effects = np.linalg.lstsq(design, accuracy.ravel(), rcond=None)[0][7:]
    best = assignment.argmax(1)
    expected = accuracy[np.arange(7), best] - (effects - effects.mean())[best]
    np.testing.assert_allclose(rank_values("level", accuracy, assignment)[0], expected, atol=1e-12)


def test_bad_tables_are_refused():
    with pytest.raises(bmsn.InputError, match=r"\(C, M\) alike; got \(3, 2\) and \(3, 1\)"):
        rank_values("mean", ACCURACY, ASSIGNMENT[:, :1])
    with pytest.raises(bmsn.InputError, match=r"got \(0, 2\) and \(0, 2\)"):
        rank_values("mean", ACCURACY[:0], ASSIGNMENT[:0])
    gap = np.where(ACCURACY == 0.48, np.nan, ACCURACY)
    with pytest.raises(bmsn.InputError, match="must be finite"):
        rank_values("best", gap, ASSIGNMENT)
