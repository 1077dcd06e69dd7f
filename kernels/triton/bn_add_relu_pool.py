"""BatchNorm, shortcut, ReLU and 2x2 pooling in one read of the inputs, for `bmsn.ops.bn_add_relu_pool`
and, with an affine step and an index for the backward pass, for `bmsn.ops.norm_relu`.

A program takes BLOCK_P windows of one group and BLOCK_C channels. A window is a pixel, or the four pixels of a 2x2
window where the map is pooled; either way each input element is read once and each output element written once.
"""

import torch
import triton
import triton.language as tl

# Values of one pixel of all windows of a program, and the most channels. Estimates, still to be measured on a GPU:
# bound by memory, so a thread shall have some 16 to 64 bytes of each input in flight.
TILE, MAX_CHANNELS = {1: 4096, 2: 1024}, 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_groups", "images", "height", "width", "tiles"])
def _bn_add_relu_pool_kernel(
    y_ptr,  # (G, images, height, width, C)
    stats_ptr,  # (2, G, C)
    shortcut_ptr,  # like y, or None
    shortcut_stats_ptr,  # (2, G, C), or None: the shortcut as it is
    full_ptr,  # like y, or None
    pooled_ptr,  # (G, images, height / 2, width / 2, C), or None, and then WINDOW is 1
    index_ptr,  # like pooled in uint8: which of each four the maximum is, the first of equal ones; with a mean four
    # bits, which of them are positive (or NaN); or None
    affine_ptr,  # (1 or 2, 2, C) with one group, weight and bias, then the shortcut's where it has statistics; or None
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
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    tile, channel = program // channel_blocks, program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    group = (tile // tiles).to(tl.int64)
    known = channel < C
    rows, columns = height // WINDOW, width // WINDOW
    windows = images * rows * columns
    window = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # (BLOCK_P,) within the group
    mask = (window < windows)[:, None] & known[None, :]

    stats = group * C + channel
    other = num_groups.to(tl.int64) * C  # from means to rstds
    mean = tl.load(stats_ptr + stats, mask=known, other=0.0)
    rstd = tl.load(stats_ptr + other + stats, mask=known, other=0.0)
    if shortcut_stats_ptr is not None:
        shortcut_mean = tl.load(shortcut_stats_ptr + stats, mask=known, other=0.0)
        shortcut_rstd = tl.load(shortcut_stats_ptr + other + stats, mask=known, other=0.0)
    if affine_ptr is not None:
        rstd *= tl.load(affine_ptr + channel, mask=known, other=0.0)
        shift = tl.load(affine_ptr + C + channel, mask=known, other=0.0)
        if shortcut_stats_ptr is not None:
            shortcut_rstd *= tl.load(affine_ptr + 2 * C + channel, mask=known, other=0.0)
            shift += tl.load(affine_ptr + 3 * C + channel, mask=known, other=0.0)

    row, column = window // columns, window % columns  # row: of all images of the group
    corner = ((group * images * height + row * WINDOW) * width + column * WINDOW)[:, None] * C + channel[None, :]
    pool = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    index = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    for pixel in tl.static_range(WINDOW * WINDOW):
        offset = corner + (pixel // WINDOW * width + pixel % WINDOW) * C
        z = (tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        if shortcut_ptr is not None:
            shortcut = tl.load(shortcut_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            if shortcut_stats_ptr is not None:
                shortcut = (shortcut - shortcut_mean[None, :]) * shortcut_rstd[None, :]
            z += shortcut
        if affine_ptr is not None:
            z += shift[None, :]
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y_ptr.dtype.element_ty)
        if full_ptr is not None:
            tl.store(full_ptr + offset, z, mask=mask)
        if index_ptr is not None:
            if MAX:
                index = tl.where(z.to(tl.float32) > pool, pixel, index)
            else:
                index += tl.where(z.to(tl.float32) <= 0, 0, 1 << pixel)
        if MAX:  # from 0, which no value after ReLU is below
            pool = tl.maximum(pool, z.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        else:
            pool += z.to(tl.float32)
    if pooled_ptr is not None:
        if not MAX:
            pool *= 0.25
        place = (group * windows + window)[:, None] * C + channel[None, :]
        tl.store(pooled_ptr + place, pool.to(pooled_ptr.dtype.element_ty), mask=mask)
        if index_ptr is not None:
            tl.store(index_ptr + place, index.to(tl.uint8), mask=mask)


def launch_bn_add_relu_pool(
    y: torch.Tensor,
    stats: torch.Tensor,
    shortcut: torch.Tensor | None,
    shortcut_stats: torch.Tensor | None,
    full: torch.Tensor | None,
    pooled: torch.Tensor | None,
    pool: str,
    index: torch.Tensor | None = None,
    affine: torch.Tensor | None = None,
) -> None:
    num_groups, channels = stats.shape[1:]
    images, height, width = len(y) // num_groups, *y.shape[2:]
    window = 1 if pooled is None else 2
    block_c = min(max(16, triton.next_power_of_2(channels)), MAX_CHANNELS)
    block_p = TILE[window] // block_c
    tiles = triton.cdiv(images * (height // window) * (width // window), block_p)
    with torch.cuda.device_of(y):
        _bn_add_relu_pool_kernel[(num_groups * tiles * triton.cdiv(channels, block_c),)](
            y,
            stats,
            shortcut,
            shortcut_stats,
            full,
            pooled,
            index,
            affine,
            num_groups,
            images,
            height,
            width,
            tiles,
            C=channels,
            WINDOW=window,
            MAX=pool == "max",
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            num_warps=NUM_WARPS,
        )
