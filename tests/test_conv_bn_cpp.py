"""conv_bn and batch_statistics: against float64, with and without the normalised input, in groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.conv_bn import batch_statistics, conv_bn
from bmsn.ops.convolution import has_cpp_convolution
from bmsn.ops.norm_relu import EPS
from oracles import assert_no_worse

# (groups, images of a group, I, O, kernel, stride, H, W): a stem; a ResNet-20 layer; a striding projection; odd sizes
CASES = [
    (2, 3, 3, 16, 3, 1, 8, 8),
    (2, 2, 16, 16, 3, 1, 32, 32),
    (3, 2, 16, 32, 1, 2, 8, 8),
    (1, 2, 5, 7, 3, 2, 5, 9),
]
DTYPES = [torch.float32, torch.bfloat16]
needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C was not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp)]


def make_case(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, stats of x, weight of a projection; two weight sets each, of which the last is meant."""
    groups, images, inputs, outputs, kernel, _, height, width = case
    generator = torch.Generator().manual_seed(sum(case))
    x = torch.randn(groups * images, height, width, inputs, generator=generator).permute(0, 3, 1, 2)
    weight = torch.randn(2, outputs, kernel, kernel, inputs, generator=generator) / (inputs * kernel**2) ** 0.5
    projection = torch.randn(2, outputs, 1, 1, inputs, generator=generator) / inputs**0.5
    stats = torch.stack([0.3 * torch.randn(groups, inputs, generator=generator), 1 + torch.rand(groups, inputs)])
    return x.to(dtype), weight.permute(0, 1, 4, 2, 3).to(dtype), stats, projection.permute(0, 1, 4, 2, 3).to(dtype)


def statistics_plainly(y: Tensor, groups: int) -> Tensor:
    parts = [part.permute(1, 0, 2, 3).flatten(1) for part in y.chunk(groups)]
    mean = torch.stack([part.mean(1) for part in parts])
    variance = torch.stack([(part - part.mean(1, keepdim=True)).square().mean(1) for part in parts])
    return torch.stack([mean, 1 / (variance + EPS).sqrt()])


