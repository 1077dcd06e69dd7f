"""bn_add_relu_pool: C++ and reference against a float64 formula, what is written where, and nothing beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from oracles import assert_no_worse

# (groups, images of a group, C, H, W): smallest; channels that fill no vector; a ResNet-20 layer in two groups;
# several chunks of lines in a group; lines longer than a chunk
SHAPES = [(1, 1, 1, 2, 2), (3, 2, 5, 4, 6), (2, 2, 16, 32, 32), (2, 3, 64, 16, 16), (1, 1, 100, 4, 200)]
KINDS = ["none", "plain", "normalised"]
DTYPES = [torch.float32, torch.bfloat16]
needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C was not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp)]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def make_inputs(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> list[Tensor | None]:
    """y, stats, shortcut, shortcut_stats."""
    generator = torch.Generator().manual_seed(sum(shape))
    groups, images, channels, height, width = shape
    maps = [
        channels_last(torch.randn(groups * images, channels, height, width, generator=generator).to(dtype))
        for _ in range(2)
    ]
    stats = [torch.rand(2, groups, channels, generator=generator) + 0.5 for _ in range(2)]
    return [maps[0], stats[0], None if kind == "none" else maps[1], stats[1] if kind == "normalised" else None]


def formula(y: Tensor, stats: Tensor, shortcut: Tensor | None, shortcut_stats: Tensor | None) -> Tensor:
    """z in the widest of the inputs' dtypes, group by group."""

    def norm(x: Tensor, stats: Tensor) -> Tensor:
        groups = zip(x.chunk(stats.shape[1]), *stats, strict=True)
        return torch.cat([(g - mean[:, None, None]) * rstd[:, None, None] for g, mean, rstd in groups])

    z = norm(y, stats)
    if shortcut is not None:
        z = z + (shortcut if shortcut_stats is None else norm(shortcut, shortcut_stats))
    return z.clamp_min(0)


def pool_plainly(z: Tensor, pool: str) -> Tensor:
    windows = torch.stack([z[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    return windows.amax(0) if pool == "max" else windows.mean(0)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    images, channels, height, width = shape
    return torch.full((images, height, width, channels), torch.nan, dtype=dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape, kind, dtype, pool, backend):
    inputs = make_inputs(shape, kind, dtype)
    y = inputs[0]
    half = (*y.shape[:2], y.shape[2] // 2, y.shape[3] // 2)
    full, pooled = poisoned(y.shape, dtype), poisoned(half, dtype)
    bn_add_relu_pool(*inputs, full=full, pooled=pooled, pool=pool, backend=backend)
    oracle = formula(*(None if t is None else t.double() for t in inputs))
    eager = formula(*(None if t is None else t.float() for t in inputs)).to(dtype)
    assert_no_worse(full, eager=eager, oracle=oracle)
    if pool == "max":
        assert torch.equal(pooled, pool_plainly(full, "max"))
    else:
        assert_no_worse(pooled, eager=pool_plainly(full, "avg"), oracle=pool_plainly(full.double(), "avg"))
    # Either alone, and in place, gives the same bits.
    alone, only_pooled, in_place = poisoned(y.shape, dtype), poisoned(half, dtype), y.clone()
    bn_add_relu_pool(*inputs, full=alone, backend=backend)
    bn_add_relu_pool(*inputs, pooled=only_pooled, pool=pool, backend=backend)
    bn_add_relu_pool(in_place, *inputs[1:], full=in_place, backend=backend)
    assert torch.equal(alone, full)
    assert torch.equal(only_pooled, pooled)
    assert torch.equal(in_place, full)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_writes_its_slots_only(dtype):
    inputs = make_inputs((3, 2, 5, 4, 6), "normalised", dtype)
    guard, sizes = 64, (6 * 5 * 4 * 6, 6 * 5 * 2 * 3)
    memory = [torch.full((size + 2 * guard,), torch.nan, dtype=dtype) for size in sizes]
    full = memory[0][guard:-guard].view(6, 4, 6, 5).permute(0, 3, 1, 2)
    pooled = memory[1][guard:-guard].view(6, 2, 3, 5).permute(0, 3, 1, 2)
    bn_add_relu_pool(*inputs, full=full, pooled=pooled, backend="cpp")
    for block in memory:
        assert block[:guard].isnan().all()
        assert block[-guard:].isnan().all()
        assert block[guard:-guard].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_propagates_to_its_window(dtype, backend):
    y, stats, *_ = make_inputs((1, 2, 3, 4, 4), "none", dtype)
    y[1, 2, 3, 0] = torch.nan
    full, pooled = poisoned(y.shape, dtype), poisoned((2, 3, 2, 2), dtype)
    bn_add_relu_pool(y, stats, full=full, pooled=pooled, backend=backend)
    assert full.isnan().nonzero().tolist() == [[1, 2, 3, 0]]
    assert pooled.isnan().nonzero().tolist() == [[1, 2, 1, 0]]


@needs_cpp
def test_opcheck():
    y, stats, shortcut, shortcut_stats = make_inputs((2, 2, 5, 4, 6), "normalised", torch.float32)
    outputs = (torch.empty_like(y), channels_last(torch.empty(4, 5, 2, 3)))
    torch.library.opcheck(torch.ops.bmsn.bn_add_relu_pool, (y, stats, shortcut, shortcut_stats, *outputs, "max", "cpp"))


def test_bad_input():
    y, stats, shortcut, _ = make_inputs((2, 1, 3, 4, 5), "plain", torch.float32)
    full, even = torch.empty_like(y), channels_last(torch.zeros(2, 3, 4, 4))
    for words, call in (
        ("at least one of full and pooled", lambda: bn_add_relu_pool(y, stats)),
        ("one of max, avg; got 'min'", lambda: bn_add_relu_pool(y, stats, full=full, pool="min")),
        ("even H and W", lambda: bn_add_relu_pool(y, stats, pooled=channels_last(torch.zeros(2, 3, 2, 2)))),
        (r"pooled must be \(2, 3, 2, 2\)", lambda: bn_add_relu_pool(even, stats, pooled=even)),
        (r"full must be \(2, 3, 4, 5\)", lambda: bn_add_relu_pool(y, stats, full=even)),
        (r"shortcut must be \(2, 3, 4, 5\)", lambda: bn_add_relu_pool(y, stats, even, full=full)),
        ("shortcut_stats must be None", lambda: bn_add_relu_pool(y, stats, None, stats, full=full)),
        ("channels_last", lambda: bn_add_relu_pool(y.contiguous(), stats, full=full)),
        (r"torch\.bfloat16", lambda: bn_add_relu_pool(y, stats, shortcut.bfloat16(), full=full)),
        (r"stats must be .*torch\.float32", lambda: bn_add_relu_pool(y, stats.double(), full=full)),
        (r"stats must be \(2, 2, 3\)", lambda: bn_add_relu_pool(y, stats[..., :2], full=full)),
        (r"stats must be \(2, G, C\)", lambda: bn_add_relu_pool(y, stats[0], full=full)),
        ("divide the batch of 2 images; got 3", lambda: bn_add_relu_pool(y, torch.ones(2, 3, 3), full=full)),
        ("has only: reference", lambda: bn_add_relu_pool(y.double(), stats.double(), full=y.double(), backend="cpp")),
    ):
        with pytest.raises(InputError, match=words):
            call()
