"""The mixture's part of a search step, for `bmsn.ops.mixture_step`: moving average, balance, draw, in one program.

The balance is the damped Newton of csrc/balance.h, float64, its stages (warm start, falling temperature, last) as one
loop over evaluations of the whole table. The table stays in memory, where a program's own cache holds it (128 KB for
1024 x 16); what an evaluation leaves behind, means and the graph of the columns, fits in registers.
"""

import torch
import triton
import triton.language as tl

MAX_SUPERNETS = 64  # beyond it a single row's products no longer fit
PRODUCTS = 4096  # p[c,m] p[c,n] at a time: 32 in a thread of four warps. An estimate, still to be measured on a GPU

STAGE_TOL = 1e-14  # a stage that is solved this well is over, whatever its Newton step

# As in bmsn.ops.balance, which says what they are.
_SOLVED: tl.constexpr = tl.constexpr(0)
_NOT_FINITE: tl.constexpr = tl.constexpr(1)
_SPREAD_TOO_LARGE: tl.constexpr = tl.constexpr(2)
_ITERATION_CAP: tl.constexpr = tl.constexpr(3)
_RUNNING: tl.constexpr = tl.constexpr(-1)
_LARGEST_SPREAD: tl.constexpr = tl.constexpr(1e7)
_STAGE_FACTOR: tl.constexpr = tl.constexpr(4.0)
_FIRST_SPREAD: tl.constexpr = tl.constexpr(4.0)
_WARM_ITERATIONS: tl.constexpr = tl.constexpr(12)
_GROUND: tl.constexpr = tl.constexpr(1e-15)
_SMALLEST_EXPONENT: tl.constexpr = tl.constexpr(-345.0)


@triton.jit
def _real(value: tl.constexpr):
    """A float64 constant: a bare literal would be rounded to float32."""
    return tl.full((), value, tl.float64)


@triton.jit
def _load_rows(scores_ptr, first, cell, value, C, M: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr):
    """Rows first.. of the table, (BC, BM), with `value` at `cell`, which may still be on its way to memory."""
    c, m = first + tl.arange(0, BC), tl.arange(0, BM)
    place = m[None, :] * C + c[:, None]
    x = tl.load(scores_ptr + place, mask=(c < C)[:, None] & (m < M)[None, :], other=0.0)
    return tl.where(place == cell, value, x)


@triton.jit
def _examine(scores_ptr, cell, value, inverse, C, M: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr):
    """The first cell that is not finite, counted row by row (C * M: none), and the largest spread of a row."""
    m = tl.arange(0, BM)
    bad, spread = C * M, _real(0.0)
    for first in range(0, C, BC):
        x = _load_rows(scores_ptr, first, cell, value, C, M, BC, BM)
        c = first + tl.arange(0, BC)
        valid = (c < C)[:, None] & (m < M)[None, :]
        finite = x - x == 0.0
        places = tl.where(valid & (finite == 0), c[:, None] * M + m[None, :], C * M)
        bad = tl.minimum(bad, tl.min(tl.min(places, axis=1), axis=0))
        top = tl.max(tl.where(valid & finite, x, float("-inf")), axis=1)
        low = tl.min(tl.where(valid & finite, x, float("inf")), axis=1)
        widths = tl.where(top >= low, (top - low) * inverse, 0.0)
        spread = tl.maximum(spread, tl.max(widths, axis=0))
    return bad, spread


@triton.jit
def _evaluate(
    scores_ptr, weights_ptr, cell, value, inverse, scale, g, C, M: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr
):
    """Weighted mean_c p[c,m], (BM,), and mean_c p[c,m] p[c,n], (BM, BM), of p = softmax_m(scale * z + g)."""
    m = tl.arange(0, BM)
    mean, products = tl.zeros((BM,), tl.float64), tl.zeros((BM, BM), tl.float64)
    for first in range(0, C, BC):
        x = _load_rows(scores_ptr, first, cell, value, C, M, BC, BM)
        c = first + tl.arange(0, BC)
        weight = tl.load(weights_ptr + c, mask=c < C, other=0.0)
        top = tl.max(tl.where((m < M)[None, :], x, float("-inf")), axis=1)
        z = (x - top[:, None]) * inverse
        p = _softmax(tl.where((m < M)[None, :], scale * z + g[None, :], float("-inf")))
        weighted = weight[:, None] * p
        mean += tl.sum(weighted, axis=0)
        products += tl.sum(weighted[:, :, None] * p[:, None, :], axis=0)
    return mean / C, products / C


@triton.jit
def _softmax(x):
    """Softmax of each row; exp below exp(-345) counts as 0."""
    x -= tl.max(x, axis=1)[:, None]
    e = tl.where(x < _SMALLEST_EXPONENT, 0.0, tl.exp(x))
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _divergence(d):
    """(1 + d) log(1 + d) - d, without cancellation."""
    small = d * d * (_real(1 / 2) - d * (_real(1 / 6) - d * (_real(1 / 12) - d * _real(1 / 20))))
    inside = tl.maximum(1.0 + d, _real(1e-300))
    return tl.where(tl.abs(d) < _real(1e-3), small, tl.where(d > -1.0, inside * tl.log(inside) - d, 1.0))