def normalised_plainly(x: Tensor, stats: Tensor) -> Tensor:
    groups = zip(x.chunk(stats.shape[1]), *stats, strict=True)
    return torch.cat([((g - mean[:, None, None]) * rstd[:, None, None]).clamp_min(0) for g, mean, rstd in groups])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_eager(case, dtype, backend):
    groups, stride = case[0], case[5]
    x, weight, stats, projection = make_case(case, dtype)
    padding = weight.shape[-1] // 2
    chosen = torch.ones(groups, dtype=torch.int32)
    for given, index in ((None, None), (stats, None), (stats, chosen)):
        w, p = (weight[0], projection[0]) if index is None else (weight[1], projection[1])
        wide, plain = x.double(), x
        if given is not None:  # what goes into the convolution has the dtype of x: the oracle is given that too
            plain = normalised_plainly(x.float(), given).to(dtype)
            wide = plain.double()
        found = conv_bn(
            x, weight, groups, stats=given, weight_index=index, stride=stride, shortcut_weight=projection,
            backend=backend,
        )  # fmt: skip
        oracle = F.conv2d(wide, w.double(), stride=stride, padding=padding)
        eager = F.conv2d(plain, w, stride=stride, padding=padding)
        assert_no_worse(found.y, eager=eager, oracle=oracle)
        assert_no_worse(
            found.shortcut,
            eager=F.conv2d(plain, p, stride=stride),
            oracle=F.conv2d(wide, p.double(), stride=stride),
        )
        if all(has_cpp_convolution(x, t, stride) for t in (weight, projection)):  # measures before it rounds
            continue  # test_conv_forward.py
        for y, of in ((found.y, found.stats), (found.shortcut, found.shortcut_stats)):
            assert of.dtype == torch.float32
            assert_no_worse(
                of, eager=statistics_plainly(y.float(), groups), oracle=statistics_plainly(y.double(), groups)
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_is_replaced_only_where_it_may_be(backend):
    x, weight, stats, _ = make_case(CASES[1], torch.float32)
    before = x.clone()
    kept = conv_bn(x, weight, 2, stats=stats, backend=backend)
    assert torch.equal(x, before)
    replaced = conv_bn(x, weight, 2, stats=stats, overwrite=True, backend=backend)
    assert torch.equal(replaced.y, kept.y)
    if backend == "cpp":  # the reference has no use for it
        torch.testing.assert_close(x, normalised_plainly(before, stats))
    assert kept.shortcut is None
    assert kept.shortcut_stats is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_group_takes_its_own_weights(backend):
    x, weight, stats, _ = make_case((3, 2, 16, 8, 3, 1, 6, 6), torch.float32)
    mixed = conv_bn(x, weight, 3, stats=stats, weight_index=torch.tensor([1, 0, 1], dtype=torch.int32), backend=backend)
    for row, groups in ((0, [1]), (1, [0, 2])):
        alone = conv_bn(x, weight[row : row + 1], 3, stats=stats, backend=backend)
        for g in groups:
            torch.testing.assert_close(mixed.y[2 * g : 2 * g + 2], alone.y[2 * g : 2 * g + 2], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(mixed.stats[:, g], alone.stats[:, g], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_does_not_depend_on_the_others(backend):
    x, weight, stats, _ = make_case((3, 2, 16, 8, 3, 1, 6, 6), torch.float32)
    together = conv_bn(x, weight, 3, stats=stats, backend=backend)
    for g in range(3):
        own = x[2 * g : 2 * g + 2]
        alone = conv_bn(own, weight, 1, stats=stats[:, g : g + 1].contiguous(), backend=backend)
        torch.testing.assert_close(alone.y, together.y[2 * g : 2 * g + 2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.stats, together.stats[:, g : g + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_survive_a_large_mean(backend):
    x = (1000 + torch.randn(64, 2, 64, 64, generator=torch.Generator().manual_seed(0))).contiguous(
        memory_format=torch.channels_last
    )  # 262,144 values a channel
    stats = batch_statistics(x, 1, backend=backend)
    oracle = statistics_plainly(x.double(), 1)
    torch.testing.assert_close(stats.double(), oracle, rtol=1e-4, atol=0)
    assert abs(stats[1].mean() - 1) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_channel_and_group(backend):
    x = torch.randn(4, 4, 4, 3).permute(0, 3, 1, 2)
    x[3, 1, 2, 2] = torch.nan
    stats = batch_statistics(x, 2, backend=backend)
    assert stats.isnan().nonzero().tolist() == [[0, 1, 1], [1, 1, 1]]


@needs_cpp
def test_opcheck():
    x, *_ = make_case(CASES[0], torch.float32)
    torch.library.opcheck(torch.ops.bmsn.batch_statistics, (x, 2, "cpp"))
    _, weight, stats, projection = make_case(CASES[0], torch.float32)
    torch.library.opcheck(torch.ops.bmsn.conv_bn, (x, weight, 2, stats, None, 1, projection, "cpp"))


def test_bad_input():
    x, weight, stats, projection = make_case(CASES[1], torch.float32)
    flat = torch.zeros(2, 3, 1, 1)
    for words, call in (
        (r"weight must be torch\.float32 on cpu; got torch\.bfloat16", lambda: conv_bn(x, weight.bfloat16(), 2)),
        (r"weight must be \(S, O, 16, 3, 3\).*got \(2, 16, 8, 3, 3\)", lambda: conv_bn(x, weight[:, :, :8], 2)),
        (r"weight must lie in \(S, O, kh, kw, I\) order", lambda: conv_bn(x, weight.contiguous(), 2)),
        (r"shortcut_weight must be .*got \(2, 8, 16, 1, 1\)",
         lambda: conv_bn(x, weight, 2, shortcut_weight=projection[:, :8])),
        (r"stats must be \(2, 2, 16\).*got \(2, 1, 16\)",
         lambda: conv_bn(x, weight, 2, stats=stats[:, :1].contiguous())),
        (r"weight_index must be \(2,\).*int32", lambda: conv_bn(x, weight, 2, weight_index=torch.zeros(2))),
        ("divide the batch of 4 images; got 3", lambda: conv_bn(x, weight, 3)),
        ("stride must be 1 or 2; got 0", lambda: conv_bn(x, weight, 2, stride=0)),
        ("channels_last", lambda: conv_bn(x.contiguous(), weight, 2)),
        ("at least 2 values", lambda: batch_statistics(flat, 2)),
        (r"\(B, C, H, W\)", lambda: batch_statistics(flat[0, 0], 1)),
        ("float16", lambda: batch_statistics(flat.half(), 1)),
        ("has only: reference", lambda: conv_bn(x.double(), weight.double(), 2, backend="cpp")),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            call()
