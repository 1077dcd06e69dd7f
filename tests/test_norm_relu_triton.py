"""norm_relu and norm_add_relu on Triton: against a float64 formula, pooling, bounds, groups, NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.ops.norm_relu import Pool, affine_norm_relu, norm_add_relu, norm_relu
from oracles import assert_no_worse
from stacked import TRITON_DTYPES, assert_guards_hold, channels_last, device_for, guarded, needs_triton, random_map
from test_norm_relu import KINDS, POOLS, before_relu, eager_norm, formula, op, with_gradients

# groups, images, C, H, W: smallest; ragged in windows and channels; more channels than a block; several programs
SHAPES = [(1, 1, 1, 2, 2), (3, 2, 5, 6, 2), (2, 1, 130, 4, 2), (2, 3, 20, 12, 10)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    full = (shape[0] * shape[1], *shape[2:])
    x, shortcut, grad = (random_map(*full, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    return x, shortcut, grad


def run(
    kind: str, x: Tensor, shortcut: Tensor, num_groups: int, grad: Tensor, pool: Pool | None = None
) -> dict[str, Tensor]:
    moved = [t.to(device_for("triton")) for t in (x, shortcut, grad)]
    found = with_gradients(op(kind, "triton", pool), *moved[:2], num_groups, moved[2])
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x, shortcut, grad = make_inputs(shape, dtype)
    value = before_relu(kind, x.double(), shortcut.double(), shape[0], formula)
    grad = grad * (value.abs() > 0.05)  # nearer to 0 eager may round to the other side of ReLU
    wide = x.double(), shortcut.double(), shape[0], grad.double()
    oracle = with_gradients(lambda x, s, g: F.relu(before_relu(kind, x, s, g, formula)), *wide)
    eager = with_gradients(lambda x, s, g: F.relu(before_relu(kind, x, s, g, eager_norm)), x, shortcut, shape[0], grad)
    found = run(kind, x, shortcut, shape[0], grad)
    assert found.keys() == oracle.keys()
    for name, got in found.items():
        assert got.is_contiguous(memory_format=torch.channels_last)
        # sums of a few dozen float32 values: eager's own error can be below one rounding of its result
        assert_no_worse(got, eager=eager[name], oracle=oracle[name], factor=4)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "pool"), [*((shape, "max") for shape in SHAPES), (SHAPES[1], "avg")], ids=str)
def test_pooling_is_torchs_behind_the_rest(shape: tuple[int, ...], pool: Pool, kind: str, dtype: torch.dtype) -> None:
    x, shortcut, grad = make_inputs(shape, dtype)
    x[:, :, :, 1::2] = x[:, :, :, 0::2]  # two of each four are equal: the first gets the gradient
    shortcut[:, :, :, 1::2] = shortcut[:, :, :, 0::2]
    grad = channels_last(grad[:, :, ::2, ::2])
    device = device_for("triton")
    leaves = [t.to(device).detach().requires_grad_() for t in (x, shortcut)]
    y = POOLS[pool](op(kind, "triton")(*leaves, shape[0]), 2)
    y.backward(grad.to(device))
    expected = {"y": y.detach(), "dx": leaves[0].grad, "dshortcut": leaves[1].grad}
    found = run(kind, x, shortcut, shape[0], grad, pool)
    for name, value in found.items():
        wanted = expected[name].cpu()
        # sums over windows instead of pixels are in another order
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        if name == "y" or (name == "dshortcut" and kind == "plain"):
            assert torch.equal(value, wanted), name


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "has_affine", "pool"),
    [(shape, False, pool) for shape in SHAPES[1:] for pool in (None, "max")]
    + [(SHAPES[1], has_affine, pool) for has_affine in (False, True) for pool in (None, *POOLS)],
    ids=str,
)
def test_triton_stays_in_bounds(shape: tuple[int, ...], kind: str, has_affine: bool, pool: Pool | None) -> None:
    """Inputs between guards of NaN, outputs poisoned with it."""
    from bmsn.kernels.norm_relu import launch_norm_relu, launch_norm_relu_backward

    num_groups, channels, device = 1 if has_affine else shape[0], shape[2], device_for("triton")
    x, shortcut, grad = make_inputs(shape)
    grad = channels_last(grad[:, :, ::2, ::2]) if pool else grad
    branches = 2 if kind == "normalised" else 1
    if has_affine:
        affine = torch.randn(branches, 2, channels, generator=torch.Generator().manual_seed(5)).to(device)
        leaves = [t.to(device).requires_grad_() for t in (x, affine, shortcut)]
        result, _ = affine_norm_relu(*leaves[: 2 if kind == "none" else 3], pool=pool, backend="triton")
        result.backward(grad.to(device))
        found = {"y": result.detach(), "dx": leaves[0].grad, "daffine": leaves[1].grad, "dshortcut": leaves[2].grad}
        expected = {name: value.cpu() for name, value in found.items() if value is not None}
    else:
        affine, expected = None, run(kind, x, shortcut, num_groups, grad, pool)
    x, shortcut, grad = (guarded(t.to(device)) for t in (x, shortcut, grad))
    y, index = guarded(torch.empty_like(grad), poison=True), None
    if pool:
        index = channels_last(torch.full((*grad.shape[:3], grad.shape[3]), 255, dtype=torch.uint8, device=device))
    affine = None if affine is None else guarded(affine.detach())
    stats = guarded(torch.empty((branches, 2, num_groups, channels), device=device), poison=True)
    launch_norm_relu(x, None if kind == "none" else shortcut, affine, y, stats, index, pool)
    outputs = {"dx": guarded(x, poison=True)}
    if kind != "none":
        outputs["dshortcut"] = guarded(x, poison=True)
    if affine is not None:
        outputs["daffine"] = guarded(affine, poison=True)
    launch_norm_relu_backward(
        y=y if pool == "max" or (pool is None and kind != "none") else None, grad=grad, x=x,
        shortcut=shortcut if kind == "normalised" else None, affine=affine, stats=stats, index=index, pool=pool,
        dx=outputs["dx"], dshortcut=outputs.get("dshortcut"), daffine=outputs.get("daffine"),
    )  # fmt: skip
    assert_guards_hold(y=y, stats=stats, **outputs)
    assert index is None or (index < (4 if pool == "max" else 16)).all()
    for name, value in {"y": y, **outputs}.items():
        assert torch.equal(value.cpu(), expected[name]), name


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_separate_calls(kind: str) -> None:
    x, shortcut, grad = make_inputs((3, 2, 5, 6, 2))
    together = run(kind, x, shortcut, 3, grad)
    parts = zip(x.chunk(3), shortcut.chunk(3), grad.chunk(3), strict=True)
    alone = [run(kind, a, b, 1, c) for a, b, c in parts]
    for name, value in together.items():
        assert torch.equal(value, torch.cat([results[name] for results in alone])), name


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_nan_spoils_its_channel_and_group_alone(kind: str) -> None:
    x, shortcut, grad = make_inputs((2, 2, 3, 4, 4))
    x[0, 1, 2, 3] = torch.nan
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[:2, 1] = True
    found = run(kind, x, shortcut, 2, grad)
    assert torch.equal(found["y"].isnan(), spoilt)
    assert torch.equal(found["dx"].isnan(), spoilt)


@needs_triton
def test_a_large_mean_does_not_cancel() -> None:
    x = channels_last(torch.randn(16, 2, 16, 16, generator=torch.Generator().manual_seed(1)) + 1000)
    oracle = F.relu(formula(x.double()))
    y = norm_relu(x.to(device_for("triton")), backend="triton").cpu()
    assert (y.double() - oracle).abs().max() < 1e-4  # float32 holds 1000 to 3e-5


@needs_triton
@pytest.mark.parametrize(("normalise", "pool", "num_groups"), [(False, "max", 2), (True, "avg", 1)])
def test_opcheck(normalise: bool, pool: Pool, num_groups: int) -> None:
    x, shortcut, grad = (t.to(device_for("triton")) for t in make_inputs((2, 2, 3, 4, 4)))
    ops = torch.ops.bmsn
    affine = torch.ones(1 + normalise, 2, 3, device=x.device) if num_groups == 1 else None
    arguments = (x, shortcut, affine, None, num_groups, normalise, pool, "triton")
    torch.library.opcheck(ops.norm_relu.default, arguments)
    y, stats, index = ops.norm_relu(*arguments)
    grad = channels_last(grad[:, :, ::2, ::2])
    saved = (y, x, shortcut if normalise else None, affine, stats, index, pool)
    torch.library.opcheck(ops.norm_relu_backward.default, (grad, *saved, True, "triton"))


@needs_triton
def test_without_a_gradient_nothing_is_kept() -> None:
    x, shortcut, _ = (t.to(device_for("triton")) for t in make_inputs((1, 2, 3, 4, 4)))
    with torch.no_grad():
        y = norm_add_relu(x.requires_grad_(), shortcut, normalise_shortcut=True, backend="triton")
    assert y.grad_fn is None