@triton.jit
def _newton_step(mean, products, M: tl.constexpr, BM: tl.constexpr):
    """Solves (Hessian + ground) step = 1/M - mean by eliminating the graph of columns: weights are only ever added."""
    m = tl.arange(0, BM)
    weights = tl.where(m[:, None] < m[None, :], products, 0.0)  # of the edge between row and column, upper triangle
    step = tl.where(m < M, _real(1 / M) - mean, 0.0)
    ground = tl.zeros((BM,), tl.float64) + _real(_GROUND)
    pivots = tl.full((BM,), 1.0, tl.float64)
    for k in range(0, M):
        later = tl.sum(tl.where(m[:, None] == k, weights, 0.0), axis=0)  # row k: nothing before column k + 1
        ground_k, step_k = tl.sum(tl.where(m == k, ground, 0.0)), tl.sum(tl.where(m == k, step, 0.0))
        pivot = ground_k + tl.sum(later)
        share = later / pivot
        weights += tl.where(m[:, None] < m[None, :], share[:, None] * later[None, :], 0.0)
        ground += share * ground_k
        step += share * step_k
        pivots = tl.where(m == k, pivot, pivots)
    for i in range(0, M):
        k = M - 1 - i
        later = tl.sum(tl.where(m[:, None] == k, weights, 0.0), axis=0)
        step = tl.where(m == k, (step + tl.sum(later * step)) / pivots, step)
    return tl.where(m < M, step - tl.sum(step) / M, 0.0)


@triton.jit
def _solve(
    scores_ptr,
    weights_ptr,
    cell,
    value,
    inverse,
    potentials,
    spread,
    status,
    C,
    M: tl.constexpr,
    TOL: tl.constexpr,
    STAGE_TOL: tl.constexpr,
    MAX_ITERATIONS: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
):
    """Solves while `status` says running; returns potentials (not centred), status, KL, number of evaluations."""
    m = tl.arange(0, BM)
    first_scale = _real(1.0)
    while first_scale * spread > _FIRST_SPREAD:
        first_scale = first_scale / _STAGE_FACTOR
    g, scale, kl = potentials, _real(1.0), _real(float("nan"))
    iterations, warm = tl.full((), 0, tl.int32), tl.full((), 1, tl.int32)
    while status == _RUNNING:
        mean, products = _evaluate(scores_ptr, weights_ptr, cell, value, inverse, scale, g, C, M, BC, BM)
        iterations += 1
        kl = tl.sum(tl.where(m < M, _divergence(M * mean - 1.0), 0.0)) / M
        last = scale == 1.0
        reached = kl < tl.where(last, _real(TOL), _real(STAGE_TOL))
        step = _newton_step(mean, products, M, BM)
        osc = tl.max(tl.where(m < M, step, float("-inf"))) - tl.min(tl.where(m < M, step, float("inf")))
        length = tl.where(osc <= 1.0, 1.0, tl.log(1.0 + osc) / osc)
        g = tl.where(reached, g, g + length * step)
        status = tl.where(last & reached, _SOLVED, status)
        next_stage = (last == 0) & (reached | (osc < 1.0))
        g = tl.where(next_stage, g * _STAGE_FACTOR, g)
        scale = tl.where(next_stage, scale * _STAGE_FACTOR, scale)
        cold = (warm == 1) & (reached == 0) & (iterations >= _WARM_ITERATIONS)  # the warm start was a bad one
        g = tl.where(cold, 0.0, g)
        scale = tl.where(cold, first_scale, scale)
        warm = tl.where(cold, 0, warm)
        status = tl.where((status == _RUNNING) & (iterations >= MAX_ITERATIONS), _ITERATION_CAP, status)
    return g, status, kl, iterations


