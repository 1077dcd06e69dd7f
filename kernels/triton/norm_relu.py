"""BatchNorm over batch statistics, shortcut, ReLU and pooling, forward and backward, for `bmsn.ops.norm_relu`.

Forward: statistics, then one pass (`bn_add_relu_pool`). Backward: one pass sums, for each group and channel, e and
e * (x - mean) over the group (e: the gradient behind ReLU and pooling); a small kernel adds the programs' sums up in
their order, without float atomics; a second pass makes the gradients of the inputs. e is computed in both: written and
read back it would cost as much as it is read here.

A program takes BLOCK_P windows of one group and BLOCK_C channels, as in `bn_add_relu_pool`.
"""

import torch
import triton
import triton.language as tl

from bmsn.kernels.bn_add_relu_pool import launch_bn_add_relu_pool
from bmsn.kernels.statistics import launch_batch_statistics

# Values of one pixel of all windows of a program, and the most channels; numbers that the sum of sums reads at a time.
# Estimates, still to be measured on a GPU: up to five maps are read at once, so half of what the forward pass takes.
TILE, MAX_CHANNELS = {1: 2048, 2: 512}, 128
SUMS_TILE, SUMS_CHANNELS = 2048, 32
NUM_WARPS = 4


@triton.jit
def _window(program, tiles, images, height, width, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Of a program: group, channels (B,), their mask; windows' corners and places after pooling, (P, B), and mask."""
    channel_blocks: tl.constexpr = (C + B - 1) // B
    tile, channel = program // channel_blocks, program % channel_blocks * B + tl.arange(0, B)
    group = (tile // tiles).to(tl.int64)
    rows, columns = height // W, width // W
    windows = images * rows * columns
    window = tile % tiles * P + tl.arange(0, P)
    mask = (window < windows)[:, None] & (channel < C)[None, :]
    row, column = window // columns, window % columns  # row: of all images of the group
    corner = ((group * images * height + row * W) * width + column * W)[:, None] * C + channel[None, :]
    place = (group * windows + window)[:, None] * C + channel[None, :]
    return tile, group, channel, corner, place, mask


@triton.jit
def _active(grad, y, index, centred, scale, shift, pixel: tl.constexpr, MAX: tl.constexpr):
    """e of one pixel of each window; ReLU's mask is that of y, of norm(x) where y is None, or, of a mean, in the index.

    shift: None without an affine step, and then norm(x) has the sign of the centred x.
    """
    if index is not None and not MAX:  # (what follows an early return would be compiled as well)
        e = tl.where((index >> pixel) & 1 != 0, 0.25 * grad, 0.0)
    elif y is not None:
        e = tl.where(y <= 0, 0.0, grad)
        if index is not None:
            e = tl.where(index == pixel, e, 0.0)
    elif shift is not None:
        e = tl.where(centred * scale[None, :] + shift[None, :] <= 0, 0.0, grad)
    else:
        e = tl.where(centred <= 0, 0.0, grad)
    return e


@triton.jit
def _scale(rstd_ptr, affine_ptr, channel, known):
    """rstd, or rstd * weight with an affine step. rstd_ptr: pointers to those of the channels."""
    scale = tl.load(rstd_ptr, mask=known, other=0.0)
    if affine_ptr is not None:
        scale *= tl.load(affine_ptr + channel, mask=known, other=0.0)
    return scale


@triton.jit(do_not_specialize=["num_groups", "images", "height", "width", "tiles"])
def _gradient_sums_kernel(
    grad_ptr,  # (G, images, height / WINDOW, width / WINDOW, C)
    y_ptr,  # like grad, or None
    index_ptr,  # like grad in uint8, or None, and then WINDOW is 1
    x_ptr,  # (G, images, height, width, C)
    shortcut_ptr,  # like x, or None
    affine_ptr,  # (2, 2, C) with one group, or (2, C) without shortcut; None: no affine step
    stats_ptr,  # (2, 2, G, C), or (2, G, C) without shortcut
    partial_ptr,  # (G, tiles, 3, C): e, e * (x - mean), e * (shortcut - its mean); two of them without shortcut
    num_groups,
    images,
    height,
    width,
    tiles,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, group, channel, corner, place, mask = _window(
        tl.program_id(0), tiles, images, height, width, C, WINDOW, BLOCK_P, BLOCK_C
    )
    known = channel < C
    stats = stats_ptr + group * C + channel
    other = num_groups.to(tl.int64) * C  # from means to rstds
    mean = tl.load(stats, mask=known, other=0.0)
    scale = _scale(stats + other, affine_ptr, channel, known)
    shift = None
    if affine_ptr is not None:
        shift = tl.load(affine_ptr + C + channel, mask=known, other=0.0)
    if shortcut_ptr is not None:
        shortcut_mean = tl.load(stats + 2 * other, mask=known, other=0.0)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = None
    if y_ptr is not None:
        y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    index = None
    if index_ptr is not None:
        index = tl.load(index_ptr + place, mask=mask, other=0).to(tl.int32)

    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    shortcut_product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for pixel in tl.static_range(WINDOW * WINDOW):
        offset = corner + (pixel // WINDOW * width + pixel % WINDOW) * C
        centred = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        e = tl.where(mask, _active(grad, y, index, centred, scale, shift, pixel, MAX), 0.0)
        total += e
        product += e * tl.where(mask, centred, 0.0)
        if shortcut_ptr is not None:
            shortcut = tl.load(shortcut_ptr + offset, mask=mask, other=0.0).to(tl.float32) - shortcut_mean[None, :]
            shortcut_product += e * tl.where(mask, shortcut, 0.0)
    sums: tl.constexpr = 2 if shortcut_ptr is None else 3
    partial = partial_ptr + tile.to(tl.int64) * sums * C + channel
    tl.store(partial, tl.sum(total, axis=0), mask=known)
    tl.store(partial + C, tl.sum(product, axis=0), mask=known)
    if shortcut_ptr is not None:
        tl.store(partial + 2 * C, tl.sum(shortcut_product, axis=0), mask=known)


@triton.jit(do_not_specialize=["num_groups", "pixels", "tiles"])
def _lines_kernel(
    partial_ptr,  # (G, tiles, BRANCHES + 1, C)
    affine_ptr,  # (BRANCHES, 2, C) with one group, or None
    stats_ptr,  # (BRANCHES, 2, G, C)
    lines_ptr,  # like stats: scale * mean(e), and scale * rstd^2 * mean(e * centred), over the pixels of the group
    daffine_ptr,  # like affine, or None
    num_groups,
    pixels,
    tiles,
    C: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    branch = tl.program_id(2)
    known = channel < C
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        rows = partial_ptr + (group * tiles + tile)[:, None] * (BRANCHES + 1) * C + channel[None, :]
        mask = (tile < tiles)[:, None] & known[None, :]
        total += tl.sum(tl.load(rows, mask=mask, other=0.0), axis=0)
        product += tl.sum(tl.load(rows + (1 + branch) * C, mask=mask, other=0.0), axis=0)
    other = num_groups.to(tl.int64) * C
    place = 2 * branch * other + group * C + channel
    rstd = tl.load(stats_ptr + other + place, mask=known, other=0.0)
    scale = rstd
    if affine_ptr is not None:
        at = 2 * branch * C + channel
        scale *= tl.load(affine_ptr + at, mask=known, other=0.0)
        tl.store(daffine_ptr + at, product * rstd, mask=known)
        tl.store(daffine_ptr + C + at, total, mask=known)
    share = tl.div_rn(scale, tl.zeros_like(scale) + pixels.to(tl.float32))
    tl.store(lines_ptr + place, total * share, mask=known)
    tl.store(lines_ptr + other + place, product * rstd * rstd * share, mask=known)


@triton.jit
def _input_gradient(e, centred, stats, affine_ptr, lines, other, channel, known):
    """scale * (e - mean(e) - xhat * mean(e * xhat)); stats, lines: pointers to the channels' means, constants."""
    scale = _scale(stats + other, affine_ptr, channel, known)
    constant = tl.load(lines, mask=known, other=0.0)
    linear = tl.load(lines + other, mask=known, other=0.0)
    return scale[None, :] * e - constant[None, :] - centred * linear[None, :]


@triton.jit(do_not_specialize=["num_groups", "images", "height", "width", "tiles"])
def _input_gradients_kernel(
    grad_ptr,  # these seven as in _gradient_sums_kernel
    y_ptr,
    index_ptr,
    x_ptr,
    shortcut_ptr,
    affine_ptr,
    stats_ptr,
    lines_ptr,  # like stats
    dx_ptr,  # like x
    dshortcut_ptr,  # like x, or None: no shortcut, not even a plain one
    num_groups,
    images,
    height,
    width,
    tiles,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, group, channel, corner, place, mask = _window(
        tl.program_id(0), tiles, images, height, width, C, WINDOW, BLOCK_P, BLOCK_C
    )
    known = channel < C
    stats = stats_ptr + group * C + channel
    lines = lines_ptr + group * C + channel
    other = num_groups.to(tl.int64) * C
    mean = tl.load(stats, mask=known, other=0.0)
    scale = _scale(stats + other, affine_ptr, channel, known)
    shift = None
    if affine_ptr is not None:
        shift = tl.load(affine_ptr + C + channel, mask=known, other=0.0)
    if shortcut_ptr is not None:
        shortcut_mean = tl.load(stats + 2 * other, mask=known, other=0.0)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = None
    if y_ptr is not None:
        y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    index = None
    if index_ptr is not None:
        index = tl.load(index_ptr + place, mask=mask, other=0).to(tl.int32)

    for pixel in tl.static_range(WINDOW * WINDOW):
        offset = corner + (pixel // WINDOW * width + pixel % WINDOW) * C
        centred = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        e = _active(grad, y, index, centred, scale, shift, pixel, MAX)
        dx = _input_gradient(e, centred, stats, affine_ptr, lines, other, channel, known)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dshortcut_ptr is not None:
            if shortcut_ptr is not None:
                centred = tl.load(shortcut_ptr + offset, mask=mask, other=0.0).to(tl.float32) - shortcut_mean[None, :]
                shortcut_affine = None if affine_ptr is None else affine_ptr + 2 * C
                e = _input_gradient(
                    e, centred, stats + 2 * other, shortcut_affine, lines + 2 * other, other, channel, known
                )
            tl.store(dshortcut_ptr + offset, e.to(dshortcut_ptr.dtype.element_ty), mask=mask)


def launch_norm_relu(
    x: torch.Tensor,
    shortcut: torch.Tensor | None,
    affine: torch.Tensor | None,
    y: torch.Tensor,
    stats: torch.Tensor,
    index: torch.Tensor | None,
    pool: str | None,
) -> None:
    num_groups = stats.shape[2]
    launch_batch_statistics(x, num_groups, stats[0])
    shortcut_stats = None
    if shortcut is not None and len(stats) == 2:
        shortcut_stats = stats[1]
        launch_batch_statistics(shortcut, num_groups, shortcut_stats)
    full, pooled = (y, None) if pool is None else (None, y)
    launch_bn_add_relu_pool(x, stats[0], shortcut, shortcut_stats, full, pooled, pool or "max", index, affine)


def launch_norm_relu_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    x: torch.Tensor,
    shortcut: torch.Tensor | None,
    affine: torch.Tensor | None,
    stats: torch.Tensor,
    index: torch.Tensor | None,
    pool: str | None,
    dx: torch.Tensor,
    dshortcut: torch.Tensor | None,
    daffine: torch.Tensor | None,
) -> None:
    branches, _, num_groups, channels = stats.shape
    images, height, width = len(x) // num_groups, *x.shape[2:]
    window = 1 if pool is None else 2
    block_c = min(max(16, triton.next_power_of_2(channels)), MAX_CHANNELS)
    block_p = TILE[window] // block_c
    tiles = triton.cdiv(images * (height // window) * (width // window), block_p)
    partials = stats.new_empty((num_groups, tiles, branches + 1, channels))
    lines = torch.empty_like(stats)
    sizes = (num_groups, images, height, width, tiles)
    blocks = {
        "C": channels, "WINDOW": window, "MAX": pool != "avg", "BLOCK_P": block_p, "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
    }  # fmt: skip
    grid = (num_groups * tiles * triton.cdiv(channels, block_c),)
    sums_c = min(max(16, triton.next_power_of_2(channels)), SUMS_CHANNELS)
    sums_t = min(SUMS_TILE // sums_c, triton.next_power_of_2(tiles))
    with torch.cuda.device_of(x):
        _gradient_sums_kernel[grid](grad, y, index, x, shortcut, affine, stats, partials, *sizes, **blocks)
        _lines_kernel[(num_groups, triton.cdiv(channels, sums_c), branches)](
            partials, affine, stats, lines, daffine, num_groups, images * height * width, tiles,
            C=channels, BRANCHES=branches, BLOCK_T=sums_t, BLOCK_C=sums_c, num_warps=NUM_WARPS,
        )  # fmt: skip
        _input_gradients_kernel[grid](
            grad, y, index, x, shortcut, affine, stats, lines, dx, dshortcut, *sizes, **blocks
        )  # fmt: skip
