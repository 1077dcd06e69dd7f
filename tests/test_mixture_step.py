"""mixture_step: the search's step on tensors, against the C++ solver of `balance` and a step written out in numpy."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bmsn.errors import InputError
from bmsn.mixture import BalancedMixture
from bmsn.ops.balance import BalanceError, balance
from bmsn.ops.mixture_step import MixtureTensors, failure, mixture_step
from stacked import assert_guards_hold, device_for, guarded, needs_cpp, needs_triton
from test_balance import accuracies, hard_scores

BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
HARD = hard_scores()


def make_state(
    scores: NDArray[np.float64],
    inverse: float,
    backend: str,
    *,
    num_steps: int = 1,
    seed: int = 0,
    weights: NDArray[np.float64] | None = None,
) -> MixtureTensors:
    """A state with the scores given, random draws, guards round everything that a step may write."""
    random, (rows, cols) = np.random.default_rng(seed), scores.shape
    state = MixtureTensors.create(
        rows, cols, random.integers(0, rows, num_steps + 1), np.full(num_steps + 1, inverse),
        random.random(num_steps + 1), device_for(backend), weights,
    )  # fmt: skip
    state.scores.copy_(torch.from_numpy(scores.T))
    written = ("scores", "potentials", "visits", "last_visit", "outcome", "supernet")
    tensors = {field.name: getattr(state, field.name) for field in fields(state)}
    return MixtureTensors(**tensors | {name: guarded(tensors[name]) for name in written})


def run_step(state: MixtureTensors, backend: str, *, step: int = 0, trained: bool = False, **changes: Any) -> None:
    device = state.scores.device
    settings = {"num_images": 50, "ema_decay": 0.9, "tol": 1e-12, "balance_every": 1} | changes
    correct = torch.tensor(settings.pop("correct", 0), device=device)
    mixture_step(
        state, torch.tensor(step, device=device), correct, torch.tensor(trained, device=device), **settings,
        backend=backend,
    )  # fmt: skip
    written = ("scores", "potentials", "visits", "last_visit", "outcome", "supernet")
    assert_guards_hold(**{name: getattr(state, name) for name in written})


def probabilities(state: MixtureTensors, inverse: float) -> NDArray[np.float64]:
    """p(m|c) of the scores and potentials as they stand."""
    x = state.scores.T.cpu().numpy() * inverse + state.potentials.cpu().numpy()
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def draw(p: NDArray[np.float64], uniform: float) -> int | None:
    """The supernet that a row of probabilities gives; None where the number is too close to a boundary to tell."""
    cumulative = np.cumsum(p)
    return None if np.abs(cumulative - uniform).min() < 1e-9 else int(np.flatnonzero(cumulative > uniform)[0])


HARDEST = ("capacity not whole", "one-hot", "saturated", "fewer rows", "one column", "ties")
TABLES = [  # name, 1/tau: a search's last step, as cold as is promised, and large ones (the interpreter is slow)
    *[(name, 100.0) for name in HARD if HARD[name].size <= 300],
    *[(name, 1e6) for name in HARDEST],
    ("many columns", 100.0),
    ("large", 800.0),
]


@pytest.mark.parametrize(("name", "inverse"), TABLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_balances_like_the_solver(name: str, inverse: float, backend: str) -> None:
    scores = HARD[name]
    state = make_state(scores, inverse, backend)
    run_step(state, backend)
    wanted = balance(scores, 1 / inverse, 1e-12, np.zeros(scores.shape[1]))  # from the same start: at 1e-12 starts show
    np.testing.assert_allclose(probabilities(state, inverse), wanted.probabilities, rtol=0, atol=1e-6)
    status, kl, iterations, spread, _, _, step = state.outcome.tolist()
    assert (status, step) == (0, 0)
    assert kl < 1e-12
    assert abs(iterations - wanted.iterations) <= 1  # rounding may decide the last one
    assert spread == pytest.approx(np.ptp(scores, axis=1).max() * inverse)
    assert abs(float(state.potentials.mean())) <= 1e-15 * max(1.0, spread)
    drawn = draw(wanted.probabilities[int(state.architectures[1])], float(state.uniforms[1]))
    assert drawn is None or int(state.supernet) == drawn


@pytest.mark.parametrize(("rows", "cols"), [(15, 2), (36, 4), (7, 9)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_balances_what_is_drawn_unequally_often(rows: int, cols: int, backend: str) -> None:
    scores, weights = accuracies(rows, cols), 1.0 + np.arange(rows) % 5
    state = make_state(scores, 50.0, backend, weights=weights)
    run_step(state, backend)
    p = probabilities(state, 50.0)
    wanted = balance(scores, 1 / 50, 1e-12, np.zeros(cols), weights=weights)
    np.testing.assert_allclose(p, wanted.probabilities, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights @ p / weights.sum(), 1 / cols, rtol=0, atol=1e-5)
    assert np.abs(p.mean(axis=0) - 1 / cols).max() > 1e-3  # what equal weights would have made even


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton)])
def test_the_largest_table_that_is_promised(backend: str) -> None:
    scores = accuracies(1024, 16)
    state = make_state(scores, 100.0, backend)
    wanted = balance(scores, 0.01, 1e-12)
    state.potentials.copy_(torch.from_numpy(wanted.potentials + 0.01))  # warm: the interpreter is slow
    run_step(state, backend)
    np.testing.assert_allclose(probabilities(state, 100.0), wanted.probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_starts_good_and_bad(backend: str) -> None:
    scores, inverse = accuracies(36, 4), 100.0
    wanted = balance(scores, 1 / inverse, 1e-12)
    for start, iterations in ((wanted.potentials, 1), (np.array([3e3, -5e3, 1e3, 1e3]), None)):
        state = make_state(scores, inverse, backend)
        state.potentials.copy_(torch.from_numpy(start))
        run_step(state, backend)
        np.testing.assert_allclose(probabilities(state, inverse), wanted.probabilities, rtol=0, atol=1e-6)
        assert state.outcome[2] == (iterations or balance(scores, 1 / inverse, 1e-12, start).iterations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_search_of_many_steps_is_that_of_the_mixture(backend: str) -> None:
    """Scores, visits, potentials and draws follow `BalancedMixture`, with skipped steps, and balances now and then."""
    num_steps, scores, inverse = 60, accuracies(15, 3), 20.0
    state = make_state(scores, inverse, backend, num_steps=num_steps)
    mixture = BalancedMixture(num_architectures=15, num_supernets=3, balance_every=4, backend="reference")
    mixture.refresh(scores, ema=False)
    random, supernet = np.random.default_rng(5), 0
    architectures, uniforms = state.architectures.tolist(), state.uniforms.tolist()
    for step in range(num_steps):
        assert int(state.supernet) == supernet
        trained, correct = bool(random.random() < 0.9), int(random.integers(0, 51))
        run_step(state, backend, step=step, trained=trained, correct=correct, balance_every=4)
        accuracy = correct / 50 if trained else None
        pair = architectures[step], supernet
        supernet = mixture.observe_and_draw(*pair, accuracy, inverse, architectures[step + 1], uniforms[step + 1])
    wanted = mixture.state_dict()
    np.testing.assert_array_equal(state.scores.T.cpu().numpy(), wanted["scores"])
    np.testing.assert_array_equal(state.visits.cpu().numpy(), wanted["visits"])
    np.testing.assert_array_equal(state.last_visit.cpu().numpy(), wanted["last_visit"])
    np.testing.assert_allclose(state.potentials.cpu().numpy(), wanted["potentials"], rtol=0, atol=1e-6)
    assert failure(state.outcome.cpu(), 1e-12) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failure_is_written_down_and_stops_the_mixture(backend: str) -> None:
    scores = accuracies(7, 3)
    bad, wide = scores.copy(), scores.copy()
    bad[4, 1] = bad[5, 0] = math.nan
    wide[2, 0] = 3e5
    for table, settings, error, message in (
        (bad, {}, InputError, r"scores\[4, 1\]"),
        (wide, {}, InputError, r"spread over 3e\+07"),
        (scores, {"max_iterations": 2}, BalanceError, "after 2 iterations"),
    ):
        state = make_state(table, 100.0, backend, num_steps=3)
        run_step(state, backend, step=1, trained=False, **settings)
        found = failure(state.outcome.cpu(), 1e-12)
        assert found is not None
        assert found[0] == 1
        assert isinstance(found[1], error)
        with pytest.raises(error, match=message):
            raise found[1]
        before = {field.name: getattr(state, field.name).clone() for field in fields(state)}
        run_step(state, backend, step=2, trained=True, correct=7)  # as if the host had not looked yet
        for name, tensor in before.items():
            assert torch.equal(torch.nan_to_num(getattr(state, name)), torch.nan_to_num(tensor)), name


def test_the_reference_draws_by_the_formula() -> None:
    """The draw alone: no balance falls due."""
    state = make_state(accuracies(9, 5), 30.0, "reference")
    for backend in ("reference", "auto"):
        run_step(state, backend, balance_every=2)
        p = probabilities(state, 30.0)[int(state.architectures[1])]
        assert int(state.supernet) == draw(p, float(state.uniforms[1]))


def test_bad_input_is_named() -> None:
    good: dict[str, Any] = {
        "architectures": np.array([0, 2]), "inverse_temperatures": np.ones(2), "uniforms": np.zeros(2)
    }  # fmt: skip

    def fails(message: str, **bad: Any) -> None:
        with pytest.raises(InputError, match=message):
            MixtureTensors.create(3, 2, **good | bad)

    fails("architectures is 0 to 3; accepted: 0 to 2", architectures=np.array([0, 3]))
    fails("inverse_temperatures is 0.0 to 1.0; accepted: positive", inverse_temperatures=np.array([1.0, 0.0]))
    fails("uniforms is .* to 1.0; accepted: 0 to below 1", uniforms=np.array([0.5, 1.0]))
    fails(r"uniforms must be \(T \+ 1,\)", uniforms=np.zeros(3))
    state = MixtureTensors.create(3, 2, **good)
    with pytest.raises(InputError, match=r"step must be \(\) torch.int64 on cpu; got torch.int64 \(1,\)"):
        mixture_step(
            state, torch.zeros(1, dtype=torch.int64), torch.tensor(1), torch.tensor(True),
            num_images=1, ema_decay=0.9, tol=1e-12, balance_every=1,
        )  # fmt: skip
    with pytest.raises(InputError, match=r"ema_decay in \[0, 1\); got 50, 1, 500, 1\.0"):
        run_step(state, "reference", ema_decay=1.0)
    with pytest.raises(InputError, match="tol is 2"):
        run_step(state, "reference", tol=2.0)
