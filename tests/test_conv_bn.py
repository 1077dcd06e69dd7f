"""conv_bn and batch_statistics: the reference against a float64 formula, Triton against both."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.conv_bn import (
    ConvBn,
    batch_statistics,
    batch_statistics_reference,
    conv_bn,
    conv_bn_reference,
)
from bmsn.ops.convolution_choice import LIBRARY_FROM, takes_library
from convolutions import SHAPES, formula, make_case, statistics
from oracles import assert_no_worse
from stacked import (
    BACKENDS,
    TRITON_DTYPES,
    WITHOUT_CPP,
    assert_guards_hold,
    channels_last,
    device_for,
    guarded,
    needs_triton,
    random_map,
    random_rows,
)

conv_bn_module = import_module("bmsn.ops.conv_bn")


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMSN_CONVOLUTION", "ours")


def outputs(result: ConvBn) -> list[Tensor]:
    return [tensor for tensor in result if tensor is not None]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...], normed: bool) -> None:
    case = make_case(shape, normed, torch.float64)
    for found, wanted in zip(outputs(case.run("reference")), formula(case), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape: tuple[int, ...], normed: bool, dtype: torch.dtype) -> None:
    case = make_case(shape, normed, dtype)
    found, eager, oracle = outputs(case.run("triton")), outputs(case.run("reference")), formula(case)
    for actual, plain, wide in zip(found, eager, oracle, strict=True):
        for part in (0, 1) if wide.ndim == 3 else (slice(None),):  # mean and rstd have scales of their own
            assert_no_worse(actual[part].cpu(), eager=plain[part], oracle=wide[part])
        assert actual.ndim == 3 or actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_groups_are_separate_calls_and_runs_agree(shape: tuple[int, ...], backend: str) -> None:
    case = make_case(shape, normed=True)
    assert case.stats is not None
    together = outputs(case.run(backend))
    assert all(torch.equal(a, b) for a, b in zip(together, outputs(case.run(backend)), strict=True))
    for g, x in enumerate(case.x.chunk(case.num_groups)):
        row = int(case.weight_index[g])
        alone = replace(
            case,
            x=x,
            weight=case.weight[row : row + 1],
            weight_index=torch.zeros(1, dtype=torch.int32),
            stats=case.stats[:, g : g + 1].contiguous(),
            shortcut_weight=None if case.shortcut_weight is None else case.shortcut_weight[row : row + 1],
        )
        for all_groups, one in zip(together, outputs(alone.run(backend)), strict=True):
            part = all_groups[:, g : g + 1] if one.ndim == 3 else all_groups.chunk(case.num_groups)[g]
            assert torch.equal(part, one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_an_index_all_groups_take_the_first_weights(backend: str) -> None:
    case = make_case(SHAPES[2], normed=False)
    zeros = replace(case, weight_index=torch.zeros(2, dtype=torch.int32)).run(backend)
    device = device_for(backend)
    none = conv_bn(case.x.to(device), case.weight.to(device), 2, stride=2, backend=backend)
    assert torch.equal(none.y, zeros.y)
    assert none.shortcut is None
    assert none.shortcut_stats is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spoils_what_sees_it_and_its_group(backend: str) -> None:
    case = make_case((2, 2, 16, 8, 6, 6, 3, 1, True), normed=True)
    case.x[1, 5, 2, 3] = torch.nan
    found = case.run(backend)
    assert found.shortcut is not None
    seen = torch.zeros(found.y.shape, dtype=torch.bool)
    seen[1, :, 1:4, 2:5] = True
    assert torch.equal(found.y.isnan().cpu(), seen)
    seen = torch.zeros_like(seen)
    seen[1, :, 2, 3] = True
    assert torch.equal(found.shortcut.isnan().cpu(), seen)
    assert found.stats[:, 0].isnan().all()
    assert found.stats[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_an_unused_group_touch_no_other(backend: str) -> None:
    case = make_case(SHAPES[1], normed=True)
    clean = case.run(backend).y
    assert case.stats is not None
    case.stats[:, 1] = torch.nan
    images = len(case.x) // 3
    spoilt = case.run(backend).y
    assert spoilt[images : 2 * images].isnan().all()
    assert torch.equal(spoilt[:images], clean[:images])
    assert torch.equal(spoilt[2 * images :], clean[2 * images :])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@needs_triton
def test_triton_stays_in_bounds(shape: tuple[int, ...], normed: bool) -> None:
    """Between guards of NaN: read, one spoils a result; written, it is NaN no longer. Outputs start as NaN."""
    from bmsn.kernels.conv_bn import launch_conv_bn

    case = make_case(shape, normed).to(device_for("triton"))
    wanted = outputs(case.run("triton"))
    out = {name: guarded(tensor, poison=True) for name, tensor in zip(ConvBn._fields, wanted, strict=False)}
    inputs = [None if t is None else guarded(t) for t in (case.stats, case.weight_index)]
    shortcut_weight = None if case.shortcut_weight is None else guarded(case.shortcut_weight)
    x, weight = guarded(case.x), guarded(case.weight)
    launch_conv_bn(x, weight, case.num_groups, *inputs, case.stride, shortcut_weight, *out.values())
    assert all(torch.equal(tensor, want) for tensor, want in zip(out.values(), wanted, strict=True))
    assert_guards_hold(**out)


@needs_triton
def test_the_shapes_take_every_tuned_configuration_of_triton() -> None:
    from bmsn.kernels.conv_bn import CONFIGS, config_for

    taken = {(size, shortcut, config_for(size, shortcut, o)) for size in (2, 4) for _, _, _, o, *_, shortcut in SHAPES}
    assert taken == {(*key, config) for key, configs in CONFIGS.items() for config in configs}


# Ours or the library's. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "ours", "library"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], (2, 1, 32, 32, 5, 3, 3, 1, False)], ids=str)
@needs_triton
def test_either_convolution_of_triton_is_right(
    shape: tuple[int, ...], normed: bool, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, plain = [], conv_bn_module.convolve
    case = make_case(shape, normed)
    eager, oracle = outputs(case.run("reference")), formula(case)
    monkeypatch.setenv("BMSN_CONVOLUTION", choice)
    monkeypatch.setattr(conv_bn_module, "convolve", lambda *a: library.append(a) or plain(*a))
    found = outputs(case.run("triton"))
    for actual, by_torch, wide in zip(found, eager, oracle, strict=True):
        for part in (0, 1) if wide.ndim == 3 else (slice(None),):
            assert_no_worse(actual[part].cpu(), eager=by_torch[part], oracle=wide[part])
    wide_enough = min(shape[2], shape[3]) >= 32  # 3x3 in float32
    assert bool(library) == (choice == "library" or (choice == "auto" and wide_enough))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_library_is_for_wide_layers(kernel: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(outputs: int, inputs: int) -> bool:
        return takes_library(torch.empty((1, outputs, inputs, kernel, kernel), dtype=dtype, device="meta"))

    least = LIBRARY_FROM[kernel, dtype.itemsize]
    assert takes(least, least) is False  # the tests ask for ours
    monkeypatch.setenv("BMSN_CONVOLUTION", "auto")
    assert takes(least, least) is True
    assert takes(least - 1, least) is takes(least, least - 1) is False
    monkeypatch.setenv("BMSN_CONVOLUTION", "library")
    assert takes(1, 1) is True
    monkeypatch.setenv("BMSN_CONVOLUTION", "cudnn")
    with pytest.raises(InputError, match="BMSN_CONVOLUTION is 'cudnn'; accepted: auto, ours, library"):
        takes(1, 1)


# batch_statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (3, 2, 5, 7, 3), (2, 5, 130, 4, 4), (2, 9, 16, 8, 9)], ids=str)
def test_statistics_error_is_at_most_twice_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    groups, images, *rest = shape
    x = random_map(groups * images, *rest, seed=3, dtype=dtype)
    oracle = torch.stack([statistics(group) for group in x.double().chunk(groups)], 1)
    found, eager = batch_statistics(x.to(device_for("triton")), groups, backend="triton"), batch_statistics(x, groups)
    for part in (0, 1):
        assert_no_worse(found[part].cpu(), eager=eager[part], oracle=oracle[part])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_does_not_cancel(backend: str) -> None:
    x = channels_last(torch.randn(256, 2, 32, 32, generator=torch.Generator().manual_seed(1)) + 1000)
    found = batch_statistics(x.to(device_for(backend)), 1, backend=backend)[:, 0].cpu().double()
    oracle = statistics(x.double())
    assert (found[0] - oracle[0]).abs().max() <= 6.2e-5  # float32 holds 1000 to 3.1e-5
    assert (found[1] / oracle[1] - 1).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_groups_are_separate_and_runs_agree(backend: str) -> None:
    x = random_map(12, 20, 5, 7, seed=4).to(device_for(backend))
    together = batch_statistics(x, 3, backend=backend)
    assert torch.equal(together, batch_statistics(x, 3, backend=backend))
    alone = [batch_statistics(group, 1, backend=backend) for group in x.chunk(3)]
    assert torch.equal(together, torch.cat(alone, 1))


@needs_triton
def test_triton_statistics_stay_in_bounds() -> None:
    from bmsn.kernels.statistics import launch_batch_statistics

    x = random_map(10, 130, 4, 4, seed=4).to(device_for("triton"))
    wanted = batch_statistics(x, 2, backend="triton")
    stats = guarded(wanted, poison=True)
    launch_batch_statistics(guarded(x), 2, stats)
    assert torch.equal(stats, wanted)
    assert_guards_hold(stats=stats)


# Registration and errors. --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_opcheck(backend: str) -> None:
    case = make_case((2, 2, 4, 8, 4, 6, 3, 2, True), normed=True).to(device_for(backend))
    ops = torch.ops.bmsn
    whole = (case.stats, case.weight_index, 2, case.shortcut_weight)
    for optional in (whole, (None, None, 1, None)):
        torch.library.opcheck(ops.conv_bn.default, (case.x, case.weight, 2, *optional, backend))
    torch.library.opcheck(ops.batch_statistics.default, (case.x, 2, backend))


def test_bfloat16_is_rounded_once_by_the_reference() -> None:
    case = make_case(SHAPES[1], normed=True, dtype=torch.bfloat16)
    y, stats = outputs(case.run("reference"))
    assert y.dtype == torch.bfloat16
    assert stats.dtype == torch.float32
    assert torch.equal(stats, batch_statistics_reference(y, 3))
    assert_no_worse(
        y, eager=conv_bn_reference(case.x, case.weight, 3, case.stats, case.weight_index)[0], oracle=formula(case)[0]
    )


def test_maps_beyond_2_31_elements_are_taken_in_smaller_groups() -> None:
    x = torch.empty((2**18, 16, 64, 64), device="meta", memory_format=torch.channels_last)
    assert x.numel() == 2**34
    found = conv_bn(x, random_rows(1, 16, 16, 3, 3, seed=1).to("meta"), 8)
    assert found.y.shape == x.shape
    assert found.stats.shape == (2, 8, 16)


def test_bad_input() -> None:
    case = make_case((2, 2, 4, 8, 4, 6, 3, 1, True), normed=True)
    x, weight, index, stats = case.x, case.weight, case.weight_index, case.stats
    good: dict[str, Any] = {"x": x, "weight": weight, "num_groups": 2, "stats": stats, "weight_index": index}

    def fails(message: str, **bad: Any) -> None:
        with pytest.raises(InputError, match=message):
            conv_bn(**good | bad)

    fails("x must be float32, bfloat16 or float64 .* got torch.float16", x=x.half())
    fails(r"x must be \(B, C, H, W\) with at least 1 of each; got \(4, 4, 24\)", x=x.flatten(2))
    fails(r"x must be .* got \(0, 4, 4, 6\)", x=x[:0])
    fails(r"x must be channels_last; got strides \(96, 24, 6, 1\)", x=x.contiguous())
    for groups in (0, 3):
        fails(f"num_groups must be at least 1 and divide the batch of 4 images; got {groups}", num_groups=groups)
    fails("stride must be 1 or 2; got 3", stride=3)
    fails(
        r"weight must be \(S, O, 4, k, k\), k 1 or 3, none of them 0; got \(3, 8, 4, 5, 5\)",
        weight=random_rows(3, 8, 4, 5, 5, seed=1),
    )
    fails(r"weight must be \(S, O, 4, 3, 3\).* got \(3, 8, 5, 3, 3\)", weight=random_rows(3, 8, 5, 3, 3, seed=1))
    fails(r"weight must be \(S, O, 4, k, k\).* got \(8, 4, 3, 3\)", weight=weight[0])
    fails("weight must be torch.float32 on cpu; got torch.bfloat16 on cpu", weight=weight.bfloat16())
    fails("weight must be torch.float32 on cpu; got torch.float32 on meta", weight=weight.to("meta"))
    fails(r"weight must lie in \(S, O, kh, kw, I\) order in memory", weight=weight.contiguous())
    fails(r"shortcut_weight must be \(3, 8, 4, 1, 1\).* got \(3, 8, 4, 3, 3\)", shortcut_weight=weight)
    for wrong in (index.long(), index[:1], index.to("meta")):
        fails(r"weight_index must be \(2,\), contiguous, torch.int32 on cpu", weight_index=wrong)
    assert stats is not None
    for bad in (stats[:, :1], stats.double(), stats.to("meta"), stats.mT.contiguous().mT):
        fails(r"stats must be \(2, 2, 4\), contiguous, torch.float32 on cpu", stats=bad)
    one = channels_last(x[:2, :, :1, :1])
    fails("a statistics group needs at least 2 values in each channel; got 1", x=one)
    huge = torch.empty((2**18, 4, 128, 128), device="meta", memory_format=torch.channels_last)
    fails("a group must have at most 2147418112 pixels; got 4294967296", x=huge, num_groups=1)
    fails("conv_bn has only: reference", x=x.double(), weight=weight.double(), stats=stats.double(), backend="triton")
    with pytest.raises(InputError, match="a statistics group needs at least 2 values"):
        batch_statistics(one, 2)
