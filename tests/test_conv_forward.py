"""The C++ convolution under conv_bn and conv2d: against float64, between guards, by threads, where it is not taken."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bmsn.errors import InputError
from bmsn.ops import convolution as module
from bmsn.ops.conv_bn import conv_bn
from bmsn.ops.conv_scale import conv_scale, conv_scale_reference
from bmsn.ops.convolution import Branch, convolve_cpp, has_cpp_convolution
from bmsn.ops.norm_relu import EPS
from convolutions import assert_exact_enough, needs_convolution, take_ours_everywhere
from stacked import assert_guards_hold, channels_last, guarded, random_map, random_rows

HALF, SINGLE = torch.bfloat16, torch.float32
# groups, images, I, O, H, W, k: one row of one quad; a stem; rows that end within a tile; an odd block of 16 outputs;
# several strips of rows; inputs that no loop is compiled for; ResNet-20's; 1x1
HALF_SHAPES = [
    (1, 2, 16, 16, 1, 4, 3),
    (2, 2, 3, 16, 8, 8, 3),
    (3, 2, 16, 32, 5, 4, 3),
    (2, 1, 32, 48, 7, 12, 3),
    (1, 2, 64, 16, 37, 20, 3),
    (2, 2, 50, 32, 4, 8, 3),
    (2, 3, 64, 64, 8, 8, 3),
    (3, 2, 16, 32, 8, 8, 1),
    (1, 2, 96, 128, 3, 4, 1),
]
# one tile; tiles that are no multiple of 8; an odd block of outputs; several strips, the last of them shorter; a row of
# more tiles than a strip wants; inputs that no loop is compiled for; ResNet-20's
SINGLE_SHAPES = [
    (1, 2, 16, 16, 2, 2, 3),
    (3, 2, 16, 32, 6, 4, 3),
    (2, 1, 32, 48, 8, 14, 3),
    (1, 2, 64, 16, 38, 20, 3),
    (1, 1, 16, 16, 4, 70, 3),
    (2, 2, 80, 128, 4, 6, 3),
    (2, 3, 64, 64, 8, 8, 3),
]
CASES = [
    pytest.param(shape, dtype, marks=needs_convolution(dtype), id=f"{shape} {dtype}")
    for dtype, shapes in ((HALF, HALF_SHAPES), (SINGLE, SINGLE_SHAPES))
    for shape in shapes
]
WITH_STATS = [case for case in CASES if case.values[0][2] % 16 == 0]
BOTH = [pytest.param(dtype, marks=needs_convolution(dtype)) for dtype in (HALF, SINGLE)]


@pytest.fixture(autouse=True)
def ours_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    take_ours_everywhere(monkeypatch)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def make_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, three weight sets, which of them each group takes, and what x is normalised by."""
    groups, images, i, o, height, width, kernel = shape
    x = random_map(groups * images, i, height, width, seed=1, dtype=dtype)
    weight = random_rows(3, o, i, kernel, kernel, seed=2, dtype=dtype)
    index = torch.tensor([2, 0, 1][:groups], dtype=torch.int32)
    stats = torch.stack([random_rows(groups, i, seed=3), 0.5 + random_rows(groups, i, seed=4).abs()]).contiguous()
    return x, weight, index, stats


