"""Rank figures, against scipy's definitions by hand and the published ones."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import pytest

from bmsn.correlation import agreement, load_truth, partial_kendall
from bmsn.space import SearchSpace


def tau_b(x, y):
    """Kendall's tau-b from its definition, pair by pair."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    score = sum(a * b for a, b in signs)
    return score / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def test_macs_and_the_published_figures():
    space = SearchSpace.named("resnet20-cifar10")
    truth = load_truth("paper", space)
    assert len(truth) == 36
    macs = {a.index: float(space.macs(a)) for a in space}
    figures = agreement(macs, truth, macs)
    assert round(figures["kendall_tau_b"], 3) == 0.498
    assert figures["kendall_tau_b"] == pytest.approx(tau_b(list(macs.values()), [truth[i] for i in macs]))
    assert figures["partial_kendall"] is None  # given MACs, MACs tell nothing
    assert truth[space.find("7-1-2").index] == 92.01


def test_partial_kendall_and_regret():
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 9, (3, 30)).astype(float)
    xy, xz, yz = tau_b(x, y), tau_b(x, z), tau_b(y, z)
    assert partial_kendall(x, y, z) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    predicted, truth = {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, {0: 70.0, 1: 60.0, 2: 80.0, 3: 75.0, 4: 90.0, 9: 99.0}
    figures = agreement(predicted, truth, dict.fromkeys(range(5), 1.0))
    assert figures["n"] == 5
    assert [figures[f"regret_top{k}"] for k in (1, 3, 5)] == [20.0, 10.0, 0.0]
    assert (
        figures["kendall_tau_b"]
        == figures["partial_kendall"]
        == pytest.approx(tau_b([5, 4, 3, 2, 1], [70, 60, 80, 75, 90]))
    )


def test_a_constant_ranking_has_no_correlation_and_says_why():
    figures = agreement(dict.fromkeys(range(4), 0.5), {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, dict.fromkeys(range(4), 1.0))
    assert figures["kendall_tau_b"] is None
    assert figures["undefined"] == "constant ranking"


def test_published_rows_are_the_space(tmp_path):
    space = SearchSpace.named("resnet20-cifar10")
    copy = tmp_path / "copy.csv"
    with copy.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["stage_depths", "accuracy_mean"])
        writer.writerows((a.slug, load_truth("paper", space)[a.index]) for a in space)
    assert load_truth(str(copy), space) == load_truth("paper", space)
