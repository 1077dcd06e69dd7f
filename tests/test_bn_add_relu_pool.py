"""bn_add_relu_pool: the reference against a float64 formula, Triton against both, slots of a buffer, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.conv_bn import batch_statistics_reference
from oracles import assert_no_worse
from stacked import (
    BACKENDS,
    TRITON_DTYPES,
    assert_guards_hold,
    channels_last,
    device_for,
    guarded,
    needs_triton,
    random_map,
)

# groups, images, C, H, W: smallest; ragged in windows and channels; more channels than a block; two tiles of a group
SHAPES = [(1, 1, 1, 2, 2), (3, 2, 5, 6, 2), (2, 1, 130, 2, 4), (2, 3, 20, 12, 10)]
KINDS = ["none", "plain", "normalised"]
OUTPUTS = ["full", "pooled", "both"]


def make_inputs(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> list[Tensor | None]:
    """y, stats, shortcut, shortcut_stats."""
    groups, images, *rest = shape
    y, shortcut = (random_map(groups * images, *rest, seed=seed, dtype=dtype) for seed in (1, 2))
    stats, shortcut_stats = (batch_statistics_reference(t, groups) for t in (y, shortcut))
    return [y, stats, None if kind == "none" else shortcut, shortcut_stats if kind == "normalised" else None]


def empty_outputs(y: Tensor, which: str) -> dict[str, Tensor]:
    """Slots in the middle of a longer buffer, poisoned."""
    shapes = {"full": y.shape, "pooled": (*y.shape[:2], y.shape[2] // 2, y.shape[3] // 2)}
    found = {}
    for name, shape in shapes.items():
        if which in (name, "both"):
            buffer = torch.full((len(y) + 2, *shape[1:]), torch.nan, dtype=y.dtype, device=y.device)
            found[name] = channels_last(buffer)[1:-1]
    return found


def run(inputs: list[Tensor | None], which: str, pool: str, backend: str) -> dict[str, Tensor]:
    moved = [None if t is None else t.to(device_for(backend)) for t in inputs]
    assert moved[0] is not None
    out = empty_outputs(moved[0], which)
    bn_add_relu_pool(*moved, **out, pool=pool, backend=backend)
    return {name: tensor.cpu() for name, tensor in out.items()}


def formula(inputs: list[Tensor | None], which: str, pool: str) -> dict[str, Tensor]:
    y, stats, shortcut, shortcut_stats = (None if t is None else t.double() for t in inputs)
    assert y is not None
    assert stats is not None

    def normed(x: Tensor, stats: Tensor) -> Tensor:
        groups = x.unflatten(0, (stats.shape[1], -1))
        return ((groups - stats[0][:, None, :, None, None]) * stats[1][:, None, :, None, None]).flatten(0, 1)

    z = normed(y, stats)
    if shortcut is not None:
        z = z + (shortcut if shortcut_stats is None else normed(shortcut, shortcut_stats))
    z = z.clamp(min=0)
    if which == "full":
        return {"full": z}
    corners = torch.stack([z[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    pooled = corners.amax(0) if pool == "max" else corners.mean(0)
    return {"pooled": pooled} if which == "pooled" else {"full": z, "pooled": pooled}


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...], kind: str, pool: str) -> None:
    inputs = make_inputs(shape, kind, torch.float64)
    wanted = formula(inputs, "both", pool)
    for name, found in run(inputs, "both", pool, "reference").items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", OUTPUTS)
def test_error_is_at_most_twice_eager(which: str, kind: str, pool: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        inputs = make_inputs(shape, kind, dtype)
        eager, oracle = run(inputs, which, pool, "reference"), formula(inputs, which, pool)
        for name, found in run(inputs, which, pool, "triton").items():
            assert_no_worse(found, eager=eager[name], oracle=oracle[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_odd_map_is_written_whole_and_nothing_else(backend: str) -> None:
    """The slots lie between images of NaN, which stay."""
    inputs = make_inputs((2, 2, 5, 3, 5), "plain", torch.float32)
    moved = [None if t is None else t.to(device_for(backend)) for t in inputs]
    buffer = channels_last(torch.full((6, 5, 3, 5), torch.nan, device=device_for(backend)))
    bn_add_relu_pool(*moved, full=buffer[1:5], backend=backend)
    assert torch.equal(buffer.isnan().any((1, 2, 3)).cpu(), torch.tensor([True, False, False, False, False, True]))
    wanted = formula(inputs, "full", "max")["full"]
    torch.testing.assert_close(buffer[1:5].cpu().double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 2])
def test_full_may_be_an_input(place: int, backend: str) -> None:
    inputs = make_inputs((2, 2, 20, 4, 6), "normalised", torch.float32)
    wanted = run(inputs, "both", "max", backend)
    moved = [None if t is None else t.to(device_for(backend)) for t in inputs]
    inside = moved[place]
    assert inside is not None
    out = empty_outputs(inside, "pooled")
    bn_add_relu_pool(*moved, full=inside, **out, backend=backend)
    assert torch.equal(inside.cpu(), wanted["full"])
    assert torch.equal(out["pooled"].cpu(), wanted["pooled"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_groups_are_separate_calls_and_runs_agree(pool: str, backend: str) -> None:
    inputs = make_inputs((3, 2, 20, 4, 6), "normalised", torch.float32)
    together = run(inputs, "both", pool, backend)
    again = run(inputs, "both", pool, backend)
    for g in range(3):
        parts = [None if t is None else t.chunk(3)[g] if t.ndim == 4 else t[:, g : g + 1].contiguous() for t in inputs]
        for name, alone in run(parts, "both", pool, backend).items():
            assert torch.equal(together[name], again[name])
            assert torch.equal(together[name].chunk(3)[g], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("place", [0, 2])
def test_nan_stays_where_it_is_and_in_its_window(place: int, pool: str, backend: str) -> None:
    inputs = make_inputs((2, 2, 5, 4, 4), "plain", torch.float32)
    spoilt = inputs[place]
    assert spoilt is not None
    spoilt[1, 3, 0, 3] = torch.nan  # neither the first nor the last of its window
    found = run(inputs, "both", pool, backend)
    assert found["full"].isnan().nonzero().tolist() == [[1, 3, 0, 3]]
    assert found["pooled"].isnan().nonzero().tolist() == [[1, 3, 0, 1]]


@needs_triton
@pytest.mark.parametrize("which", OUTPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_stays_in_bounds(shape: tuple[int, ...], which: str) -> None:
    from bmsn.kernels.bn_add_relu_pool import launch_bn_add_relu_pool

    inputs = make_inputs(shape, "normalised", torch.float32)
    wanted = run(inputs, which, "max", "triton")
    bounded = [None if t is None else guarded(t.to(device_for("triton"))) for t in inputs]
    out = {name: guarded(tensor.to(device_for("triton")), poison=True) for name, tensor in wanted.items()}
    launch_bn_add_relu_pool(*bounded, out.get("full"), out.get("pooled"), "max")
    assert all(torch.equal(tensor.cpu(), wanted[name]) for name, tensor in out.items())
    assert_guards_hold(**out)


def test_pooling_sees_the_values_rounded_to_bfloat16() -> None:
    y = channels_last(torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2).bfloat16())
    stats = torch.tensor([0.0, 1.0 + 2**-9]).reshape(2, 1, 1)  # 1 + 2^-9 rounds to 1, and a quarter of it to 1/4
    out = empty_outputs(y, "both")
    bn_add_relu_pool(y, stats, **out, pool="avg", backend="reference")
    assert out["full"][0, 0, 0, 0] == 1
    assert out["pooled"].item() == 0.25


def test_a_large_mean_costs_bfloat16_no_more_than_its_own_rounding() -> None:
    """Around 1000 its steps are 4: x * rstd - mean * rstd, in float32, has far smaller ones."""
    y = channels_last((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 8 + 1000).bfloat16())
    stats = batch_statistics_reference(y, 2)
    out = empty_outputs(y, "full")
    bn_add_relu_pool(y, stats, **out, backend="reference")
    wanted = formula([y, stats, None, None], "full", "max")["full"]
    torch.testing.assert_close(out["full"].double(), wanted, rtol=2**-8, atol=2**-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = make_inputs((2, 1, 4, 4, 4), "normalised", torch.float32)
    moved = [None if t is None else t.to(device_for(backend)) for t in inputs]
    assert moved[0] is not None
    for which in OUTPUTS:
        out = {name: torch.zeros_like(tensor) for name, tensor in empty_outputs(moved[0], which).items()}
        arguments = (*moved, out.get("full"), out.get("pooled"), "max", backend)
        torch.library.opcheck(torch.ops.bmsn.bn_add_relu_pool.default, arguments)


def test_bad_input() -> None:
    y, stats, shortcut, shortcut_stats = make_inputs((2, 2, 4, 4, 6), "normalised", torch.float32)
    assert y is not None
    assert stats is not None
    assert shortcut is not None
    out = empty_outputs(y, "both")
    good: dict[str, Any] = {
        **{"y": y, "stats": stats, "shortcut": shortcut, "shortcut_stats": shortcut_stats, "backend": "reference"},
        **out,
    }

    def fails(message: str, **bad: Any) -> None:
        with pytest.raises(InputError, match=message):
            bn_add_relu_pool(**good | bad)

    fails("y must be float32, bfloat16 or float64 .* got torch.float16", y=y.half())
    fails("y must be channels_last", y=y.contiguous())
    fails(r"y must be \(B, C, H, W\) with at least 1 of each; got \(4, 4, 24\)", y=y.flatten(2))
    fails(r"stats must be \(2, G, C\); got \(2, 4\)", stats=stats[:, 0])
    fails("num_groups must be at least 1 and divide the batch of 4 images; got 3", stats=torch.zeros(2, 3, 4))
    for bad in (stats[:, :, :3].contiguous(), stats.double(), stats.to("meta"), stats.mT.contiguous().mT):
        fails(r"stats must be \(2, 2, 4\), contiguous, torch.float32 on cpu", stats=bad)
        fails("shortcut_stats must be", shortcut_stats=bad)
    fails("shortcut_stats must be None where there is no shortcut", shortcut=None)
    for wrong in (shortcut[:2], shortcut.bfloat16(), shortcut.to("meta")):
        fails(r"shortcut must be \(4, 4, 4, 6\), torch.float32 on cpu", shortcut=wrong)
    fails("shortcut must be channels_last", shortcut=shortcut.contiguous())
    odd, *rest = make_inputs((2, 2, 4, 3, 6), "plain", torch.float32)
    assert odd is not None
    message = r"a map that is pooled 2x2 must have even H and W; got y \(4, 4, 3, 6\)"
    fails(message, y=odd, stats=rest[0], shortcut=rest[1], shortcut_stats=None, full=None)
    fails("pool must be one of max, avg; got 'min'", pool="min")
    fails("at least one of full and pooled must be given", full=None, pooled=None)
    fails(r"full must be \(4, 4, 4, 6\), torch.float32 on cpu", full=out["pooled"])
    fails(r"pooled must be \(4, 4, 2, 3\), torch.float32 on cpu", pooled=out["full"])
    wide = {name: value.double() for name, value in good.items() if isinstance(value, Tensor)}
    fails("bn_add_relu_pool has only: reference", **wide, backend="triton")
