"""Intervals of means over seeds: by hand, against scipy, and how often they hold the true mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bmsn.compare import _COVERAGE
from bmsn.intervals import bootstrap_interval, student_interval


def test_all_resamples_by_hand():
    """Two values have the means 0, 0.5, 0.5, 1; 1.41 t = 17.97 standard deviations out lie the ends."""
    assert bootstrap_interval([1.0, 0.0]) == pytest.approx((0.0, 1.0), abs=1e-12)
    # At confidence 0.5 t[0.25; 1] = -1, so alpha = Phi(-1.4142) = 0.0786 of [0, 0.5, 0.5, 1]: 3 * 0.0786 * 0.5.
    low, high = bootstrap_interval([0.0, 1.0], confidence=0.5)
    assert low == pytest.approx(3 * stats.norm.cdf(-np.sqrt(2)) * 0.5, abs=1e-12)
    assert high == pytest.approx(1 - low)


def test_drawn_resamples_agree_with_scipy():
    """Above 6 values resamples are drawn: at the expanded level scipy's percentile bootstrap says the same."""
    values = np.random.default_rng(4).gamma(2.0, size=12)
    alpha = stats.norm.cdf(np.sqrt(12 / 11) * stats.t.ppf(0.025, 11))
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=1 - 2 * alpha, method="percentile", n_resamples=40_000, rng=5
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((expected.low, expected.high), abs=0.03)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_student_is_scipys():
    values = [0.3, 0.9, 0.4, 0.1]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert student_interval(values) == pytest.approx(expected)


def test_one_value_has_no_interval_and_equal_ones_have_no_width():
    for interval in (bootstrap_interval, student_interval):
        assert interval([]) is None
        assert interval([0.5]) is None
        assert interval([0.1] * 3) == pytest.approx((0.1, 0.1), abs=1e-15)
    assert bootstrap_interval([0.1] * 3) == (0.1, 0.1)


@pytest.mark.parametrize(("count", "repeats"), [(2, 1000), (3, 1000), (4, 1000), (5, 500), (10, 150)])
def test_coverage_of_a_normal_mean(count, repeats):
    """What the command says of them; the tolerance is 3.5 standard errors of the simulation."""
    samples = np.random.default_rng(count).normal(loc=7.0, size=(repeats, count))
    for interval, expected in ((bootstrap_interval, _COVERAGE.get(count, 95) / 100), (student_interval, 0.95)):
        held = np.mean([low <= 7.0 <= high for low, high in map(interval, samples)])
        assert held == pytest.approx(expected, abs=3.5 * np.sqrt(expected * (1 - expected) / repeats) + 0.005), interval
