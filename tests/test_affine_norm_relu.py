"""affine_norm_relu: reference, C++ and Triton against BatchNorm written out in float64, its statistics, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.norm_relu import Pool, affine_norm_relu, norm_add_relu, norm_relu
from oracles import assert_no_worse
from stacked import INTERPRETING, channels_last, device_for, needs_triton, random_map

needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C was not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
COMPILED = BACKENDS[1:]
# (images, C, H, W) and pool: ragged, odd map; several programs; more channels than a block; several chunks
SHAPES: list[tuple[tuple[int, ...], Pool | None]] = [
    ((3, 5, 7, 3), None),
    ((3, 20, 12, 10), "max"),
    ((2, 130, 4, 2), "avg"),
    ((12, 32, 16, 16), "avg"),
]
KINDS = ["none", "plain", "normalised"]
POOLS = {None: lambda y: y, "max": lambda y: F.max_pool2d(y, 2), "avg": lambda y: F.avg_pool2d(y, 2)}


def make_inputs(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, affine and, but for "none", a shortcut. Weights of both signs and one 0, which says nothing about x."""
    x, shortcut = (random_map(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    branches = 2 if kind == "normalised" else 1
    affine = torch.randn(branches, 2, shape[1], generator=torch.Generator().manual_seed(3))
    affine[0, 0, -1] = 0
    if dtype == torch.float64:
        affine = affine.double()
    return [x, affine] if kind == "none" else [x, affine, shortcut]


def written_out(norm, pool: Pool | None):  # type: ignore[no-untyped-def]
    """The op by `norm(x, weight, bias)`; returns what comes before ReLU, too."""

    def run(x: Tensor, affine: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = norm(x, *affine[0])
        if shortcut is not None:
            value = value + (norm(shortcut, *affine[1]) if len(affine) == 2 else shortcut)
        return POOLS[pool](F.relu(value)), value

    return run


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    normed = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    return normed * weight[:, None, None] + bias[:, None, None]


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def with_gradients(run, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """y, and the gradients of x, affine and the shortcut."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves)[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "pool"), SHAPES, ids=str)
def test_error_is_at_most_twice_eager(
    shape: tuple[int, ...], pool: Pool | None, kind: str, dtype: torch.dtype, backend: str
) -> None:
    device = device_for(backend)
    if backend == "triton" and INTERPRETING and (dtype == torch.bfloat16 or (shape, pool) == SHAPES[3]):
        pytest.skip("the interpreter truncates to bfloat16, and is slow")
    inputs = make_inputs(kind, shape, dtype)
    oracle_of, eager_of = written_out(formula, pool), written_out(eager_norm, pool)
    wide = [t.double() for t in inputs]
    y, value = oracle_of(*wide)
    grad = random_map(*y.shape, seed=4, dtype=dtype)
    near = value.abs() < 0.05  # there eager may round to the other side of ReLU, or of two values in a window
    grad = grad * (F.max_pool2d(near.double(), 2) == 0 if pool else ~near)
    if pool == "max":
        first, second = F.unfold(F.relu(value), 2, stride=2).view(*y.shape[:2], 4, -1).topk(2, dim=2).values.unbind(2)
        grad = grad * (first - second > 0.05).view(y.shape)
    grad = channels_last(grad.to(dtype))
    oracle = with_gradients(oracle_of, wide, grad.double())
    eager = with_gradients(eager_of, inputs, grad)

    def run(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return affine_norm_relu(*arguments, pool=pool, backend=backend)

    found = with_gradients(run, [t.to(device) for t in inputs], grad.to(device))
    for got, plain, exact in zip(found, eager, oracle, strict=True):
        assert got.dtype == plain.dtype
        # Sums of a few dozen float32 values on Triton: eager's own error can be below one rounding of its result.
        assert_no_worse(got.cpu(), eager=plain, oracle=exact, factor=4 if backend == "triton" else 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_make_running_ones_as_torch_keeps_them(kind: str, backend: str) -> None:
    inputs = make_inputs(kind, (6, 20, 6, 5))
    _, stats = affine_norm_relu(*(t.to(device_for(backend)) for t in inputs), backend=backend)
    assert stats.shape == (2 if kind == "normalised" else 1, 2, 20)
    assert not stats.requires_grad
    for (mean, rstd), branch in zip(stats.cpu(), inputs[::2], strict=False):
        norm = nn.BatchNorm2d(20, momentum=1.0)
        norm(branch)
        torch.testing.assert_close(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((rstd**-2 - norm.eps) * 180 / 179, norm.running_var, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_one_and_bias_zero_are_no_affine_step(kind: str, pool: Pool | None, backend: str) -> None:
    """To the bit, forward and backward; on Triton to rounding (contraction differs)."""
    device = device_for(backend)
    x, affine, *rest = (t.to(device) for t in make_inputs(kind, (2, 20, 6, 10)))
    affine[:, 0], affine[:, 1] = 1, 0
    y = affine_norm_relu(x, affine, *rest, pool=pool, backend=backend)[0]
    grad = random_map(*y.shape, seed=4).to(device)

    def plain(x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor]:
        if shortcut is None:
            return (norm_relu(x, pool=pool, backend=backend),)
        normalise = kind == "normalised"
        return (norm_add_relu(x, shortcut, normalise_shortcut=normalise, pool=pool, backend=backend),)

    def with_affine(x: Tensor, *shortcut: Tensor) -> tuple[Tensor, Tensor]:
        return affine_norm_relu(x, affine, *shortcut, pool=pool, backend=backend)

    found, expected = (with_gradients(run, [x, *rest], grad) for run in (with_affine, plain))
    for got, wanted in zip(found, expected, strict=True):
        if backend == "cpp":
            assert torch.equal(got, wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, pool: Pool | None) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(kind, (2, 2, 2, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: affine_norm_relu(*t, pool=pool)[0], inputs)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_float32_rounded_and_threads_change_nothing(kind: str) -> None:
    inputs = make_inputs(kind, (16, 20, 32, 30), torch.bfloat16)
    grad = random_map(16, 20, 32, 30, seed=4, dtype=torch.bfloat16)
    num_threads, results = torch.get_num_threads(), []
    try:
        for threads, dtype in ((1, torch.bfloat16), (3, torch.bfloat16), (1, torch.float32)):
            torch.set_num_threads(threads)
            given = [inputs[0].to(dtype), inputs[1], *(t.to(dtype) for t in inputs[2:])]
            results.append(with_gradients(lambda *t: affine_norm_relu(*t, backend="cpp"), given, grad.to(dtype)))
    finally:
        torch.set_num_threads(num_threads)
    low, threaded, wide = results
    for one, three, exact in zip(low, threaded, wide, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(one, exact.to(one.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spoils_its_channel_alone(backend: str) -> None:
    x, affine = make_inputs("none", (2, 3, 4, 4))
    affine[:] = 1
    x[0, 1, 2, 3] = torch.nan
    device = device_for(backend)
    grad = torch.ones_like(x).to(device)
    y, dx, daffine = with_gradients(
        lambda *t: affine_norm_relu(*t, backend=backend), [x.to(device), affine.to(device)], grad
    )
    spoilt = torch.tensor([False, True, False])
    for value in (y, dx):
        assert torch.equal(value.isnan().cpu(), spoilt[:, None, None].expand_as(x))
    assert torch.equal(daffine[0, 0].isnan().cpu(), spoilt)


@needs_cpp
def test_without_a_gradient_nothing_is_kept() -> None:
    x, affine = make_inputs("none", (2, 3, 4, 4))
    kept, _ = affine_norm_relu(x, affine.requires_grad_())
    assert kept.requires_grad
    with torch.no_grad():
        y, _ = affine_norm_relu(x, affine)
    assert y.grad_fn is None
    assert torch.equal(y, kept)


def test_bad_input() -> None:
    x, affine, shortcut = make_inputs("normalised", (4, 3, 4, 4))
    with pytest.raises(InputError, match=r"affine must be \(1, 2, 3\).*got \(2, 2, 3\)"):
        affine_norm_relu(x, affine)
    with pytest.raises(InputError, match=r"affine must be \(1, 2, 3\).*got \(3, 2, 3\)"):
        affine_norm_relu(x, torch.ones(3, 2, 3), shortcut)
    with pytest.raises(InputError, match=r"affine must be .*float32.*bfloat16"):
        affine_norm_relu(x.bfloat16(), affine[:1].bfloat16())
    with pytest.raises(InputError, match=r"affine must be .*with strides"):
        affine_norm_relu(x, affine.transpose(1, 2).contiguous().transpose(1, 2), shortcut)
    with pytest.raises(InputError, match="shortcut must be channels_last"):
        affine_norm_relu(x, affine, shortcut.contiguous())
    with pytest.raises(InputError, match=r"even height and width; x is \(4, 3, 4, 3\)"):
        affine_norm_relu(channels_last(x[..., :3]), affine[:1], pool="avg")
