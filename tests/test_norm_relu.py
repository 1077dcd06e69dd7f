"""norm_relu and norm_add_relu: C++ and reference against a float64 formula, and the properties that others build on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.conv_bn import batch_statistics
from bmsn.ops.norm_relu import EPS, Pool, norm_add_relu, norm_relu
from oracles import assert_no_worse

# (groups, images of a group, C, H, W): smallest; odd sizes, ragged to the last value; more channels than a block;
# a chunk and a bit; a ResNet-20 layer; several chunks and blocks of a wide layer
SHAPES = [
    (1, 2, 1, 1, 2),
    (3, 2, 5, 7, 3),
    (2, 2, 100, 9, 9),
    (2, 3, 32, 15, 15),
    (1, 128, 16, 32, 32),
    (2, 2, 1030, 7, 7),
]
KINDS = ["none", "plain", "normalised"]
POOLS: dict[Pool, Callable[[Tensor, int], Tensor]] = {"max": F.max_pool2d, "avg": F.avg_pool2d}
DTYPES = [torch.float32, torch.bfloat16]
needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C was not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
Run = Callable[[Tensor, Tensor, int], Tensor]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, shortcut and a gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape))
    full = (shape[0] * shape[1], *shape[2:])
    x, shortcut, grad = (torch.randn(full, generator=generator, dtype=torch.float64) for _ in range(3))
    x, shortcut, grad = (channels_last(t.to(dtype)) for t in (3 * x + 1, shortcut - 0.5, grad))
    return x, shortcut, grad


def op(kind: str, backend: str, pool: Pool | None = None) -> Run:
    def run(x: Tensor, shortcut: Tensor, num_groups: int) -> Tensor:
        if kind == "none":
            return norm_relu(x, num_groups, pool=pool, backend=backend)
        return norm_add_relu(
            x, shortcut, num_groups, normalise_shortcut=kind == "normalised", pool=pool, backend=backend
        )

    return run


def before_relu(kind: str, x: Tensor, shortcut: Tensor, num_groups: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
    value = torch.cat([norm(group) for group in x.chunk(num_groups)])
    if kind == "normalised":
        shortcut = torch.cat([norm(group) for group in shortcut.chunk(num_groups)])
    return value if kind == "none" else value + shortcut


def formula(x: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def eager_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def with_gradients(run: Run, x: Tensor, shortcut: Tensor, num_groups: int, grad: Tensor) -> dict[str, Tensor]:
    x, shortcut = x.detach().requires_grad_(), shortcut.detach().requires_grad_()
    y = run(x, shortcut, num_groups)
    y.backward(grad)
    found = {"y": y.detach(), "dx": x.grad, "dshortcut": shortcut.grad}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape: tuple[int, ...], kind: str, dtype: torch.dtype, backend: str) -> None:
    x, shortcut, grad = make_inputs(shape, dtype)
    value = before_relu(kind, x.double(), shortcut.double(), shape[0], formula)
    grad = grad * (value.abs() > 0.05)  # nearer to 0 eager rounds to the other side of ReLU: its error would excuse any
    wide = x.double(), shortcut.double(), shape[0], grad.double()
    oracle = with_gradients(lambda x, s, g: F.relu(before_relu(kind, x, s, g, formula)), *wide)
    eager = with_gradients(lambda x, s, g: F.relu(before_relu(kind, x, s, g, eager_norm)), x, shortcut, shape[0], grad)
    found = with_gradients(op(kind, backend), x, shortcut, shape[0], grad)
    assert found.keys() == oracle.keys() == ({"y", "dx"} if kind == "none" else {"y", "dx", "dshortcut"})
    for name, value in found.items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        assert_no_worse(value, eager=eager[name], oracle=oracle[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 2), (3, 2, 5, 6, 4), (2, 8, 16, 32, 32), (1, 2, 64, 6, 300)], ids=str)
def test_pooling_is_torchs_behind_the_rest(
    shape: tuple[int, ...], pool: Pool, kind: str, dtype: torch.dtype, backend: str
) -> None:
    x, shortcut, grad = make_inputs(shape, dtype)
    x[:, :, :, 1::2] = x[:, :, :, 0::2]  # two of each four are equal: the first gets the gradient
    shortcut[:, :, :, 1::2] = shortcut[:, :, :, 0::2]
    grad = channels_last(grad[:, :, ::2, ::2])
    plain = op(kind, backend)
    expected = with_gradients(lambda x, s, g: POOLS[pool](plain(x, s, g), 2), x, shortcut, shape[0], grad)
    found = with_gradients(op(kind, backend, pool), x, shortcut, shape[0], grad)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(value, expected[name]), name


@needs_cpp
def test_a_large_mean_does_not_cancel() -> None:
    x = channels_last(torch.randn(256, 2, 32, 32, generator=torch.Generator().manual_seed(1)) + 1000)
    oracle = F.relu(formula(x.double()))
    # float32 holds 1000 to 3e-5, and so the mean; plain sums of squares would be off by more than the variance
    assert (norm_relu(x, backend="cpp").double() - oracle).abs().max() < 5e-5


@needs_cpp
def test_two_values_are_a_group() -> None:
    x = channels_last(torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1))
    assert norm_relu(x, backend="cpp").flatten().tolist() == pytest.approx([0, 2 / (4 + EPS) ** 0.5], rel=1e-7)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_bfloat16_is_float32_rounded_to_nearest_even(shape: tuple[int, ...], kind: str) -> None:
    x, shortcut, grad = make_inputs(shape, torch.bfloat16)
    wide = with_gradients(op(kind, "cpp"), x.float(), shortcut.float(), shape[0], grad.float())
    for name, value in with_gradients(op(kind, "cpp"), x, shortcut, shape[0], grad).items():
        assert torch.equal(value, wide[name].bfloat16()), name


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_are_separate_calls(dtype: torch.dtype, kind: str) -> None:
    x, shortcut, grad = make_inputs((3, 4, 20, 11, 9), dtype)
    together = with_gradients(op(kind, "cpp"), x, shortcut, 3, grad)
    alone = [
        with_gradients(op(kind, "cpp"), *parts[:2], 1, parts[2])
        for parts in zip(x.chunk(3), shortcut.chunk(3), grad.chunk(3), strict=True)
    ]
    for name, value in together.items():
        assert torch.equal(value, torch.cat([results[name] for results in alone])), name


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_the_number_of_threads(kind: str) -> None:
    x, shortcut, grad = make_inputs((1, 64, 16, 32, 32), torch.bfloat16)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(op(kind, "cpp"), x, shortcut, 1, grad))
    finally:
        torch.set_num_threads(num_threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_spoils_its_channel_and_group_alone(kind: str, dtype: torch.dtype, backend: str) -> None:
    x, shortcut, grad = make_inputs((2, 2, 3, 4, 4), dtype)
    x[0, 1, 2, 3] = torch.nan
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[:2, 1] = True
    found = with_gradients(op(kind, backend), x, shortcut, 2, grad)
    assert torch.equal(found["y"].isnan(), spoilt)
    assert torch.equal(found["dx"].isnan(), spoilt)


@needs_cpp
@pytest.mark.parametrize("bits", [0x7F81, 0x7FFF, -1])
def test_every_bfloat16_nan_stays_one(bits: int) -> None:
    """0x7FFF and 0xFFFF are those that a carry would turn into zeros, 0x7F81 has its only bit at the end."""
    x, shortcut, grad = make_inputs((1, 2, 3, 4, 4), torch.bfloat16)
    nan = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
    shortcut[1, 2, 0, 3] = nan
    grad[1, 2, 0, 3] = nan
    found = with_gradients(op("plain", "cpp"), x, shortcut, 1, grad)
    assert torch.equal(found["y"].isnan(), shortcut.isnan())
    assert torch.equal(found["dshortcut"].isnan(), shortcut.isnan())
    assert found["dx"][:, 2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_a_plain_shortcut_stays_where_it_is(dtype: torch.dtype, backend: str) -> None:
    x, shortcut, _ = make_inputs((1, 2, 3, 4, 4), dtype)
    shortcut[1, 2, 0, 3] = torch.nan
    y = norm_add_relu(x, shortcut, normalise_shortcut=False, backend=backend)
    assert torch.equal(y.isnan(), shortcut.isnan())


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", POOLS)  # avg together with an affine step
@pytest.mark.parametrize("shape", [(3, 2, 5, 7, 3), (2, 2, 100, 9, 9), (1, 16, 32, 32, 32)], ids=str)
def test_nothing_is_read_or_written_out_of_bounds(
    shape: tuple[int, ...], pool: Pool, kind: str, dtype: torch.dtype
) -> None:
    """Every buffer lies between guards of NaN: read, one spoils a result; written, it is NaN no longer."""
    cpp, guard = extension(), 64
    images = make_inputs(shape, dtype)
    size, num_groups, channels = images[0].numel(), shape[0], shape[2]
    branches = 2 if kind == "normalised" else 1

    def guarded(size: int, dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        buffer = torch.full((size + 2 * guard,), torch.nan, dtype=dtype)
        if values is not None:
            buffer[guard:-guard] = values.permute(0, 2, 3, 1).flatten() if values.ndim == 4 else values
        return buffer

    def address(buffer: Tensor) -> int:
        return buffer.data_ptr() + guard * buffer.element_size()

    pools, has_affine = shape[3] % 2 == 0, pool == "avg"
    x, shortcut = (guarded(size, dtype, image) for image in images[:2])
    grad = guarded(size // 4, dtype, images[2][:, :, ::2, ::2]) if pools else guarded(size, dtype, images[2])
    y = guarded(size // 4 if pools else size, dtype)
    dx, dshortcut = (guarded(size, dtype) for _ in range(2))
    index = torch.full((size // 4 + 2 * guard,), 255, dtype=torch.uint8)
    pooling = (address(index) if pools else 0, getattr(cpp.Pool, pool), shape[4])
    affine = guarded(branches * 2 * channels, torch.float32, torch.linspace(-1, 2, branches * 2 * channels))
    daffine = guarded(branches * 2 * channels, torch.float32)
    steps = [address(t) if has_affine else 0 for t in (affine, daffine)]
    stats = guarded(branches * 2 * num_groups * channels, torch.float32)
    groups_rows_channels = (num_groups, size // channels // num_groups, channels)
    call = (groups_rows_channels, dtype == torch.bfloat16, getattr(cpp.Shortcut, kind))
    cpp.norm_relu(*call, *(address(t) for t in (x, shortcut, y, stats)), False, steps[0], *pooling, EPS, 2)
    saved = (address(t) for t in (grad, y, x, shortcut, stats))
    cpp.norm_relu_backward(*call, *saved, steps[0], address(dx), address(dshortcut), steps[1], *pooling, 2)
    assert (index[:guard] == 255).all()
    assert (index[-guard:] == 255).all()
    assert not pools or (index[guard:-guard] < (4 if pool == "max" else 16)).all()
    untouched = ["dshortcut"] * (kind == "none") + ["daffine"] * (not has_affine)
    for name, buffer in {"y": y, "stats": stats, "dx": dx, "dshortcut": dshortcut, "daffine": daffine}.items():
        assert buffer[:guard].isnan().all(), name
        assert buffer[-guard:].isnan().all(), name
        assert buffer[guard:-guard].isnan().any() == (name in untouched), name


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_gradient(kind: str) -> None:
    x, shortcut, _ = make_inputs((1, 4, 8, 4, 4), torch.float32)
    grad = torch.linspace(-1, 1, 32).reshape(4, 8, 1, 1).expand(4, 8, 4, 4)  # as of a mean over (H, W)
    expanded, dense = (with_gradients(op(kind, "cpp"), x, shortcut, 1, g) for g in (grad, channels_last(grad)))
    assert all(torch.equal(expanded[name], dense[name]) for name in dense)


@needs_cpp
def test_without_a_gradient_nothing_is_kept() -> None:
    x, shortcut, _ = make_inputs((1, 2, 3, 4, 4), torch.float32)
    kept = norm_add_relu(x.requires_grad_(), shortcut, normalise_shortcut=True)
    with torch.no_grad():
        y = norm_add_relu(x, shortcut, normalise_shortcut=True)
    assert kept.requires_grad
    assert y.grad_fn is None
    assert torch.equal(y, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    x, shortcut, _ = make_inputs((2, 2, 2, 2, 1), torch.float64)
    x, shortcut = x.requires_grad_(), shortcut.requires_grad_(kind != "none")
    assert torch.autograd.gradcheck(lambda x, shortcut: op(kind, "auto")(x, shortcut, 2), (x, shortcut))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_that_are_known_are_not_taken_again(dtype: torch.dtype) -> None:
    """The same ones give the same bits, forward and backward; others are used as they are."""
    inputs = make_inputs((2, 3, 5, 6, 4), dtype)
    known = torch.stack([batch_statistics(t, 2, backend="cpp") for t in inputs[:2]])
    results = []
    for stats in (None, known):
        x, shortcut = (t.detach().requires_grad_() for t in inputs[:2])
        y = norm_add_relu(x, shortcut, 2, normalise_shortcut=True, stats=stats, backend="cpp")
        y.backward(inputs[2])
        results.append((y, x.grad, shortcut.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    shifted = known[:1].clone()
    shifted[0, 0] += 1
    moved = norm_relu(inputs[0] + 1, 2, stats=shifted, backend="cpp")
    torch.testing.assert_close(moved, norm_relu(inputs[0], 2, backend="cpp"), rtol=0.02, atol=0.02)
    with pytest.raises(InputError, match=r"stats must be \(1, 2, 2, 5\), contiguous, torch.float32"):
        norm_relu(inputs[0], 2, stats=known, backend="cpp")


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, shortcut, grad = make_inputs((2, 2, 3, 4, 4), dtype)
    ops = torch.ops.bmsn
    for added, normalise, pool in ((None, False, "max"), (shortcut, False, None), (shortcut, True, "avg")):
        for num_groups, affine in ((2, None), (1, torch.ones(1 + normalise, 2, 3))):
            arguments = (x, added, affine, None, num_groups, normalise, pool, "cpp")
            y, stats, index = ops.norm_relu(*arguments)
            torch.library.opcheck(ops.norm_relu.default, arguments)
            pooled_grad = channels_last(grad[:, :, ::2, ::2]) if pool else grad
            saved = (y, x, shortcut if normalise else None, affine, stats, index if pool else None)
            torch.library.opcheck(ops.norm_relu_backward.default, (pooled_grad, *saved, pool, added is not None, "cpp"))


def test_bad_input() -> None:
    x, shortcut, _ = make_inputs((1, 4, 3, 4, 4), torch.float32)
    with pytest.raises(InputError, match="float16"):
        norm_relu(x.half())
    with pytest.raises(InputError, match=r"shortcut must be .*torch\.float32.*torch\.float64"):
        norm_add_relu(x, shortcut.double(), normalise_shortcut=False)
    with pytest.raises(InputError, match=r"x must be channels_last; got strides \(48, 16, 4, 1\) for shape \(4, 3, "):
        norm_relu(x.contiguous())
    with pytest.raises(InputError, match="shortcut must be channels_last"):
        norm_add_relu(x, shortcut.contiguous(), normalise_shortcut=True)
    with pytest.raises(InputError, match=r"shortcut must be \(4, 3, 4, 4\).*got \(2, 3, 4, 4\)"):
        norm_add_relu(x, shortcut[:2], normalise_shortcut=True)
    with pytest.raises(InputError, match=r"\(B, C, H, W\).*got \(4, 3, 16\)"):
        norm_relu(x.flatten(2))
    for num_groups in (0, 3):
        with pytest.raises(InputError, match=f"divide the batch of 4 images; got {num_groups}"):
            norm_relu(x, num_groups)
    with pytest.raises(InputError, match="at least 2 values in each channel; got 1"):
        norm_relu(channels_last(x[:, :, :1, :1]), 4)
    with pytest.raises(InputError, match=r"even height and width; x is \(4, 3, 4, 3\)"):
        norm_relu(channels_last(x[..., :3]), pool="max")
    with pytest.raises(InputError, match="pool must be max, avg or None; got 'stride'"):
        norm_relu(x, pool="stride")
    with pytest.raises(InputError, match="norm_relu has only: reference"):
        norm_relu(x.double(), backend="cpp")
