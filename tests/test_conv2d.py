"""conv2d and normed_conv2d: C++ gradients against float64, bounds, threads, and where they are not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.network import SupernetMixture
from bmsn.ops.conv2d import conv2d, has_cpp_gradient, measured_conv2d, normed_conv2d
from bmsn.ops.conv_bn import batch_statistics
from bmsn.ops.convolution import Branch, convolve_cpp
from bmsn.ops.norm_relu import norm_relu
from bmsn.space import SearchSpace
from convolutions import assert_exact_enough, needs_convolution, take_ours_everywhere
from stacked import assert_guards_hold, channels_last, guarded, random_map

cpp = extension()
HALF, SINGLE = torch.bfloat16, torch.float32
# images, in, out, H, W: one quad of pixels; one row; more images than parts, uneven; several blocks; ResNet-20's
HALF_SHAPES = [(1, 16, 16, 1, 4), (3, 16, 32, 1, 8), (37, 16, 16, 5, 4), (5, 48, 64, 7, 12), (16, 32, 32, 16, 16)]
# one tile; one row of them; more images than parts, uneven; several blocks; ResNet-20's; several strips of rows; and
# more than bfloat16's channels
SINGLE_SHAPES = [
    (1, 16, 16, 2, 2),
    (3, 16, 32, 2, 8),
    (37, 16, 16, 6, 4),
    (5, 48, 64, 8, 12),
    (16, 32, 32, 16, 16),
    (2, 32, 16, 38, 34),
    (9, 128, 80, 4, 4),
]


def cases(first: int, last: int | None = None) -> list[Any]:
    return [
        pytest.param(shape, dtype, marks=needs_convolution(dtype), id=f"{shape} {dtype}")
        for dtype, shapes in ((HALF, HALF_SHAPES), (SINGLE, SINGLE_SHAPES))
        for shape in shapes[first:last]
    ]


CASES, SMALL_CASES, FIRST, LARGE = cases(0), cases(0, 4), cases(0, 1), cases(4, 5)
BOTH = [pytest.param(dtype, marks=needs_convolution(dtype)) for dtype in (HALF, SINGLE)]


@pytest.fixture(autouse=True)
def ours_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    take_ours_everywhere(monkeypatch)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    images, i, o, height, width = shape
    x = random_map(images, i, height, width, seed=1, dtype=dtype)
    weight = random_map(o, i, 3, 3, seed=2, dtype=dtype)
    return x, weight, random_map(images, o, height, width, seed=3, dtype=dtype)


def gradients(run: object, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = run(x, weight)  # type: ignore[operator]
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def torchs(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_error_is_at_most_twice_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    assert has_cpp_gradient(*inputs[:2])
    oracle = gradients(torchs, *(t.double() for t in inputs))
    eager = gradients(torchs, *inputs)
    found = gradients(lambda x, w: conv2d(x, w, backend="cpp"), *inputs)
    for ours, theirs, wide in zip(found, eager, oracle, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_exact_enough(ours, eager=theirs, oracle=wide)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(3, 16, 3), (16, 32, 1), (48, 96, 3), (48, 144, 3)])
def test_what_is_not_ours_of_a_convolution_is_torchs(
    inputs: int, outputs: int, kernel: int, dtype: torch.dtype
) -> None:
    x, grad = (random_map(4, c, 6, 8, seed=c, dtype=dtype) for c in (inputs, outputs))
    weight = random_map(outputs, inputs, kernel, kernel, seed=2, dtype=dtype)
    assert has_cpp_gradient(x, weight) is (dtype == SINGLE and outputs == 96)

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=kernel // 2)

    oracle, eager = (gradients(theirs, *(t.to(of) for t in (x, weight, grad))) for of in (torch.double, dtype))
    for ours, plain, wide in zip(gradients(conv2d, x, weight, grad), eager, oracle, strict=True):
        assert_exact_enough(ours, eager=plain, oracle=wide)


@pytest.mark.parametrize("dtype", BOTH)
def test_every_tap_and_channel_is_where_it_belongs(dtype: torch.dtype) -> None:
    """Small integers: exact in both dtypes and in any order."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randint(-1, 2, (4, c, 6, 8), generator=generator).double() for c in (32, 16))
    weight = torch.zeros(16, 32, 3, 3, dtype=torch.float64)
    wanted = gradients(torchs, x, weight, grad)[2]
    assert wanted.abs().max() < 256
    found = gradients(conv2d, *(channels_last(t.to(dtype)) for t in (x, weight, grad)))[2]
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize(("shape", "dtype"), SMALL_CASES)
def test_nothing_is_read_or_written_out_of_bounds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every buffer lies between guards of NaN: read, one spoils a result; written, it is NaN no longer."""
    x, weight, grad = make_inputs(shape, dtype)
    images, i, o, height, width = shape

    def guarded(tensor: Tensor) -> Tensor:
        ends = torch.full((64,), torch.nan, dtype=dtype)
        return torch.cat([ends, tensor.permute(0, 2, 3, 1).flatten(), ends])

    buffers = [guarded(t) for t in (x, grad, torch.full_like(weight, torch.nan))]
    cpp.conv_weight_gradient(
        *((images, height, width, i, o), dtype == HALF, buffers[0][64:].data_ptr(), 0),
        *(*(b[64:].data_ptr() for b in buffers[1:]), 2),
    )
    assert buffers[2][:64].isnan().all()
    assert buffers[2][-64:].isnan().all()
    wanted = gradients(conv2d, x, weight, grad)[2]
    assert torch.equal(buffers[2][64:-64].view(o, 3, 3, i).permute(0, 3, 1, 2), wanted)


@pytest.mark.parametrize("dtype", BOTH)
def test_result_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    inputs, num_threads, results = make_inputs((37, 32, 16, 6, 4), dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.bmsn.conv_weight_gradient(inputs[0], None, inputs[2]))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", BOTH)
def test_nan_spoils_what_it_touches(dtype: torch.dtype) -> None:
    x, weight, grad = make_inputs((2, 16, 16, 4, 4), dtype)
    grad[1, 5, 2, 2] = torch.nan
    found = gradients(conv2d, x, weight, grad)[2]
    assert found[5].isnan().all()
    assert found.isnan().sum() == found[5].numel()


@pytest.mark.parametrize(("shape", "dtype"), FIRST)
def test_an_image_needs_no_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = make_inputs(shape, dtype)
    weight.requires_grad_()
    conv2d(x, weight).backward(grad)
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", BOTH)
def test_what_it_is_not_for(dtype: torch.dtype) -> None:
    x, weight, _ = make_inputs((2, 16, 16, 4, 4), dtype)
    assert has_cpp_gradient(x, weight)
    assert not has_cpp_gradient(x.double(), weight.double())
    assert not has_cpp_gradient(x.contiguous(), weight)
    assert not has_cpp_gradient(channels_last(x[..., :3]), weight)
    assert not has_cpp_gradient(x, channels_last(weight[..., :1, :1]))
    assert not has_cpp_gradient(x, channels_last(weight[:8]))
    assert has_cpp_gradient(x, weight.repeat(8, 1, 1, 1)) is (dtype == SINGLE)
    assert not has_cpp_gradient(x, weight.repeat(16, 1, 1, 1))


@needs_convolution(SINGLE)
def test_small_batches_and_autocast_are_torchs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = make_inputs((2, 16, 16, 8, 8), SINGLE)
    for least, fits in ((128, True), (129, False)):
        monkeypatch.setattr("bmsn.ops.conv2d.MIN_PIXELS", least)
        assert has_cpp_gradient(x, weight) is fits
    assert measured_conv2d(x, weight)[1] is not None
    with torch.autocast("cpu", HALF):
        y, stats = measured_conv2d(x, weight)
    assert y.dtype == HALF
    assert stats is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 2), (7, 2)])
def test_other_convolutions_are_torchs(kernel: int, stride: int, backend: str) -> None:
    x = random_map(2, 16, 8, 8, seed=1)
    weight = random_map(16, 16, kernel, kernel, seed=2).requires_grad_()
    wanted = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    assert torch.equal(conv2d(x, weight, stride=stride, backend=backend), wanted)


@pytest.mark.parametrize(("shape", "dtype"), LARGE)
def test_channels_that_do_not_fit_are_refused_by_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _ = make_inputs(shape, dtype)
    with pytest.raises(RuntimeError, match="channels"):
        conv2d(x, channels_last(weight[:, :16]))


@pytest.mark.parametrize(("shape", "dtype"), LARGE)
def test_statistics_come_with_the_result(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _ = make_inputs(shape, dtype)
    y, stats = measured_conv2d(x, weight.requires_grad_())
    assert torch.equal(y, conv2d(x, weight))
    assert not stats.requires_grad
    torch.testing.assert_close(stats, batch_statistics(y.detach(), 1), rtol=2e-3, atol=2e-3)
    assert measured_conv2d(x, weight, stride=2)[1] is None


@pytest.mark.parametrize(("shape", "dtype"), FIRST)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = make_inputs(shape, dtype)
    for measure in (False, True):
        torch.library.opcheck(torch.ops.bmsn.conv_forward.default, (x, weight, None, False, measure))
    torch.library.opcheck(torch.ops.bmsn.conv_forward.default, (grad, weight, None, True, False))
    torch.library.opcheck(torch.ops.bmsn.conv_weight_gradient.default, (x, None, grad))


# normed_conv2d: the convolution of relu(norm(x)). ---------------------------------------------------------------------


def measured(x: Tensor) -> Tensor:
    return batch_statistics(x, 1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return normed_conv2d(x, weight, stats=measured(x.detach()), backend="cpp")[0]


def one_after_the_other(x: Tensor, weight: Tensor) -> Tensor:
    stats = None if x.dtype == torch.float64 else measured(x.detach())[None]
    return conv2d(norm_relu(x, stats=stats), weight)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_normed_error_is_at_most_twice_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    oracle = gradients(one_after_the_other, *(t.double() for t in inputs))
    eager = gradients(lambda x, w: torchs(norm_relu(x, backend="reference"), w), *inputs)
    for ours, theirs, wide in zip(gradients(normed, *inputs), eager, oracle, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_exact_enough(ours, eager=theirs, oracle=wide)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_supernet_takes_it_and_only_the_gradients_that_are_wanted(dtype: torch.dtype) -> None:
    nets = SupernetMixture(SearchSpace.named("resnet14-cifar10"), 1, 10)
    seen: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
            place = {"bmsn.conv_forward.default": 2, "bmsn.conv_weight_gradient.default": 1}.get(str(op))  # stats
            seen.append(str(op) + (" normed" if place and args[place] is not None else ""))
            return op(*args, **(kwargs or {}))

    images = random_map(2, 3, 32, 32, seed=1, dtype=dtype)
    with Calls():
        nets(images, nets.space.default, 0).sum().backward()
    assert seen.count("bmsn.conv_forward.default normed") == 6  # a block each
    assert seen.count("bmsn.conv_weight_gradient.default normed") == 6
    assert seen.count("bmsn.normed_conv_gradient.default") == 6
    x, weight, grad = make_inputs((5, 48, 64, 8, 12), dtype)
    for of_x in (False, True):
        seen.clear()
        x.requires_grad_(of_x), weight.requires_grad_(not of_x)
        with Calls():
            normed(x, weight).backward(grad)
        assert ("bmsn.normed_conv_gradient.default" in seen) is of_x
        assert ("bmsn.conv_weight_gradient.default normed" in seen) is not of_x


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_normed_is_bit_for_bit_what_it_replaces(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """But for dx, whose sums are taken before it is rounded."""
    inputs = make_inputs(shape, dtype)
    found, wanted = gradients(normed, *inputs), gradients(one_after_the_other, *inputs)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])
    torch.testing.assert_close(found[1], wanted[1], rtol=2e-2, atol=2e-2 * wanted[1].abs().max().item())
    x, weight, _ = inputs
    _, stats = normed_conv2d(x, weight, stats=measured(x))
    assert torch.equal(stats, measured_conv2d(norm_relu(x, stats=measured(x)[None]), weight)[1])


@pytest.mark.parametrize(("shape", "dtype"), SMALL_CASES)
def test_normed_gradients_stay_in_bounds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = make_inputs(shape, dtype)
    stats = measured(x)
    ops = torch.ops.bmsn
    wanted = (ops.normed_conv_gradient(grad, weight, x, stats), ops.conv_weight_gradient(x, stats, grad))
    given = {name: guarded(t) for name, t in (("x", x), ("weight", weight), ("grad", grad), ("stats", stats))}
    found = (
        ops.normed_conv_gradient(given["grad"], given["weight"], given["x"], given["stats"]),
        ops.conv_weight_gradient(given["x"], given["stats"], given["grad"]),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    given |= {"e": guarded(x, poison=True), "line": guarded(stats, poison=True)}
    written = Branch(weight[None], given["e"], given["line"], True, masked_by=x, masked_stats=stats)
    convolve_cpp(grad, [written])
    assert not any(given[name].isnan().any() for name in ("e", "line"))
    size = (1, x.numel() // x.shape[1], x.shape[1])
    cpp.norm_gradient(size, dtype == HALF, *(given[name].data_ptr() for name in ("e", "x", "stats", "line", "e")), 2)
    assert torch.equal(given["e"], wanted[0])
    assert_guards_hold(**given)


@pytest.mark.parametrize("dtype", BOTH)
def test_normed_gradients_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    inputs, num_threads, results = make_inputs((37, 32, 16, 6, 4), dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(gradients(normed, *inputs))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", BOTH)
def test_a_channel_with_nan_has_no_gradient(dtype: torch.dtype) -> None:
    """Its statistics are NaN: so are all of its dx, and all of dw that is made of it; no other channel is touched."""
    x, weight, grad = make_inputs((2, 16, 16, 4, 4), dtype)
    stats = measured(x)
    x[1, 3, 2, 2] = torch.nan
    stats[:, :, 3] = torch.nan
    dx = torch.ops.bmsn.normed_conv_gradient(grad, weight, x, stats)
    dw = torch.ops.bmsn.conv_weight_gradient(x, stats, grad)
    assert dx[:, 3].isnan().all()
    assert dx.isnan().sum() == dx[:, 3].numel()
    assert dw[:, 3].isnan().all()
    assert dw.isnan().sum() == dw[:, 3].numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "stride", "known"), [(16, 2, True), (16, 1, False), (8, 1, True), (96, 1, True), (144, 1, True)]
)
def test_what_is_not_ours_of_a_normed_one_is_done_in_two_steps(
    dtype: torch.dtype, channels: int, stride: int, known: bool
) -> None:
    x, weight = (random_map(n, channels, 4, 8, seed=n, dtype=dtype) for n in (4, 16))
    weight = channels_last(weight[:, :, :3, :3])
    if known and stride == 1 and has_cpp_gradient(x, weight):
        pytest.skip("ours has it in this dtype")
    stats = measured(x) if known else None
    grad = random_map(4, 16, 4 // stride, 8 // stride, seed=3, dtype=dtype)
    found = gradients(lambda a, w: normed_conv2d(a, w, stats=stats, stride=stride)[0], x, weight, grad)
    given = None if stats is None else stats[None]
    wanted = gradients(lambda a, w: conv2d(norm_relu(a, stats=given), w, stride=stride), x, weight, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("shape", "dtype"), LARGE)
def test_statistics_of_another_shape_are_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _ = make_inputs(shape, dtype)
    with pytest.raises(InputError, match="stats"):
        normed_conv2d(x, weight, stats=measured(x)[:, 0])


@pytest.mark.parametrize(("shape", "dtype"), FIRST)
def test_opcheck_of_the_normed_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = make_inputs(shape, dtype)
    torch.library.opcheck(torch.ops.bmsn.conv_forward.default, (x, weight, measured(x), False, True))
    torch.library.opcheck(torch.ops.bmsn.conv_weight_gradient.default, (x, measured(x), grad))
    torch.library.opcheck(torch.ops.bmsn.normed_conv_gradient.default, (grad, weight, x, measured(x)))
