"""Beyond 2^31 elements: the last program of a launch on maps of 16 GiB reads and writes where it should.

The maps are addresses without memory behind them (pages appear where they are touched), and of each launch only the
last program runs, in Triton's interpreter.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import aot
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.conv_bn import conv_bn
from bmsn.ops.head import head_reference
from stacked import INTERPRETING, channels_last, random_map, random_rows

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter: test_triton_interpreter.py")

GROUPS, IMAGES, CHANNELS, SIZE = 2, 2**23, 16, 4  # 2^31 elements a group
MAP_NORESERVE = 0x4000  # Linux's; Python has a name for it from 3.13 on
TAIL = 32  # images at the end of the last group that are looked at


def sparse_map(size: int = SIZE) -> Tensor:
    """(GROUPS * IMAGES, CHANNELS, size, size), channels_last, zeros."""
    elements = GROUPS * IMAGES * CHANNELS * size * size
    memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    flat = torch.frombuffer(memory, dtype=torch.float32)
    return flat.view(GROUPS * IMAGES, size, size, CHANNELS).permute(0, 3, 1, 2)


def run_last_program(launch: Callable[[], None]) -> None:
    """Of the first kernel that `launch` starts."""
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    grids: list[int] = []
    first = aot.record(launch, grids)[0]
    plain, grid = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
    with (
        patch.object(interpreter_builder, "set_grid_dim", lambda *_: grid(grids[0], 1, 1)),
        patch.object(interpreter_builder, "set_grid_idx", lambda x, y, z: plain(grids[0] - 1, y, z)),
        patch.object(GridExecutor, "_restore_args_dev", lambda *_: None),  # copies all memory, onto itself
    ):
        first.kernel[(1,)](*first.args, **first.options)


@pytest.fixture
def x() -> Tensor:
    found = sparse_map()
    assert found.numel() == 2**32
    found[-TAIL:] = random_map(TAIL, CHANNELS, SIZE, SIZE, seed=1)
    return found


STATS = torch.stack([torch.full((GROUPS, CHANNELS), 0.25), torch.full((GROUPS, CHANNELS), 1.5)])
LAST = STATS[:, -1:].contiguous()


def test_triton_convolves_the_last_tile(x: Tensor) -> None:
    weight, y, stats = random_rows(1, CHANNELS, CHANNELS, 3, 3, seed=2), sparse_map(), torch.empty_like(STATS)
    launch = aot.kernels("conv_bn").launch_conv_bn
    run_last_program(partial(launch, x, weight, GROUPS, STATS, None, 1, None, y, stats))
    wanted = conv_bn(channels_last(x[-TAIL:]), weight, 1, stats=LAST, backend="reference").y
    torch.testing.assert_close(y[-4:], wanted[-4:], rtol=1e-5, atol=1e-5)  # a tile is 64 pixels
    assert not y[-TAIL:-4].any()


def test_triton_joins_the_last_tile(x: Tensor) -> None:
    full, pooled = sparse_map(), sparse_map(SIZE // 2)
    launch = aot.kernels("bn_add_relu_pool").launch_bn_add_relu_pool
    run_last_program(partial(launch, x, STATS, x, None, full, pooled, "max"))
    wanted_full, wanted_pooled = torch.empty_like(full[-TAIL:]), torch.empty_like(pooled[-TAIL:])
    tail = channels_last(x[-TAIL:])
    bn_add_relu_pool(tail, LAST, tail, full=wanted_full, pooled=wanted_pooled, backend="reference")
    torch.testing.assert_close(full[-16:], wanted_full[-16:])  # a tile is 64 windows
    torch.testing.assert_close(pooled[-16:], wanted_pooled[-16:])
    assert not full[-TAIL:-16].any()


def test_triton_measures_the_last_tile(x: Tensor) -> None:
    module = aot.kernels("statistics")
    kept: list[Tensor] = []
    empty = module.empty_partials
    with patch.object(module, "empty_partials", lambda *sizes: kept.append(empty(*sizes)) or kept[-1]):
        run_last_program(partial(module.launch_batch_statistics, x, GROUPS, torch.empty_like(STATS)))
    values = x[-TAIL:].permute(0, 2, 3, 1).reshape(-1, CHANNELS)  # a tile is 512 pixels: these 32 images
    mean = values.mean(0)
    torch.testing.assert_close(
        kept[0][-1, -1], torch.stack([mean, (values - mean).square().sum(0)]), rtol=1e-4, atol=1e-4
    )


def test_triton_classifies_the_last_images(x: Tensor) -> None:
    weight, bias = random_rows(1, 5, CHANNELS, seed=3), random_rows(1, 5, seed=4)
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    labels[-TAIL:] = torch.arange(TAIL) % 5
    correct = torch.zeros(GROUPS, dtype=torch.int64)
    run_last_program(partial(aot.kernels("head").launch_head, x, labels, weight, bias, GROUPS, None, correct))
    wanted = head_reference(channels_last(x[-16:]), labels[-16:], weight, bias, 1)  # a program is 16 images
    assert 0 < int(wanted) < 16
    assert correct.tolist() == [0, int(wanted)]