def plainly(x: Tensor, weight: Tensor, index: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, its mean and its rstd, in the dtype of x; what goes into the convolution is rounded as in the kernel."""
    maps = []
    for g, part in enumerate(x.chunk(len(index))):
        if stats is not None:
            mean, rstd = (s[g][:, None, None] for s in stats)
            part = ((part.float() - mean) * rstd).relu().to(weight.dtype).to(x.dtype)
        maps.append(F.conv2d(part, weight[index[g]].to(x.dtype), padding=weight.shape[-1] // 2))
    found = [torch.var_mean(y, (0, 2, 3), correction=0) for y in maps]
    mean, variance = torch.stack([m for _, m in found]), torch.stack([v for v, _ in found])
    return torch.cat(maps), mean, (variance + EPS).rsqrt()


@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_error_is_at_most_twice_eager(shape: tuple[int, ...], dtype: torch.dtype, normalises: bool) -> None:
    x, weight, index, stats = make_case(shape, dtype)
    assert has_cpp_convolution(x, weight)
    given = stats if normalises else None
    found = conv_bn(x, weight, len(index), stats=given, weight_index=index, backend="cpp")
    oracle = plainly(x.double(), weight, index, given)
    eager = plainly(x, weight, index, given)
    assert_exact_enough(found.y, eager=eager[0], oracle=oracle[0])
    for ours, theirs, wide in zip(found.stats, eager[1:], oracle[1:], strict=True):
        assert_exact_enough(ours, eager=theirs.float(), oracle=wide)


@pytest.mark.parametrize("shortcut_and_relu", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_frozen_statistics_shortcut_and_relu_come_with_it(
    shape: tuple[int, ...], dtype: torch.dtype, shortcut_and_relu: bool
) -> None:
    x, weight, index, _ = make_case(shape, dtype)
    groups, _, _, o, height, width, _ = shape
    scale, shift = random_rows(2, groups, o, seed=5).clone()
    shortcut = random_map(len(x), o, height, width, seed=6, dtype=dtype) if shortcut_and_relu else None
    arguments = {"scale": scale, "shift": shift, "relu": shortcut_and_relu, "shortcut": shortcut, "weight_index": index}
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    found = conv_scale(x, weight, groups, **arguments, backend="cpp")
    oracle = conv_scale_reference(x.double(), weight.double(), groups, **wide)
    assert_exact_enough(found, eager=conv_scale_reference(x, weight, groups, **arguments), oracle=oracle)
    into = guarded(found, poison=True)
    bounded = {k: guarded(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    assert conv_scale(guarded(x), guarded(weight), groups, **bounded, into=into, backend="cpp") is into
    assert torch.equal(into, found)
    assert_guards_hold(y=into)


@pytest.mark.parametrize(("shape", "dtype"), WITH_STATS)
def test_two_convolutions_of_one_map_are_those_of_each(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, index, stats = make_case(shape, dtype)
    projection = random_rows(3, weight.shape[1], shape[2], 1, 1, seed=6, dtype=dtype)
    both = conv_bn(x, weight, len(index), stats=stats, weight_index=index, shortcut_weight=projection, backend="cpp")
    for w, y, of_y in ((weight, both.y, both.stats), (projection, both.shortcut, both.shortcut_stats)):
        alone = conv_bn(x, w, len(index), stats=stats, weight_index=index, backend="cpp")
        assert torch.equal(y, alone.y)
        assert torch.equal(of_y, alone.stats)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_every_tap_and_channel_is_where_it_belongs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Small integers: exact in any order. Forward, and the other way round, which is the gradient of the input."""
    groups, images, i, o, height, width, kernel = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (o, i, kernel, kernel), generator=generator).double()
    x = torch.randint(-1, 2, (groups * images, i, height, width), generator=generator).double().requires_grad_()
    y = F.conv2d(x, weight, padding=kernel // 2)
    grad = torch.randint(-1, 2, y.shape, generator=generator).double()
    y.backward(grad)
    narrow = channels_last(weight.to(dtype))[None]

    def rounded(wanted: Tensor) -> Tensor:
        return wanted.to(dtype).double()

    found = torch.empty_like(channels_last(y.to(dtype)))
    convolve_cpp(channels_last(x.detach().to(dtype)), [Branch(narrow, found)])
    assert torch.equal(found.double(), rounded(y.detach()))
    if i % 16 == 0:
        dx = torch.empty_like(channels_last(x.detach().to(dtype)))
        convolve_cpp(channels_last(grad.to(dtype)), [Branch(narrow, dx, transposed=True)])
        assert torch.equal(dx.double(), rounded(x.grad))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_nothing_is_read_or_written_out_of_bounds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every buffer lies between guards of NaN: read, one spoils a result; written, it is NaN no longer."""
    x, weight, index, stats = make_case(shape, dtype)
    given = stats if shape[2] % 16 == 0 else None
    wanted = conv_bn(x, weight, len(index), stats=given, weight_index=index, backend="cpp")
    y, of_y = guarded(wanted.y, poison=True), guarded(wanted.stats, poison=True)
    given = None if given is None else guarded(given)
    convolve_cpp(
        guarded(x), [Branch(guarded(weight), y, of_y)], len(index), stats=given, weight_index=guarded(index)
    )  # fmt: skip
    assert torch.equal(y, wanted.y)
    assert torch.equal(of_y, wanted.stats)
    assert_guards_hold(y=y, stats=of_y)


@pytest.mark.parametrize("dtype", BOTH)
def test_result_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x, weight, index, stats = make_case((3, 5, 32, 64, 12, 8, 3), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(conv_bn(x, weight, 3, stats=stats, weight_index=index, backend="cpp"))
    for other in results[1:]:
        assert torch.equal(other.y, results[0].y)
        assert torch.equal(other.stats, results[0].stats)


def middle_tap(weight: Tensor) -> Tensor:
    """A set of one 3x3 convolution that takes each pixel alone: (O, I) -> (1, O, I, 3, 3)."""
    return channels_last(F.pad(weight[:, :, None, None], (1, 1, 1, 1)))[None]


@pytest.mark.parametrize("dtype", BOTH)
def test_statistics_survive_a_large_mean(dtype: torch.dtype) -> None:
    """262,144 values a channel, mean 1000, variance 1: their squares in float32 leave no digit of the variance."""
    noise = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(64, 16, 64, 64)
    x[:, 0], x[:, 1] = 1000, noise
    x = channels_last(x.to(dtype))
    weight = torch.zeros(16, 16, dtype=dtype)
    weight[:, :2] = 1
    mean, rstd = conv_bn(x, middle_tap(weight), 1, backend="cpp").stats.double()
    oracle = x[:, 1].double()
    torch.testing.assert_close(mean, (1000 + oracle.mean()).expand(1, 16), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd, (oracle.var(correction=0) + EPS).rsqrt().expand(1, 16), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", BOTH)
def test_statistics_survive_an_outlier_in_the_first_pixel(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16, 96, 96, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = 1000
    x = channels_last(x.to(dtype))
    mean, rstd = conv_bn(x, middle_tap(torch.eye(16, dtype=dtype)), 1, backend="cpp").stats[:, 0].double()
    variance, wanted = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(rstd, (variance + EPS).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", BOTH)
def test_nan_stays_in_its_pixels_and_group(dtype: torch.dtype) -> None:
    x, weight, index, stats = make_case((2, 2, 16, 16, 6, 8, 3), dtype)
    x[3, 5, 2, 4] = torch.nan
    found = conv_bn(x, weight, 2, stats=stats, weight_index=index, backend="cpp")
    assert found.y[3, :, 1:4, 3:6].isnan().all()
    assert found.y.isnan().sum() == 16 * 9
    assert found.stats[:, 1].isnan().all()
    assert not found.stats[:, 0].isnan().any()


@pytest.mark.parametrize("dtype", BOTH)
def test_memory_may_be_given_and_statistics_left_out(dtype: torch.dtype) -> None:
    x, weight, index, stats = make_case((2, 2, 16, 16, 6, 8, 3), dtype)
    wanted = conv_bn(x, weight, 2, stats=stats, weight_index=index, backend="cpp")
    into = torch.empty_like(wanted.y)
    found = conv_bn(x, weight, 2, stats=stats, weight_index=index, into=[into], measure=False, backend="cpp")
    assert found.y is into
    assert torch.equal(found.y, wanted.y)
    assert found.stats.numel() == 0


@pytest.mark.parametrize("dtype", BOTH)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, index, stats = make_case((2, 2, 16, 16, 6, 8, 3), dtype)
    torch.library.opcheck(torch.ops.bmsn.conv_bn.default, (x, weight, 2, stats, index, 1, None, "cpp"))
    scaled = (*stats.unbind(), True, x)  # as many outputs as inputs
    torch.library.opcheck(torch.ops.bmsn.conv_scale.default, (x, weight, 2, *scaled, index, 1, "cpp"))


@pytest.mark.parametrize("dtype", BOTH)
def test_fake_tensors_have_no_memory_to_compute_in(dtype: torch.dtype) -> None:
    x, weight, *_ = make_case((2, 2, 16, 32, 8, 8, 3), dtype)
    affine = torch.ones(2, 32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_x, fake_weight, ones = (mode.from_tensor(t) for t in (x, weight, affine))
        for measure in (True, False):
            assert conv_bn(fake_x, fake_weight, 2, measure=measure).y.shape == (4, 32, 8, 8)
        scaled = conv_scale(fake_x, fake_weight, 2, scale=ones, shift=ones, relu=True)
        assert scaled.shape == (4, 32, 8, 8)
        assert conv_scale(fake_x, fake_weight, 2, scale=ones, shift=ones, relu=True, into=scaled) is scaled


@pytest.mark.parametrize("dtype", BOTH)
def test_bad_memory_is_named(dtype: torch.dtype) -> None:
    x, weight, index, _ = make_case((2, 2, 16, 16, 6, 8, 3), dtype)
    ones = torch.ones(2, 16)
    for wrong in (torch.empty(4, 16, 6, 8, dtype=dtype), channels_last(x[:2])):
        with pytest.raises(InputError, match="into must be"):
            conv_bn(x, weight, 2, weight_index=index, into=[wrong], backend="cpp")
        with pytest.raises(InputError, match="into must be"):
            conv_scale(x, weight, 2, scale=ones, shift=ones, relu=True, into=wrong, backend="cpp")


@pytest.mark.parametrize("dtype", BOTH)
def test_a_weight_set_that_is_not_there(dtype: torch.dtype) -> None:
    x, weight, _, stats = make_case((2, 2, 16, 16, 6, 8, 3), dtype)
    with pytest.raises(IndexError, match=r"weight_index must be in 0\.\.2; got 3"):
        conv_bn(x, weight, 2, stats=stats, weight_index=torch.tensor([0, 3], dtype=torch.int32), backend="cpp")


@pytest.mark.parametrize("dtype", BOTH)
def test_what_it_is_not_for(dtype: torch.dtype) -> None:
    x, weight, *_ = make_case((2, 2, 16, 16, 8, 8, 3), dtype)
    assert has_cpp_convolution(x, weight)
    assert not has_cpp_convolution(x, weight, stride=2)
    assert not has_cpp_convolution(x.double(), weight.double())
    assert not has_cpp_convolution(x, weight.double())
    assert not has_cpp_convolution(x.contiguous(), weight)
    assert not has_cpp_convolution(channels_last(x[..., :5]), weight)
    assert not has_cpp_convolution(x, weight[:, :8])
    assert not has_cpp_convolution(x, weight.repeat(1, 16, 1, 1, 1))
    assert not has_cpp_convolution(x, F.pad(weight, (1, 1, 1, 1)))


@needs_convolution(SINGLE)
def test_what_it_is_not_for_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_ = make_case((2, 2, 32, 16, 8, 8, 3), SINGLE)
    for bound, least in (("MIN_MAP", 64), ("MIN_PIXELS", 256)):
        monkeypatch.setattr(module, bound, least)
        assert has_cpp_convolution(x, weight)
        monkeypatch.setattr(module, bound, least + 1)
        assert not has_cpp_convolution(x, weight)
        monkeypatch.setattr(module, bound, 0)
    assert not has_cpp_convolution(channels_last(x[:, :, :5]), weight)
    assert not has_cpp_convolution(x, weight[..., :1, :1])
    assert not has_cpp_convolution(channels_last(x[:, :24]), weight[:, :, :24])


def _available_gib() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.skipif(_available_gib() < 12, reason="needs 12 GiB of free memory")
def test_maps_beyond_2_31_elements() -> None:
    """The last images of a map of 2^31 and some elements, all zero before them, and statistics of it all."""
    tail = random_map(32, 16, 64, 64, seed=1, dtype=torch.bfloat16)
    weight = random_rows(1, 16, 16, 1, 1, seed=2, dtype=torch.bfloat16)
    num_images = 2**31 // tail[0].numel() + 1
    x = torch.zeros((num_images, 64, 64, 16), dtype=torch.bfloat16).permute(0, 3, 1, 2)
    x[-32:] = tail
    found = conv_bn(x, weight, 1, backend="cpp")
    wanted = conv_bn(tail, weight, 1, backend="cpp")
    assert torch.equal(found.y[-32:], wanted.y)
    assert not found.y[:32].any()
    assert found.y.numel() > 2**31
    mean = wanted.stats[0].double() * 32 / num_images
    torch.testing.assert_close(found.stats[0].double(), mean, rtol=1e-4, atol=1e-9)
