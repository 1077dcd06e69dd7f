"""Oracles: iterative proportional fitting written out here, and POT's Sinkhorn, both in float64."""

from __future__ import annotations

import math
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hypothesis_numpy
from numpy.typing import NDArray

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.balance import BalanceError, balance

BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(extension() is None, reason="no bmsn._C"))]
FASTEST = "reference" if extension() is None else "cpp"
# (C, M), 1/temperature: smallest; fewer rows than columns; more than a SIMD block, ragged; the two of the design.
SHAPES = [(1, 1, 5.0), (1, 5, 30.0), (3, 8, 10.0), (7, 3, 20.0), (36, 4, 100.0), (560, 8, 100.0)]


def ipf(
    scores: NDArray[np.float64], temperature: float, tol: float = 1e-12, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """p(m|c) as the paper has it: one softmax over all pairs, then rows and columns rescaled in turn.

    Rows are rescaled to 1/C each, or to their share of `weights`.
    """
    joint = np.exp((scores - scores.max()) / temperature)
    joint /= joint.sum()
    rows, cols = joint.shape
    share = np.full((rows, 1), 1 / rows) if weights is None else weights[:, None] / weights.sum()
    for _ in range(200_000):
        joint *= share / joint.sum(axis=1, keepdims=True)
        column_sums = joint.sum(axis=0)
        if np.abs(cols * column_sums - 1).max() < tol:
            return joint / joint.sum(axis=1, keepdims=True)
        joint *= (1 / cols) / column_sums
    raise AssertionError("the oracle did not converge")


def divergence(probabilities: NDArray[np.float64]) -> float:
    """KL(p(m) || uniform), in plain numpy."""
    mean = probabilities.mean(axis=0)
    excess = len(mean) * mean - 1
    return float(np.mean(np.where(np.abs(excess) < 1e-5, excess**2 / 2, (1 + excess) * np.log(1 + excess) - excess)))


def assert_balanced(probabilities: NDArray[np.float64], tol: float) -> None:
    assert np.isfinite(probabilities).all()
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert divergence(probabilities) < 1.001 * tol + 1e-25


def accuracies(rows: int, cols: int, seed: int = 0) -> NDArray[np.float64]:
    """Like a search's: architectures differ more than supernets do."""
    rng = np.random.default_rng(seed)
    return np.clip(0.6 + 0.1 * rng.standard_normal((rows, 1)) + 0.03 * rng.standard_normal((rows, cols)), 0, 1)


def hard_scores() -> dict[str, NDArray[np.float64]]:
    """Structures on which plain IPF, Newton without continuation, or a stage that ends by its KL get stuck."""
    rng = np.random.default_rng(7)
    one_hot = np.zeros((36, 4))
    one_hot[np.arange(36), rng.integers(0, 4, 36)] = 1
    all_want_one = np.zeros((36, 4))
    all_want_one[:, 0] = 1
    mixed = np.full((36, 4), 0.5)  # 12 saturated on column 0, 6 nearly tied, 2 random, the rest tied
    mixed[:12, 0], mixed[14:20, 1] = 1, 0.5 + 1e-6
    mixed[12:14] = rng.random((2, 4))
    saturated = np.zeros((36, 4))  # one row more than fits wants column 0; ten rows are tied at odd heights
    saturated[:10, 0], saturated[10:20] = 1, rng.random((10, 1))
    return {
        "random": rng.random((36, 4)),
        "capacity not whole": rng.random((35, 4)),
        "large": rng.random((560, 8)),
        "many columns": rng.random((100, 16)),
        "identical rows": np.repeat(rng.random((1, 4)), 36, axis=0),
        "constant": np.full((36, 4), 0.3),
        "equal but for 1e-6": 0.5 + 1e-6 * rng.random((36, 4)),
        "one-hot": one_hot,
        "all want one": all_want_one,
        "mixed": mixed,
        "saturated": saturated,
        "one row": rng.random((1, 8)),
        "fewer rows": rng.random((3, 8)),
        "one row more than columns": rng.random((8, 7)),
        "one column": rng.random((9, 1)),
        "ties": np.round(4 * rng.random((36, 4))) / 4,
        "eight decades": 10.0 ** (-8 * rng.random((5, 9))),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "inverse"), SHAPES, ids=str)
