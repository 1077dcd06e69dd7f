"""Implicit-GEMM convolution of stacked states on NHWC maps, for `bmsn.ops.conv_bn`.

A program computes BLOCK_M output pixels of one group times BLOCK_N output channels: for each tap of the kernel a
product of the (BLOCK_M, IN) shifted pixels and the tap's (IN, BLOCK_N) weights, summed in float32. On load pixels are
normalised, ReLU'd and rounded, and those outside the map are 0 after that. On store the tile leaves its partial
statistics, or is scaled, shifted, added to and ReLU'd. A group is a whole number of tiles, so a tile has one set of
weights and statistics, and a group's result does not depend on the other groups.

Taps are unrolled and the loop over IN is the only one: flattened into one loop over (tap, IN) with 8 warps, such
kernels have been miscompiled silently for H100. Channels are constants of a compilation, sizes of batches and maps are
not.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bmsn.kernels.statistics import empty_partials, finalise, store_partial


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int  # input channels of one product; fewer where the map has fewer
    num_warps: int  # at most 4, see above
    num_stages: int


# (bytes of an element, does a shortcut ride along) -> one configuration for each width of the output, narrowest first;
# the last one also serves what is wider. Estimates, still to be measured on a GPU. What is known of them is what
# compiling them says (sm_90, bfloat16): with 64 channels a product instead of 32, 128 x 64 takes all 255 registers of a
# thread instead of 176, and 128 x 128, or 128 x 64 with a shortcut, spills. float32 multiplies without tensor cores
# (IEEE, not TF32): smaller tiles.
CONFIGS = {
    (2, False): (
        Config(128, 16, 32, 4, 2),
        Config(128, 32, 32, 4, 2),
        Config(128, 64, 32, 4, 3),
        Config(64, 128, 32, 4, 3),
    ),
    (2, True): (Config(128, 16, 32, 4, 2), Config(128, 32, 32, 4, 2), Config(64, 64, 32, 4, 3)),
    (4, False): (Config(64, 16, 32, 4, 2), Config(64, 32, 16, 4, 2)),
    (4, True): (Config(64, 16, 16, 4, 2), Config(64, 32, 16, 4, 2)),
}


def config_for(itemsize: int, shortcut: bool, out_channels: int) -> Config:
    configs = CONFIGS[itemsize, shortcut]
    return next((config for config in configs if config.block_n >= out_channels), configs[-1])


@triton.jit
def _store_branch(acc, tile, count, valid, channel, offset, y_ptr, partial_ptr, OUT: tl.constexpr):
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (channel < OUT)[None, :])
    if partial_ptr is not None:
        store_partial(acc, valid, count, partial_ptr + tile.to(tl.int64) * 2 * OUT, channel, OUT)


@triton.jit(do_not_specialize=["num_groups", "images", "height", "width", "out_height", "out_width", "tiles"])
def _conv_kernel(
    x_ptr,  # (G, images, height, width, IN)
    weight_ptr,  # (S, OUT, KERNEL, KERNEL, IN), weight_stride apart
    y_ptr,  # (G, images, out_height, out_width, OUT)
    weight_index_ptr,  # (G,), or None: 0
    in_stats_ptr,  # (2, G, IN), or None: x as it is
    partial_ptr,  # (G, tiles, 2, OUT), or None: no statistics
    shortcut_weight_ptr,  # (S, OUT, IN), shortcut_weight_stride apart, or None: no second convolution
    shortcut_ptr,  # its result, like y
    shortcut_partial_ptr,  # like partial
    scale_ptr,  # (G, OUT), or None: no scale and shift
    shift_ptr,
    added_ptr,  # like y, or None
    num_groups,
    images,
    height,
    width,
    out_height,
    out_width,
    tiles,
    weight_stride,
    shortcut_weight_stride,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channel_blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    # blocks of channels of one tile come next to each other, so that all but the first find its pixels in L2
    program = tl.program_id(0)
    tile, channel = program // channel_blocks, program % channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    group, start = tile // tiles, tile % tiles * BLOCK_M
    pixels = images * out_height * out_width
    pixel = start + tl.arange(0, BLOCK_M)  # (BLOCK_M,) within the group
    valid = pixel < pixels
    image, place = pixel // (out_height * out_width), pixel % (out_height * out_width)
    top = place // out_width * STRIDE - KERNEL // 2
    left = place % out_width * STRIDE - KERNEL // 2
    corner = ((group.to(tl.int64) * images + image) * height + top) * width + left  # may lie outside; then not read
    x_rows = x_ptr + corner * IN

    weights = weight_ptr
    shortcut_weights = shortcut_weight_ptr
    if weight_index_ptr is not None:
        row = tl.load(weight_index_ptr + group).to(tl.int64)
        weights += row * weight_stride
        if shortcut_weight_ptr is not None:
            shortcut_weights += row * shortcut_weight_stride

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shortcut_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        down = tap // KERNEL
        right = tap % KERNEL
        inside = valid & (top + down >= 0) & (top + down < height) & (left + right >= 0) & (left + right < width)
        for first in range(0, IN, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (k < IN)[None, :]
            a = tl.load(x_rows[:, None] + ((down * width + right) * IN + k)[None, :], mask=mask, other=0.0)
            if in_stats_ptr is not None:
                in_stats = in_stats_ptr + group.to(tl.int64) * IN + k
                mean = tl.load(in_stats, mask=k < IN, other=0.0)
                rstd = tl.load(in_stats + num_groups.to(tl.int64) * IN, mask=k < IN, other=0.0)
                normed = (a.to(tl.float32) - mean[None, :]) * rstd[None, :]
                normed = tl.maximum(normed, 0.0, propagate_nan=tl.PropagateNan.ALL)
                a = tl.where(inside[:, None], normed, 0.0).to(x_ptr.dtype.element_ty)
            weight_mask = (k < IN)[:, None] & (channel < OUT)[None, :]
            offsets = channel[None, :] * (KERNEL * KERNEL * IN) + tap * IN + k[:, None]
            b = tl.load(weights + offsets, mask=weight_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if shortcut_weight_ptr is not None and tap == KERNEL * KERNEL // 2:  # the tap of a 1x1 convolution
                b = tl.load(shortcut_weights + channel[None, :] * IN + k[:, None], mask=weight_mask, other=0.0)
                shortcut_acc = tl.dot(a, b, shortcut_acc, input_precision="ieee")

    count = tl.minimum(BLOCK_M, pixels - start).to(tl.float32)
    offset = (group.to(tl.int64) * pixels + pixel)[:, None] * OUT + channel[None, :]
    if scale_ptr is not None:
        affine = group.to(tl.int64) * OUT + channel
        scale = tl.load(scale_ptr + affine, mask=channel < OUT, other=0.0)
        shift = tl.load(shift_ptr + affine, mask=channel < OUT, other=0.0)
        acc = acc * scale[None, :] + shift[None, :]
        if added_ptr is not None:
            acc += tl.load(added_ptr + offset, mask=valid[:, None] & (channel < OUT)[None, :], other=0.0).to(tl.float32)
        if RELU:
            acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    _store_branch(acc, tile, count, valid, channel, offset, y_ptr, partial_ptr, OUT)
    if shortcut_weight_ptr is not None:
        _store_branch(shortcut_acc, tile, count, valid, channel, offset, shortcut_ptr, shortcut_partial_ptr, OUT)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    num_groups: int,
    weight_index: torch.Tensor | None,
    stride: int,
    y: torch.Tensor,
    config: Config,
    in_stats: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    shortcut_weight: torch.Tensor | None = None,
    shortcut: torch.Tensor | None = None,
    shortcut_partials: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    relu: bool = False,
) -> None:
    images, channels, height, width = len(x) // num_groups, *x.shape[1:]
    out_channels, out_height, out_width = y.shape[1:]
    tiles = triton.cdiv(images * out_height * out_width, config.block_m)
    with torch.cuda.device_of(x):
        _conv_kernel[(num_groups * tiles * triton.cdiv(out_channels, config.block_n),)](
            x,
            weight,
            y,
            weight_index,
            in_stats,
            partials,
            shortcut_weight,
            shortcut,
            shortcut_partials,
            scale,
            shift,
            added,
            num_groups,
            images,
            height,
            width,
            out_height,
            out_width,
            tiles,
            weight.stride(0),
            0 if shortcut_weight is None else shortcut_weight.stride(0),
            IN=channels,
            OUT=out_channels,
            KERNEL=weight.shape[-1],
            STRIDE=stride,
            RELU=relu,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=min(max(16, triton.next_power_of_2(channels)), config.block_k),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def launch_conv_bn(
    x: torch.Tensor,
    weight: torch.Tensor,
    num_groups: int,
    in_stats: torch.Tensor | None,
    weight_index: torch.Tensor | None,
    stride: int,
    shortcut_weight: torch.Tensor | None,
    y: torch.Tensor,
    stats: torch.Tensor,
    shortcut: torch.Tensor | None = None,
    shortcut_stats: torch.Tensor | None = None,
) -> None:
    config = config_for(x.element_size(), shortcut_weight is not None, y.shape[1])
    pixels = len(y) // num_groups * y.shape[2] * y.shape[3]
    tiles = triton.cdiv(pixels, config.block_m)
    partials = empty_partials(y, num_groups, tiles, y.shape[1])
    shortcut_partials = None if shortcut is None else torch.empty_like(partials)
    _launch(
        *(x, weight, num_groups, weight_index, stride, y, config),
        in_stats=in_stats,
        partials=partials,
        shortcut_weight=shortcut_weight,
        shortcut=shortcut,
        shortcut_partials=shortcut_partials,
    )
    finalise(partials, pixels, config.block_m, stats)
    if shortcut_partials is not None and shortcut_stats is not None:
        finalise(shortcut_partials, pixels, config.block_m, shortcut_stats)


def launch_conv_scale(
    x: torch.Tensor,
    weight: torch.Tensor,
    num_groups: int,
    scale: torch.Tensor,
    shift: torch.Tensor,
    relu: bool,
    added: torch.Tensor | None,
    weight_index: torch.Tensor | None,
    stride: int,
    y: torch.Tensor,
) -> None:
    config = config_for(x.element_size(), False, y.shape[1])
    _launch(*(x, weight, num_groups, weight_index, stride, y, config), scale=scale, shift=shift, added=added, relu=relu)
