"""The balanced assignment p(m|c): every architecture spread over the supernets, every supernet used equally.

Rows count as often as their architectures are drawn.

Plain IPF does not get there at low temperature (KL 0.13 after 60,000 iterations at 36x4 and 1/temperature = 1e6), so
this is damped Newton on the M potentials with continuation in temperature; csrc/balance.h explains why it converges.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmsn.backend import extension, resolve
from bmsn.errors import InputError

Floats = NDArray[np.float64]

MAX_ITERATIONS = 500  # hard scores at 1/temperature = 1e6 take fewer than 100
SMALLEST_TOL = 1e-14
LARGEST_SPREAD = 1e7  # where rounding of z + g alone reaches 1e-9: no tolerance could be promised
SOLVED, NOT_FINITE, SPREAD_TOO_LARGE, ITERATION_CAP = range(4)

# The reference's constants; csrc/balance.cpp has the same ones and says what they do.
_STAGE_FACTOR, _FIRST_SPREAD, _STAGE_TOL = 4.0, 4.0, 1e-14
_WARM_ITERATIONS = 12
_GROUND = 1e-15
_SMALLEST_EXPONENT = -345.0


@dataclass(frozen=True, kw_only=True)
class BalanceResult:
    """A solved balance.

    Attributes:
        probabilities: (C, M), p(m|c); rows sum to 1, columns to C / M, weighted to a mean of 1.
        potentials: (M,), mean zero: p(m|c) = softmax_m(scores[c,m] / temperature + potentials[m]). A warm start.
        kl: KL(p(m) || uniform) in nats, p(m) the (weighted) mean over c; below the tolerance asked for.
        iterations: evaluations of the whole table.
    """

    probabilities: Floats
    potentials: Floats
    kl: float
    iterations: int


class BalanceError(RuntimeError):
    """The balance did not reach its tolerance within the iterations allowed."""

    def __init__(self, kl: float, tol: float, iterations: int) -> None:
        super().__init__(kl, tol, iterations)
        self.kl = kl
        self.tol = tol
        self.iterations = iterations

    def __str__(self) -> str:
        reached = f"KL(p(m) || uniform) is {self.kl:.3g} after {self.iterations} iterations"
        return f"balance: {reached}, not below tol = {self.tol:.3g}"


@dataclass(frozen=True)
class Outcome:
    """How a solve went, from either backend."""

    status: int = SOLVED
    kl: float = math.nan
    iterations: int = 0
    spread: float = 0.0
    row: int = -1
    col: int = -1

    def error(self, tol: float) -> Exception:
        """What to raise for a status that is not SOLVED."""
        if self.status == NOT_FINITE:
            return InputError(f"scores[{self.row}, {self.col}] (row c, column m) is NaN or infinite; scores are finite")
        if self.status == SPREAD_TOO_LARGE:
            return InputError(
                f"scores / temperature spread over {self.spread:.4g} in a row; accepted: at most {LARGEST_SPREAD:.0e}"
            )
        return BalanceError(self.kl, tol, self.iterations)


class Solver(Protocol):
    def __call__(
        self,
        scores: Floats,
        inverse_temperature: float,
        tol: float,
        max_iterations: int,
        warm_start: Floats | None,
        weights: Floats | None,
    ) -> tuple[Floats, Floats, tuple[Any, ...]]: ...


def balance(
    scores: ArrayLike,
    temperature: float,
    tol: float = 1e-4,
    warm_start: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    backend: str = "auto",
    max_iterations: int = MAX_ITERATIONS,
) -> BalanceResult:
    """Balances softmax_m(scores[c,m] / temperature): scales its columns until supernets are used equally.

        p(m|c) = softmax_m(scores[c,m] / temperature + g[m]),  g such that mean_c p(m|c) = 1/M

    Source: Javan et al. 2023, eq. 3 and IPF. Their softmax over all (c, m) has the same fixed point: rows absorb it.
    Where architectures are drawn unequally often the mean is weighted: marginals (q(c), 1/M) instead of (1/C, 1/M).
    With fewer rows than columns p stays soft at any temperature. Where several g balance within rounding (rows apart by
    more than 36 in the exponent), any of them is the answer; p is the same within the tolerance.

    Args:
        scores: (C, M), finite, any C and M from 1 up; a constant added to a row changes nothing.
        temperature: positive; scores / temperature may spread over 1e7 in a row.
        tol: 1e-14 to 1; the KL to the uniform distribution that is allowed, in nats.
        warm_start: (M,), the potentials of a similar problem. A bad one costs at most 12 iterations.
        weights: (C,), positive: how often each row is drawn, in any unit; None: equally often.
        backend: "auto", "cpp" or "reference" (numpy); equal up to rounding times the size of scores / temperature.
        max_iterations: evaluations of the table, the warm start's included.
    Raises:
        InputError: a score that is not finite (names the cell), a spread too large (names it), a field out of range.
        BalanceError: the iterations did not suffice.
    """
    table = np.ascontiguousarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise InputError(f"scores has shape {table.shape}; accepted: (C, M) with C, M >= 1")
    if not 1e-300 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}; accepted: positive and finite")
    if max_iterations < 1:
        raise InputError(f"max_iterations is {max_iterations}; accepted: >= 1")
    check_tol(tol)
    start = None
    if warm_start is not None:
        start = np.ascontiguousarray(warm_start, dtype=np.float64)
        if start.shape != table.shape[1:] or not all(map(math.isfinite, start.tolist())):
            raise InputError(f"warm_start is {start}; accepted: {table.shape[1]} finite values, one a column of scores")
    rows = None if weights is None else mean_one(weights, len(table))
    return solve(solver(backend), table, 1 / temperature, tol, max_iterations, start, rows)


def mean_one(weights: ArrayLike | None, num_rows: int) -> Floats:
    """(C,) weights scaled to a mean of 1, checked; None: ones."""
    if weights is None:
        return np.ones(num_rows)
    given = np.array(weights, dtype=np.float64)
    if given.shape != (num_rows,) or not (np.isfinite(given).all() and (given > 0).all()):
        raise InputError(f"weights is {given}; accepted: {num_rows} positive finite values, one a row of scores")
    return given / given.mean()


def check_tol(tol: float) -> None:
    if not SMALLEST_TOL <= tol <= 1:
        raise InputError(f"tol is {tol}; accepted: {SMALLEST_TOL} to 1")


def solver(backend: str) -> Solver:
    """The solver of a backend; one that is asked for by name runs or raises."""
    return _solver(backend, os.environ.get("BMSN_BACKEND"), extension())


@functools.cache  # resolving takes 1.5 us, as long as a warm 36x4 solve
def _solver(backend: str, default: str | None, module: ModuleType | None) -> Solver:
    return module.balance if resolve("balance", backend) == "cpp" and module is not None else balance_reference


def solve(
    solver: Solver,
    table: Floats,
    inverse_temperature: float,
    tol: float,
    max_iterations: int,
    start: Floats | None,
    weights: Floats | None,
) -> BalanceResult:
    """Runs a solver on checked arguments and raises where it did not succeed."""
    probabilities, potentials, outcome = solver(table, inverse_temperature, tol, max_iterations, start, weights)
    if outcome[0] != SOLVED:
        raise Outcome(*outcome).error(tol)
    return BalanceResult(probabilities=probabilities, potentials=potentials, kl=outcome[1], iterations=outcome[2])


def balance_reference(
    scores: Floats,
    inverse_temperature: float,
    tol: float,
    max_iterations: int,
    warm_start: Floats | None = None,
    weights: Floats | None = None,
) -> tuple[Floats, Floats, tuple[Any, ...]]:
    """The specification: what `_C.balance` does, in numpy. Returns p, potentials, `Outcome`'s fields."""
    share = (np.ones(len(scores)) if weights is None else weights)[:, None] / len(scores)
    nothing = np.zeros_like(scores), np.zeros(scores.shape[1])
    finite = np.isfinite(scores)
    if not finite.all():
        row, col = np.argwhere(~finite)[0]
        return *nothing, (NOT_FINITE, math.nan, 0, 0.0, int(row), int(col))
    z = (scores - scores.max(axis=1, keepdims=True)) * inverse_temperature
    spread = float(-z.min())
    if not spread <= LARGEST_SPREAD:
        return *nothing, (SPREAD_TOO_LARGE, math.nan, 0, spread, -1, -1)

    iterations, kl, p = 0, math.nan, z

    def newton(scale: float, g: Floats, limit: int, last_stage: bool) -> tuple[Floats, bool]:
        """Iterates on g at scale * z; also whether the stage is over (solved, or its Newton step is below 1)."""
        nonlocal iterations, kl, p
        while iterations < limit:
            p = softmax_rows(scale * z + g)
            iterations += 1
            mean = (share * p).sum(axis=0)
            kl = float(_divergence(len(mean) * mean - 1).mean())
            if kl < (tol if last_stage else min(tol, _STAGE_TOL)):
                return g, True
            step = _newton_step(p, share, mean)
            osc = float(np.ptp(step))
            g = g + (1 if osc <= 1 else math.log1p(osc) / osc) * step
            if not last_stage and osc < 1:
                return g, True
        return g, False

    g, solved = np.zeros(z.shape[1]), False
    if warm_start is not None:
        g, solved = newton(1.0, warm_start, min(_WARM_ITERATIONS, max_iterations), True)
    if not solved:
        g, scale, going = np.zeros(z.shape[1]), 1.0, True
        while scale * spread > _FIRST_SPREAD:
            scale /= _STAGE_FACTOR
        while scale < 1 and going:
            g, going = newton(scale, g, max_iterations, False)
            g, scale = g * _STAGE_FACTOR, scale * _STAGE_FACTOR
        if going:
            g, solved = newton(1.0, g, max_iterations, True)
    return p, g - g.mean(), (SOLVED if solved else ITERATION_CAP, kl, iterations, spread, -1, -1)