def test_equals_iterative_proportional_fitting(rows: int, cols: int, inverse: float, backend: str) -> None:
    scores = accuracies(rows, cols)
    result = balance(scores, 1 / inverse, 1e-14, backend=backend)
    np.testing.assert_allclose(result.probabilities, ipf(scores, 1 / inverse), rtol=0, atol=2e-7)  # sqrt of tol
    assert_balanced(result.probabilities, 1e-14)
    assert result.kl < 1e-14
    assert abs(result.potentials.mean()) < 1e-12
    z = scores * inverse + result.potentials
    softmax = np.exp(z - z.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, softmax, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "inverse"), SHAPES, ids=str)
def test_rows_may_be_drawn_unequally_often(rows: int, cols: int, inverse: float, backend: str) -> None:
    scores, weights = accuracies(rows, cols), np.random.default_rng(3).integers(1, 5, rows)
    result = balance(scores, 1 / inverse, 1e-14, weights=weights / 7, backend=backend)  # the unit is free
    np.testing.assert_allclose(
        result.probabilities, ipf(scores, 1 / inverse, weights=weights.astype(float)), rtol=0, atol=2e-7
    )
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, rtol=0, atol=1e-12)
    repeated = balance(np.repeat(scores, weights, axis=0), 1 / inverse, 1e-14, backend=backend)
    np.testing.assert_allclose(
        np.repeat(result.probabilities, weights, axis=0), repeated.probabilities, rtol=0, atol=2e-7
    )
    assert abs(result.iterations - repeated.iterations) <= 1  # the same Newton steps; rounding may decide the last one
    assert result.kl < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_weights_change_no_bit(backend: str) -> None:
    scores = accuracies(36, 4)
    plain, weighted = (balance(scores, 0.01, 1e-14, weights=w, backend=backend) for w in (None, np.full(36, 8.0)))
    np.testing.assert_array_equal(plain.probabilities, weighted.probabilities)
    np.testing.assert_array_equal(plain.potentials, weighted.potentials)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pot(backend: str) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    scores = accuracies(36, 4)
    rows, cols = np.full(36, 1 / 36), np.full(4, 1 / 4)
    plan = ot.sinkhorn(rows, cols, -scores, 0.01, method="sinkhorn_log", stopThr=1e-12, numItermax=100_000)
    result = balance(scores, 0.01, 1e-14, backend=backend)
    np.testing.assert_allclose(result.probabilities, plan * 36, rtol=0, atol=2e-7)


@pytest.mark.skipif(extension() is None, reason="no bmsn._C")
@pytest.mark.parametrize("tol", [1e-4, 1e-12])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(("rows", "cols", "inverse"), SHAPES, ids=str)
def test_backends_agree(rows: int, cols: int, inverse: float, warm: bool, tol: float) -> None:
    scores = accuracies(rows, cols)
    start = np.random.default_rng(1).standard_normal(cols) if warm else None
    reference, cpp = (balance(scores, 1 / inverse, tol, start, backend=name) for name in ("reference", "cpp"))
    np.testing.assert_allclose(cpp.probabilities, reference.probabilities, rtol=0, atol=1e-9)
    np.testing.assert_allclose(cpp.potentials, reference.potentials, rtol=0, atol=1e-9)
    assert cpp.iterations == reference.iterations


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inverse", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("name", hard_scores())
def test_hard_scores_reach_the_tolerance(name: str, inverse: float, backend: str) -> None:
    scores = hard_scores()[name]
    cold = balance(scores, 1 / inverse, 1e-14, backend=backend)
    assert_balanced(cold.probabilities, 1e-14)
    assert cold.iterations < 100  # a quarter of the cap: 41 at most when this was written
    far = balance(scores, 1 / inverse, 1e-12, np.linspace(-inverse, inverse, scores.shape[1]), backend=backend)
    assert_balanced(far.probabilities, 1e-12)


@given(
    scores=hypothesis_numpy.arrays(
        np.float64,
        st.tuples(st.integers(1, 20), st.integers(1, 9)),
        elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.5 + 1e-6, 1.0])),
    ),
    exponent=st.floats(0, 6),
    tol=st.sampled_from([1e-12, 1e-14]),
)
@settings(max_examples=400)
def test_any_scores_reach_the_tolerance(scores: NDArray[np.float64], exponent: float, tol: float) -> None:
    result = balance(scores, 10**-exponent, tol, backend=FASTEST)
    assert_balanced(result.probabilities, tol)
    assert np.isfinite(result.potentials).all()
    again = balance(scores, 10**-exponent, tol, result.potentials, backend=FASTEST)
    assert again.iterations <= 2