@triton.jit(do_not_specialize=["C"])
def _mixture_step_kernel(
    scores_ptr,  # (M, C) float64
    potentials_ptr,  # (M,) float64
    visits_ptr,  # (C, M) int64
    last_visit_ptr,  # (C, M) int64
    outcome_ptr,  # (7,) float64
    supernet_ptr,  # () int64
    weights_ptr,  # (C,) float64, mean 1
    step_ptr,  # () int64
    architectures_ptr,  # (steps + 1,) int64
    inverse_temperatures_ptr,  # (steps + 1,) float64
    uniforms_ptr,  # (steps + 1,) float64
    correct_ptr,  # () int64
    trained_ptr,  # () bool
    C,
    NUM_IMAGES: tl.constexpr,
    DECAY: tl.constexpr,
    TOL: tl.constexpr,
    STAGE_TOL: tl.constexpr,
    BALANCE_EVERY: tl.constexpr,
    MAX_ITERATIONS: tl.constexpr,
    M: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
):
    m = tl.arange(0, BM)
    alive = tl.load(outcome_ptr) == _SOLVED
    now = tl.load(step_ptr)
    architecture, supernet = tl.load(architectures_ptr + now), tl.load(supernet_ptr)
    following, uniform = tl.load(architectures_ptr + now + 1), tl.load(uniforms_ptr + now + 1)
    inverse = tl.load(inverse_temperatures_ptr + now + 1)

    # a[c,m] <- beta a[c,m] + (1 - beta) accuracy
    observed = alive & (tl.load(trained_ptr) != 0)
    cell, pair = supernet * C + architecture, architecture * M + supernet
    accuracy = tl.load(correct_ptr).to(tl.float64) / _real(NUM_IMAGES)
    value = _real(DECAY) * tl.load(scores_ptr + cell) + _real(1 - DECAY) * accuracy
    visits = tl.load(visits_ptr + pair)
    cell = tl.where(observed, cell, -1)

    old = tl.load(potentials_ptr + m, mask=m < M, other=0.0)
    bad, spread = _examine(scores_ptr, cell, value, inverse, C, M, BC, BM)
    due = alive & ((now + 1) % BALANCE_EVERY == 0)
    status = tl.where(due, _RUNNING, _SOLVED)
    status = tl.where(due & (spread > _LARGEST_SPREAD), _SPREAD_TOO_LARGE, status)
    status = tl.where(due & (bad < C * M), _NOT_FINITE, status)
    g, status, kl, iterations = _solve(
        scores_ptr, weights_ptr, cell, value, inverse, old, spread, status, C, M, TOL, STAGE_TOL, MAX_ITERATIONS, BC, BM
    )
    solved = due & (status == _SOLVED)
    g = tl.where(solved, g - tl.sum(tl.where(m < M, g, 0.0)) / M, old)

    # The first m whose cumulative p(m|following) is above the uniform number.
    place = m * C + following
    row = tl.load(scores_ptr + place, mask=m < M, other=0.0)
    x = tl.where(m < M, tl.where(place == cell, value, row) * inverse + g, float("-inf"))
    x -= tl.max(x, axis=0)
    e = tl.where(x < _SMALLEST_EXPONENT, 0.0, tl.exp(x))
    above = uniform * tl.sum(e) < tl.cumsum(e, axis=0)
    last = tl.max(tl.where(e > 0.0, m, 0), axis=0)  # where rounding leaves the number above the whole sum
    drawn = tl.minimum(tl.min(tl.where(above, m, BM), axis=0), last)

    tl.debug_barrier()  # every thread has read what is written from here on
    tl.store(scores_ptr + supernet * C + architecture, value, mask=observed)
    tl.store(visits_ptr + pair, visits + 1, mask=observed)
    tl.store(last_visit_ptr + pair, now, mask=observed)
    tl.store(potentials_ptr + m, g, mask=m < tl.where(solved, M, 0))
    tl.store(supernet_ptr, drawn.to(tl.int64), mask=alive & (status == _SOLVED))
    tl.store(outcome_ptr, status.to(tl.float64), mask=due)
    tl.store(outcome_ptr + 1, kl, mask=due)
    tl.store(outcome_ptr + 2, iterations.to(tl.float64), mask=due)
    tl.store(outcome_ptr + 3, spread, mask=due)
    tl.store(outcome_ptr + 4, tl.where(status == _NOT_FINITE, bad // M, -1).to(tl.float64), mask=due)
    tl.store(outcome_ptr + 5, tl.where(status == _NOT_FINITE, bad % M, -1).to(tl.float64), mask=due)
    tl.store(outcome_ptr + 6, now.to(tl.float64), mask=due)


def launch_mixture_step(
    scores: torch.Tensor,
    potentials: torch.Tensor,
    visits: torch.Tensor,
    last_visit: torch.Tensor,
    outcome: torch.Tensor,
    supernet: torch.Tensor,
    weights: torch.Tensor,
    step: torch.Tensor,
    architectures: torch.Tensor,
    inverse_temperatures: torch.Tensor,
    uniforms: torch.Tensor,
    correct: torch.Tensor,
    trained: torch.Tensor,
    num_images: int,
    ema_decay: float,
    tol: float,
    balance_every: int,
    max_iterations: int,
) -> None:
    num_supernets, num_architectures = scores.shape
    columns = max(2, triton.next_power_of_2(num_supernets))
    rows = min(triton.next_power_of_2(num_architectures), max(1, PRODUCTS // columns**2))
    with torch.cuda.device_of(scores):
        _mixture_step_kernel[(1,)](
            scores,
            potentials,
            visits,
            last_visit,
            outcome,
            supernet,
            weights,
            step,
            architectures,
            inverse_temperatures,
            uniforms,
            correct,
            trained,
            num_architectures,
            NUM_IMAGES=num_images,
            DECAY=ema_decay,
            TOL=tol,
            STAGE_TOL=min(tol, STAGE_TOL),
            BALANCE_EVERY=balance_every,
            MAX_ITERATIONS=max_iterations,
            M=num_supernets,
            BC=rows,
            BM=columns,
            num_warps=1 if rows * columns**2 <= PRODUCTS // 4 else 4,
            enable_fp_fusion=False,  # so that moving averages have the bits of csrc/balance.cpp
        )