def softmax_rows(x: Floats) -> Floats:
    """Softmax of each row; exp below exp(-345) counts as 0."""
    x = x - x.max(axis=-1, keepdims=True)
    e = np.where(x < _SMALLEST_EXPONENT, 0.0, np.exp(x))
    return e / e.sum(axis=-1, keepdims=True)


def _divergence(d: Floats) -> Floats:
    """(1 + d) log(1 + d) - d, without cancellation."""
    small = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 12 - d / 20)))
    inside = np.maximum(d, np.nextafter(-1, 0))
    return np.where(np.abs(d) < 1e-3, small, np.where(d > -1, (1 + inside) * np.log1p(inside) - inside, 1.0))


def _newton_step(p: Floats, share: Floats, mean: Floats) -> Floats:
    """Solves (Hessian + ground) step = 1/M - mean by eliminating the graph of columns: weights are only ever added."""
    num_cols = p.shape[1]
    weights = np.triu((share * p).T @ p, 1)
    step, ground, pivot = 1 / num_cols - mean, np.full(num_cols, _GROUND), np.empty(num_cols)
    for k in range(num_cols):
        later = weights[k, k + 1 :]
        pivot[k] = ground[k] + later.sum()
        share = later / pivot[k]
        weights[k + 1 :, k + 1 :] += np.triu(np.outer(share, later), 1)
        ground[k + 1 :] += share * ground[k]
        step[k + 1 :] += share * step[k]
    for k in reversed(range(num_cols)):
        step[k] = (step[k] + weights[k, k + 1 :] @ step[k + 1 :]) / pivot[k]
    return step - step.mean()
