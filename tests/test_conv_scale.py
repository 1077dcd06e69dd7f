"""conv_scale: the reference against a float64 formula, Triton against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.conv_scale import conv_scale, conv_scale_reference
from bmsn.ops.convolution import output_shape
from convolutions import SHAPES, convolution, make_case
from oracles import assert_no_worse
from stacked import (
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


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMSN_CONVOLUTION", "ours")


def make_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    case = make_case(shape, normed=False, dtype=dtype)
    o = case.weight.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = random_rows(2, case.num_groups, o, seed=5, dtype=wide).clone()
    shortcut = random_map(*output_shape(case.x, case.weight, case.stride), seed=6)
    return {
        "x": case.x,
        "weight": case.weight,
        "num_groups": case.num_groups,
        "scale": scale,
        "shift": shift,
        "relu": True,
        "shortcut": shortcut.to(dtype),
        "weight_index": case.weight_index,
        "stride": case.stride,
    }


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def formula(arguments: dict[str, Any]) -> Tensor:
    wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    parts = []
    for g, x in enumerate(wide["x"].chunk(wide["num_groups"])):
        scale, shift = (wide[name][g].reshape(1, -1, 1, 1) for name in ("scale", "shift"))
        weight = wide["weight"][int(wide["weight_index"][g])]
        parts.append(convolution(x, weight, wide["stride"]) * scale + shift)
    y = torch.cat(parts)
    y = y if wide["shortcut"] is None else y + wide["shortcut"]
    return y.clamp(min=0) if wide["relu"] else y


@pytest.mark.parametrize("relu_and_shortcut", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...], relu_and_shortcut: bool) -> None:
    arguments = make_arguments(shape, torch.float64)
    if not relu_and_shortcut:
        arguments |= {"relu": False, "shortcut": None}
    torch.testing.assert_close(conv_scale(**arguments), formula(arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("relu_and_shortcut", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape: tuple[int, ...], relu_and_shortcut: bool, dtype: torch.dtype) -> None:
    arguments = make_arguments(shape, dtype)
    if not relu_and_shortcut:
        arguments |= {"relu": False, "shortcut": None}
    found = conv_scale(**on(device_for("triton"), arguments), backend="triton")
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(found, eager=conv_scale_reference(**arguments), oracle=formula(arguments))


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_the_result_goes_where_it_belongs(backend: str) -> None:
    arguments = on(device_for(backend), make_arguments(SHAPES[2], torch.float32))
    wanted = conv_scale(**arguments, backend=backend)
    into = guarded(wanted, poison=True)
    assert conv_scale(**arguments, into=into, backend=backend) is into
    assert torch.equal(into, wanted)
    assert_guards_hold(into=into)


@needs_triton
def test_triton_leaves_it_to_the_library_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on(device_for("triton"), make_arguments(SHAPES[2], torch.float32))
    monkeypatch.setenv("BMSN_CONVOLUTION", "library")
    found = conv_scale(**arguments, backend="triton")
    assert torch.equal(found, conv_scale_reference(**arguments))


@needs_triton
def test_triton_stays_in_bounds() -> None:
    from bmsn.kernels.conv_bn import launch_conv_scale

    arguments = on(device_for("triton"), make_arguments(SHAPES[2], torch.float32))
    wanted = conv_scale(**arguments, backend="triton")
    y = guarded(wanted, poison=True)
    bounded = [guarded(value) if isinstance(value, Tensor) else value for value in arguments.values()]
    launch_conv_scale(*bounded, y)
    assert torch.equal(y, wanted)
    assert_guards_hold(y=y)


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_a_frozen_group_may_be_one_value(backend: str) -> None:
    x, weight = channels_last(torch.tensor([3.0, -1.0]).reshape(2, 1, 1, 1)), torch.ones(1, 1, 1, 1, 1)
    affine = {"scale": torch.tensor([[2.0], [4.0]]), "shift": torch.tensor([[1.0], [0.5]])}
    arguments = on(device_for(backend), {"x": x, "weight": weight, **affine})
    y = conv_scale(**arguments, num_groups=2, relu=True, backend=backend)
    assert y.flatten().tolist() == [7.0, 0.0]


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_nan_passes_the_frozen_relu(backend: str) -> None:
    arguments = make_arguments((2, 1, 4, 8, 4, 4, 1, 1, False), torch.float32)
    arguments["x"][1, 2, 0, 3] = torch.nan
    y = conv_scale(**on(device_for(backend), arguments), backend=backend)
    assert torch.equal(y.isnan().any(1).nonzero().cpu(), torch.tensor([[1, 0, 3]]))
    assert y[1, :, 0, 3].isnan().all()


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_inputs_stay_as_they_are(backend: str) -> None:
    arguments = on(device_for(backend), make_arguments(SHAPES[1], torch.float32))
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    conv_scale(**arguments, backend=backend)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_opcheck(backend: str) -> None:
    arguments = on(device_for(backend), make_arguments((2, 2, 4, 8, 4, 6, 3, 2, False), torch.float32))
    for shortcut in (arguments["shortcut"], None):
        torch.library.opcheck(
            torch.ops.bmsn.conv_scale.default, (*(arguments | {"shortcut": shortcut}).values(), backend)
        )


def test_bad_input() -> None:
    good = make_arguments((2, 2, 4, 8, 4, 6, 3, 1, False), torch.float32)
    affine, shortcut = good["scale"], good["shortcut"]
    with pytest.raises(InputError, match="x must be channels_last"):
        conv_scale(**good | {"x": good["x"].contiguous()})
    for field, bad in (("scale", affine[:1]), ("shift", affine.double()), ("shift", affine[:, :1].expand(2, 8))):
        with pytest.raises(InputError, match=rf"{field} must be \(2, 8\), contiguous, torch.float32 on cpu"):
            conv_scale(**good | {field: bad})
    for wrong in (shortcut[:2], shortcut.double()):
        with pytest.raises(InputError, match=r"shortcut must be \(4, 8, 4, 6\), torch.float32 on cpu"):
            conv_scale(**good | {"shortcut": wrong})
    wide = make_arguments(SHAPES[0], torch.float64)
    with pytest.raises(InputError, match="conv_scale has only: reference"):
        conv_scale(**wide, backend="cpp")
