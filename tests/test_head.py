"""head: counts equal to those of a float64 formula, ties and NaN as torch.argmax has them, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.head import head
from stacked import (
    ON_GPU,
    WITHOUT_CPP,
    assert_guards_hold,
    channels_last,
    device_for,
    guarded,
    needs_triton,
    random_map,
    random_rows,
)

# groups, images, C, H, W, classes: odd everything; more images than a program takes, two classes; several products of
# channels, Food101's classes; more classes than the widest table entry
SHAPES = [(2, 3, 5, 2, 3, 10), (3, 17, 20, 1, 1, 2), (1, 18, 70, 2, 2, 101), (2, 2, 40, 1, 2, 130)]
Arguments = dict[str, Any]


def make_arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Arguments, list[int]]:
    """Arguments and the counts that they give, from float64; weight sets in another order than groups."""
    groups, images, channels, height, width, classes = shape
    x = random_map(groups * images, channels, height, width, seed=1, dtype=dtype).relu_()
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = random_rows(3, classes, channels, seed=2, dtype=wide), random_rows(3, classes, seed=3, dtype=wide)
    index = torch.tensor([2, 0, 1][:groups], dtype=torch.int32)
    predictions = torch.empty(groups, images, dtype=torch.int64)
    for g, group in enumerate(x.double().chunk(groups)):
        for i, image in enumerate(group):
            features = image.flatten(1).sum(1) / (height * width)
            row = int(index[g])
            logits = torch.stack([(w * features).sum() for w in weight[row].double()]) + bias[row].double()
            first, second = logits.sort(descending=True)[0][:2]
            assert first - second > 1e-3, "too close for float32 to tell"
            predictions[g, i] = logits.argmax()
    labels = predictions[torch.arange(images) % groups, torch.arange(images)]  # each group is right somewhere
    labels[::4] = (labels[::4] + 1) % classes
    arguments = {"x": x, "labels": labels, "weight": weight, "bias": bias, "num_groups": groups, "weight_index": index}
    return arguments, (predictions == labels).sum(1).tolist()


def run(arguments: Arguments, backend: str) -> list[int]:
    device = device_for(backend)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    correct = head(**moved, backend=backend)
    assert correct.device.type == device.type
    assert correct.dtype == torch.int64
    return correct.tolist()


@pytest.mark.parametrize("backend", WITHOUT_CPP)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_those_of_the_formula(shape: tuple[int, ...], backend: str) -> None:
    arguments, wanted = make_arguments(shape)
    assert any(wanted)
    assert run(arguments, backend) == wanted
    assert run(arguments, backend) == wanted  # counts start from 0 every time


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and (dtype == torch.float64 or not ON_GPU):
        pytest.skip("float64 runs on the reference only, bfloat16 in Triton needs a GPU")
    arguments, wanted = make_arguments(SHAPES[0], dtype)
    assert run(arguments, backend) == wanted


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_groups_are_separate_calls(backend: str) -> None:
    arguments, wanted = make_arguments(SHAPES[1])
    for g, x in enumerate(arguments["x"].chunk(3)):
        row = int(arguments["weight_index"][g])
        sets = {name: arguments[name][row : row + 1] for name in ("weight", "bias")}
        alone = {"x": x, "labels": arguments["labels"], **sets, "num_groups": 1, "weight_index": None}
        assert run(alone, backend) == [wanted[g]]


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_without_an_index_all_groups_take_the_first_weights(backend: str) -> None:
    arguments, _ = make_arguments(SHAPES[1])
    zeros = arguments | {"weight_index": torch.zeros(3, dtype=torch.int32)}
    assert run(arguments | {"weight_index": None}, backend) == run(zeros, backend) != run(arguments, backend)


def logits_of(rows: list[list[float]], labels: list[int]) -> Arguments:
    """A head whose logits are these rows: features of 1 for one class each, by a weight set of its own."""
    classes = len(rows[0])
    return {
        "x": channels_last(torch.zeros(len(rows) * len(labels), 2, 1, 1)),
        "labels": torch.tensor(labels),
        "weight": torch.zeros(len(rows), classes, 2),
        "bias": torch.tensor(rows),
        "num_groups": len(rows),
        "weight_index": torch.arange(len(rows), dtype=torch.int32),
    }


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_ties_and_nan_are_torch_argmax(backend: str) -> None:
    nan, inf = torch.nan, torch.inf
    rows = [[0.0, 2, 2], [5, nan, 1], [inf, nan, nan], [-inf, -inf, -inf], [nan, nan, nan], [-inf, inf, inf]]
    arguments = logits_of(rows, labels=[0, 1, 1, 2])
    wanted = [[1, 2, 1][k] for k in torch.tensor(rows).argmax(1)]  # how often a prediction is among the labels
    assert wanted == [2, 2, 2, 1, 1, 2]
    assert run(arguments, backend) == wanted


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_a_nan_image_is_predicted_as_class_0_and_no_other_image_is(backend: str) -> None:
    arguments, wanted = make_arguments(SHAPES[0])
    arguments["x"][4, 2, 1, 1] = torch.nan  # image 1 of group 1
    clean, _ = make_arguments(SHAPES[0])
    clean["labels"] = torch.full((3,), -1)
    clean["labels"][1] = arguments["labels"][1]
    was_right = run(clean, backend)[1]
    is_right = int(arguments["labels"][1] == 0)
    assert run(arguments, backend) == [wanted[0], wanted[1] - was_right + is_right]


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_a_label_outside_the_classes_is_never_right(backend: str) -> None:
    arguments = logits_of([[-1.0, -2, -3], [0, 0, 1]], labels=[-1, 3, 15, 16])
    assert run(arguments, backend) == [0, 0]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_stays_in_bounds(shape: tuple[int, ...]) -> None:
    from bmsn.kernels.head import launch_head

    arguments, wanted = make_arguments(shape)
    bounded = [guarded(v.to(device_for("triton"))) if isinstance(v, Tensor) else v for v in arguments.values()]
    correct = guarded(torch.empty(shape[0], dtype=torch.int64, device=device_for("triton")), poison=True)
    launch_head(*bounded, correct)
    assert correct.tolist() == wanted
    assert_guards_hold(correct=correct)


@pytest.mark.parametrize("backend", WITHOUT_CPP)
def test_opcheck(backend: str) -> None:
    arguments, _ = make_arguments(SHAPES[0])
    moved = [v.to(device_for(backend)) if isinstance(v, Tensor) else v for v in arguments.values()]
    torch.library.opcheck(torch.ops.bmsn.head.default, (*moved, backend))
    torch.library.opcheck(torch.ops.bmsn.head.default, (*moved[:-1], None, backend))


def test_bad_input() -> None:
    good, _ = make_arguments(SHAPES[0])
    x, labels, weight, bias, index = (good[name] for name in ("x", "labels", "weight", "bias", "weight_index"))

    def fails(message: str, **bad: Any) -> None:
        with pytest.raises(InputError, match=message):
            head(**good | bad)

    fails("x must be float32, bfloat16 or float64 .* got torch.float16", x=x.half())
    fails("x must be channels_last", x=x.contiguous())
    fails("num_groups must be at least 1 and divide the batch of 6 images; got 4", num_groups=4)
    for bad in (labels.int(), labels[:2], labels.to("meta")):
        fails(r"labels must be \(3,\), contiguous, torch.int64 on cpu", labels=bad)
    for bad in (weight[0], weight[:, :, :4], weight[:, :0]):
        fails(r"weight must be \(S, K, 5\), none of them 0", weight=bad)
    fails("weight must be torch.float32 on cpu; got torch.bfloat16", weight=weight.bfloat16())
    fails("weight must lie in dimension order in memory", weight=weight.mT.contiguous().mT)
    fails(r"bias must be \(3, 10\); got \(3, 9\)", bias=bias[:, :9])
    fails("bias must be torch.float32 on cpu; got torch.float64", bias=bias.double())
    fails("bias must lie in dimension order", bias=bias.mT.contiguous().mT)
    for bad in (index.long(), index[:1], index.to("meta")):
        fails(r"weight_index must be \(2,\), contiguous, torch.int32 on cpu", weight_index=bad)
    wide = {name: good[name].double() for name in ("x", "weight", "bias")}
    fails("head has only: reference", **wide, backend="triton")
