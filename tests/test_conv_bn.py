"""conv_bn and batch_statistics: against float64, with and without the normalised input, in groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.conv_bn import batch_statistics, conv_bn
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
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]


def make_case(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, stats of x, weight of a projection."""
    groups, images, inputs, outputs, kernel, _, height, width = case
    generator = torch.Generator().manual_seed(sum(case))
    x = torch.randn(groups * images, height, width, inputs, generator=generator).permute(0, 3, 1, 2)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2) ** 0.5
    projection = torch.randn(outputs, inputs, 1, 1, generator=generator) / inputs**0.5
    stats = torch.stack([0.3 * torch.randn(groups, inputs, generator=generator), 1 + torch.rand(groups, inputs)])
    layout = {"dtype": dtype, "memory_format": torch.channels_last}
    return x.to(dtype), weight.to(**layout), stats, projection.to(**layout)


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
    padding = weight.shape[2] // 2
    for given in (None, stats):
        wide, plain = x.double(), x
        if given is not None:  # what goes into the convolution has the dtype of x: the oracle is given that too
            plain = normalised_plainly(x.float(), given).to(dtype)
            wide = plain.double()
        found = conv_bn(x, weight, groups, stats=given, stride=stride, shortcut_weight=projection, backend=backend)
        oracle = F.conv2d(wide, weight.double(), stride=stride, padding=padding)
        eager = F.conv2d(plain, weight, stride=stride, padding=padding)
        assert_no_worse(found.y, eager=eager, oracle=oracle)
        assert_no_worse(
            found.shortcut,
            eager=F.conv2d(plain, projection, stride=stride),
            oracle=F.conv2d(wide, projection.double(), stride=stride),
        )
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
    torch.testing.assert_close(x, normalised_plainly(before, stats))
    assert kept.shortcut is None
    assert kept.shortcut_stats is None


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
    torch.library.opcheck(torch.ops.bmsn.batch_statistics, (x, 2))


def test_bad_input():
    x, weight, stats, projection = make_case(CASES[1], torch.float32)
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16; it must be torch\.float32"):
        conv_bn(x, weight.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"weight must be \(O, 16, k, k\) with an odd k; got \(16, 8, 3, 3\)"):
        conv_bn(x, weight[:, :8], 2)
    with pytest.raises(ValueError, match=r"shortcut_weight must be .* got \(16, 16, 2, 2\)"):
        conv_bn(x, weight, 2, shortcut_weight=projection.repeat(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"stats must be .*\(2, 2, 16\); got \(2, 1, 16\)"):
        conv_bn(x, weight, 2, stats=stats[:, :1].contiguous())
    with pytest.raises(InputError, match="divide the batch of 4 images; got 3"):
        conv_bn(x, weight, 3)
    with pytest.raises(InputError, match="stride must be at least 1; got 0"):
        conv_bn(x, weight, 2, stride=0)
    with pytest.raises(ValueError, match="channels_last"):
        conv_bn(x.contiguous(), weight, 2)
    with pytest.raises(InputError, match="2 values"):
        batch_statistics(torch.zeros(2, 3, 1, 1), 2)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        batch_statistics(torch.zeros(2, 3), 1)
    with pytest.raises(TypeError, match="float16"):
        batch_statistics(torch.zeros(2, 3, 2, 2).half(), 1)