@given(
    shape=st.tuples(st.integers(2, 20), st.integers(2, 9)),
    seed=st.integers(0, 2**32 - 1),
    inverse=st.floats(1, 50),
)
@settings(max_examples=100)
def test_symmetries(shape: tuple[int, int], seed: int, inverse: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random(shape)

    def p(table: NDArray[np.float64]) -> NDArray[np.float64]:
        return balance(table, 1 / inverse, 1e-14, backend=FASTEST).probabilities

    original, rows, cols = p(scores), rng.permutation(shape[0]), rng.permutation(shape[1])
    bound = {"rtol": 0, "atol": 1e-5}  # 1e-14 leaves the columns 1e-7 off; an ill-conditioned table multiplies that
    np.testing.assert_allclose(p(scores[rows]), original[rows], **bound)
    np.testing.assert_allclose(p(scores[:, cols]), original[:, cols], **bound)
    np.testing.assert_allclose(p(scores + rng.normal(size=(shape[0], 1))), original, **bound)
    np.testing.assert_allclose(p(scores + rng.normal(size=(1, shape[1]))), original, **bound)  # g absorbs columns


def test_tolerance_is_the_callers() -> None:
    scores = accuracies(36, 4)
    loose, tight = (balance(scores, 0.01, tol) for tol in (1e-4, 1e-14))
    assert tight.kl < 1e-14 < loose.kl < 1e-4
    assert loose.iterations < tight.iterations


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend: str) -> None:
    scores = accuracies(5, 3)
    for value in (math.nan, math.inf, -math.inf):
        broken = scores.copy()
        broken[2, 1] = broken[4, 0] = value
        with pytest.raises(InputError, match=r"scores\[2, 1\]"):
            balance(broken, 1.0, backend=backend)
    with pytest.raises(InputError, match=r"2e\+07.*1e\+07"):
        balance([[0.0, 2.0], [1.0, 1.0]], 1e-7, backend=backend)
    assert balance([[1e9, 1e9 + 1]] * 3, 1e-6, backend=backend).kl < 1e-4  # the spread counts, not the height
    for weights in ([1.0, 1.0], [1, 1, 1, 1, 0.0], [1, 1, math.nan, 1, 1], [1, 1, 1, math.inf, 1], [1, 1, 1, -1, 1]):
        with pytest.raises(InputError, match=r"weights is .* accepted: 5 positive finite values"):
            balance(scores, 1.0, weights=weights, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"scores": [1.0, 2.0]}, "scores"),
        ({"scores": np.zeros((0, 3))}, "scores"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"tol": 1e-15}, "tol"),
        ({"tol": math.nan}, "tol"),
        ({"warm_start": [0.0, 1.0]}, "warm_start"),
        ({"warm_start": [0.0, 1.0, math.nan]}, "warm_start"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"backend": "cuda"}, "backend"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_bad_arguments_name_the_field(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        balance(**{"scores": np.zeros((4, 3)), "temperature": 1.0, **arguments})


@pytest.mark.parametrize("backend", BACKENDS)
def test_iteration_cap_raises_with_the_numbers(backend: str) -> None:
    with pytest.raises(BalanceError) as caught:
        balance(hard_scores()["random"], 1e-6, 1e-12, backend=backend, max_iterations=5)
    error = pickle.loads(pickle.dumps(caught.value))  # it crosses process borders
    assert (error.tol, error.iterations) == (1e-12, 5)
    assert error.kl > 1e-12
    assert "after 5 iterations" in str(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_is_left_alone_and_layouts_are_equal(backend: str) -> None:
    scores = accuracies(36, 4)
    before, start = scores.copy(), np.zeros(4)
    result = balance(scores, 0.01, 1e-12, start, backend=backend)
    assert np.array_equal(scores, before)
    assert not start.any()
    fortran = balance(np.asfortranarray(scores), 0.01, 1e-12, start, backend=backend)
    assert np.array_equal(fortran.probabilities, result.probabilities)
