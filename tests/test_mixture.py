"""BalancedMixture: its averages and counters against plain numpy, its draws against `balance`, its two backends."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.mixture import SCHEDULES, BalancedMixture, inverse_temperature
from bmsn.ops.balance import BalanceError, balance

BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(extension() is None, reason="no bmsn._C"))]


def run(mixture: BalancedMixture, num_steps: int, seed: int = 0, first: int = 0) -> list[int]:
    """Steps `first` to `num_steps` of a made-up search, each a function of (seed, step) alone; what was drawn."""
    rng = np.random.default_rng(seed)
    architectures = rng.integers(0, mixture.num_architectures, num_steps + 1).tolist()
    uniforms, noise = rng.random(num_steps + 1).tolist(), rng.standard_normal(num_steps + 1).tolist()
    drawn = [mixture.draw(architectures[first], 1 + first, uniforms[first])]
    for step in range(first, num_steps):
        c, m = architectures[step], drawn[-1]
        accuracy = None if step % 7 == 6 else 0.5 + 0.01 * ((c + m) % 5) + 0.02 * noise[step]
        drawn.append(mixture.observe_and_draw(c, m, accuracy, 1 + step, architectures[step + 1], uniforms[step + 1]))
    return drawn


def state_equal(left: BalancedMixture, right: BalancedMixture) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_moves_one_average_and_its_counters(backend: str) -> None:
    mixture = BalancedMixture(num_architectures=5, num_supernets=3, ema_decay=0.8, initial_score=0.9, backend=backend)
    assert (mixture.scores == 0.9).all()
    assert (mixture.last_visit == -1).all()
    mixture.observe_and_draw(4, 2, 0.4, 10.0, 0, 0.5)
    mixture.observe_and_draw(0, 0, None, 10.0, 0, 0.5)
    mixture.observe_and_draw(4, 2, 0.1, 10.0, 0, 0.5)
    scores = np.full((5, 3), 0.9)
    scores[4, 2] = 0.8 * (0.8 * 0.9 + (1 - 0.8) * 0.4) + (1 - 0.8) * 0.1
    np.testing.assert_allclose(mixture.scores, scores, rtol=0, atol=1e-15)
    assert mixture.visits.sum() == mixture.visits[4, 2] == 2
    assert mixture.last_visit[4, 2] == 2  # the skipped step counts
    assert (mixture.last_visit == -1).sum() == 14
    assert mixture.steps == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_invert_the_balanced_distribution(backend: str) -> None:
    mixture = BalancedMixture(num_architectures=36, num_supernets=4, backend=backend)
    table = np.random.default_rng(0).random((36, 4))
    mixture.refresh(table, ema=False)
    cumulative = balance(table, 1 / 20, 1e-14).probabilities.cumsum(axis=1)
    for c in range(36):
        for m in range(4):
            lower = 0.0 if m == 0 else cumulative[c, m - 1]
            width = cumulative[c, m] - lower
            if width > 1e-5:  # the tolerance moves a boundary by 1e-6
                assert mixture.draw(c, 20.0, lower + 0.01 * width + 1e-6) == m
                assert mixture.draw(c, 20.0, lower + 0.99 * width - 1e-6) == m
    assert mixture.draw(0, 20.0, 0.0) == 0
    assert mixture.draw(0, 20.0, math.nextafter(1, 0)) == 3


@pytest.mark.skipif(extension() is None, reason="no bmsn._C")
@pytest.mark.parametrize("balance_every", [1, 5])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 8), (36, 4), (57, 9)], ids=str)
def test_backends_agree(rows: int, cols: int, balance_every: int) -> None:
    settings: dict[str, Any] = {"num_architectures": rows, "num_supernets": cols, "balance_every": balance_every}
    settings["weights"] = 1.0 + np.arange(rows) % 3
    reference, cpp = (BalancedMixture(**settings, backend=name) for name in ("reference", "cpp"))
    assert run(reference, 300) == run(cpp, 300)
    ours, theirs = reference.state_dict(), cpp.state_dict()
    for name in ("scores", "visits", "last_visit", "steps"):
        assert np.array_equal(ours[name], theirs[name])  # bit for bit: the draws were the same
    np.testing.assert_allclose(reference.potentials, cpp.potentials, rtol=0, atol=1e-9)
    np.testing.assert_allclose(reference.assignment(300.0), cpp.assignment(300.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_supernets_train_equally_often(backend: str) -> None:
    mixture = BalancedMixture(num_architectures=12, num_supernets=4, balance_every=1, backend=backend)
    mixture.refresh(np.linspace(0, 1, 48).reshape(12, 4), ema=False)
    rng = np.random.default_rng(0)
    counts = np.bincount([mixture.draw(i % 12, 50.0, rng.random()) for i in range(2400)], minlength=4)
    assert (np.abs(counts - 600) < 5 * math.sqrt(600)).all()  # unbalanced, column 3 would have nearly all


@pytest.mark.parametrize("backend", BACKENDS)
def test_supernets_train_equally_often_where_architectures_do_not(backend: str) -> None:
    weights = np.array([1.0] * 9 + [5.0] * 3)  # the last three are drawn in 15 of 24 steps
    mixture = BalancedMixture(num_architectures=12, num_supernets=2, weights=weights, backend=backend)
    mixture.refresh(np.stack([np.linspace(1, 0, 12), np.linspace(0, 1, 12)], axis=1), ema=False)
    rng, drawn = np.random.default_rng(0), np.repeat(np.arange(12), weights.astype(int))
    counts = np.bincount([mixture.draw(int(c), 50.0, rng.random()) for c in np.tile(drawn, 100)], minlength=2)
    assert (np.abs(counts - 1200) < 5 * math.sqrt(1200)).all()  # with equal weights 900 and 1500
    np.testing.assert_allclose(weights @ mixture.assignment(50.0), 12, rtol=1e-5)
    np.testing.assert_array_equal(mixture.weights, weights / 2)
    restored = pickle.loads(pickle.dumps(mixture))
    np.testing.assert_array_equal(restored.assignment(50.0), mixture.assignment(50.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_balance_every_leaves_the_potentials_between(backend: str) -> None:
    mixture = BalancedMixture(num_architectures=6, num_supernets=3, balance_every=4, backend=backend)
    moved = []
    for step in range(8):
        before = mixture.potentials.copy()
        mixture.observe_and_draw(step % 6, 1, 0.1 * step, 10.0, 0, 0.5)
        moved.append(not np.array_equal(before, mixture.potentials))
    assert moved == [False, False, False, True] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_continues_bit_exactly(way: str, backend: str) -> None:
    settings: dict[str, Any] = {"num_architectures": 36, "num_supernets": 4, "ema_decay": 0.7, "backend": backend}
    original = BalancedMixture(**settings, balance_every=3)
    run(original, 100)
    if way == "state_dict":
        restored = BalancedMixture(**settings, balance_every=3)
        state = original.state_dict()
        restored.load_state_dict(state)
        state["scores"][:] = 0  # a copy: nobody's scores
    else:
        restored = copy.deepcopy(original) if way == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert state_equal(restored, original)
    assert run(original, 200, first=100) == run(restored, 200, first=100)
    assert state_equal(restored, original)
    restored.observe_and_draw(0, 0, 0.5, 10.0, 0, 0.5)
    assert not state_equal(restored, original)  # no storage is shared


def test_state_of_another_mixture_is_refused() -> None:
    mixture, other = (BalancedMixture(num_architectures=rows, num_supernets=4) for rows in (36, 35))
    with pytest.raises(InputError, match="scores"):
        mixture.load_state_dict(other.state_dict())
    state = mixture.state_dict()
    del state["visits"]
    with pytest.raises(InputError, match="visits"):
        mixture.load_state_dict(state)


def test_refresh_feeds_the_table() -> None:
    mixture = BalancedMixture(num_architectures=2, num_supernets=2, ema_decay=0.75, initial_score=1.0)
    mixture.refresh([[0.0, 0.5], [1.0, math.nan]], [[True, True], [False, False]])
    assert mixture.scores.tolist() == [[0.75, 0.875], [1.0, 1.0]]
    mixture.refresh([[0.25, 0.5], [0.75, 1.0]], ema=False)
    assert mixture.scores.tolist() == [[0.25, 0.5], [0.75, 1.0]]
    assert not mixture.visits.any()
    with pytest.raises(InputError, match=r"table\[1, 0\]"):
        mixture.refresh([[0.25, 0.5], [math.nan, 1.0]])
    with pytest.raises(InputError, match="shape of table"):
        mixture.refresh(np.zeros((3, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_assignment_and_what_is_read_off_it(backend: str) -> None:
    mixture = BalancedMixture(num_architectures=4, num_supernets=2, backend=backend)
    assert mixture.entropy(100.0) == pytest.approx(math.log(2))
    mixture.refresh([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6], [0.9, 0.7]], ema=False)  # all prefer 0; it has room for two
    state = mixture.state_dict()
    assert mixture.best_supernet(100.0).tolist() == [0, 0, 1, 1]
    assert mixture.entropy(100.0) < 0.05
    expected = balance(mixture.scores, 1 / 100, 1e-14).probabilities
    np.testing.assert_allclose(mixture.assignment(100.0), expected, rtol=0, atol=1e-5)
    assert all(np.array_equal(state[name], value) for name, value in mixture.state_dict().items())
    with pytest.raises(ValueError, match="read-only"):
        mixture.scores[0, 0] = 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_steps_name_what_is_wrong_and_change_nothing(backend: str) -> None:
    mixture = BalancedMixture(num_architectures=5, num_supernets=3, backend=backend)
    run(mixture, 20)
    before = mixture.state_dict()
    good = {"architecture": 1, "supernet": 2, "accuracy": 0.5, "inverse_temperature": 9.0, "next_architecture": 0}
    bad = [
        ({"accuracy": math.nan}, r"architecture 1, supernet 2.*nan"),
        ({"architecture": 5}, "^architecture is 5; accepted: 0 to 4"),
        ({"architecture": -1}, "^architecture is -1"),
        ({"supernet": 3}, "^supernet is 3; accepted: 0 to 2"),
        ({"next_architecture": 5}, "next_architecture is 5"),
        ({"inverse_temperature": 0.0}, "inverse_temperature is 0"),
        ({"inverse_temperature": math.nan}, "inverse_temperature is nan"),
        ({"uniform": 1.0}, "uniform is 1"),
        ({"uniform": math.nan}, "uniform is nan"),
        ({"accuracy": None, "uniform": -0.1}, "uniform is -0.1"),
    ]
    for change, message in bad:
        with pytest.raises(InputError, match=message):
            mixture.observe_and_draw(**{"uniform": 0.5, **good, **change})
        assert all(np.array_equal(before[name], value) for name, value in mixture.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_balance_that_fails_raises_and_keeps_the_potentials(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmsn.mixture.MAX_ITERATIONS", 2)
    mixture = BalancedMixture(num_architectures=36, num_supernets=4, backend=backend)
    mixture.refresh(np.random.default_rng(0).random((36, 4)), ema=False)
    with pytest.raises(BalanceError, match="after 2 iterations") as caught:
        mixture.observe_and_draw(0, 0, 0.5, 1000.0, 1, 0.5)
    assert caught.value.tol == 1e-12
    assert not mixture.potentials.any()
    mixture.refresh(np.eye(36, 4), ema=False)
    with pytest.raises(InputError, match=r"1e\+08"):
        mixture.observe_and_draw(0, 1, 0.0, 1e8, 1, 0.5)


@given(rows=st.integers(1, 12), cols=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), exponent=st.floats(0, 6))
@settings(max_examples=50)
def test_any_search_keeps_its_marginals(rows: int, cols: int, seed: int, exponent: float) -> None:
    mixture = BalancedMixture(num_architectures=rows, num_supernets=cols)
    drawn = run(mixture, 40, seed)
    assert set(drawn) <= set(range(cols))
    probabilities = mixture.assignment(10**exponent)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(probabilities.mean(axis=0), 1 / cols, rtol=0, atol=2e-6)  # sqrt of tol


@pytest.mark.parametrize(
    "settings",
    [
        {"num_architectures": 0},
        {"num_supernets": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"initial_score": math.nan},
        {"tol": 0.0},
        {"balance_every": 0},
        {"weights": [1.0, 1.0, 0.0]},
        {"weights": [1.0, 1.0]},
        {"backend": "triton"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        BalancedMixture(**{"num_architectures": 3, "num_supernets": 2, **settings})


def test_schedules() -> None:
    assert SCHEDULES[0] == "inverse"
    assert [inverse_temperature(x, "inverse", 4) for x in (0, 0.5, 1)] == [1, 50.5, 100]
    assert inverse_temperature(0, "temperature", 4) == 1
    assert inverse_temperature(1, "temperature", 4) == pytest.approx(400)
    assert 1 / inverse_temperature(0.5, "temperature", 4) == pytest.approx((1 + 1 / 400) / 2)
    with pytest.raises(InputError, match="did you mean 'inverse'"):
        inverse_temperature(0.5, "invers", 4)
    with pytest.raises(InputError, match=r"progress is 1\.5"):
        inverse_temperature(1.5, "inverse", 4)


def test_entropy_of_one_supernet_is_a_plain_zero() -> None:
    entropy = BalancedMixture(num_architectures=3, num_supernets=1).entropy(10.0)
    assert math.copysign(1.0, entropy) == 1.0
    assert entropy == 0.0
