"""Mean and rstd of every (group, channel): partial statistics of tiles, merged in fixed order, without float atomics.

A tile is BLOCK_M consecutive pixels of one group; the last one of a group may be shorter. Its partial statistics are
mean and M2 (the sum of squared distances from that mean) of each channel: `store_partial`, the end of every kernel that
produces a map. `_finalise_kernel` merges a group's tiles with Chan's formula. Nothing is squared before a mean is taken
off it, so 262,144 values of mean 1000 and variance 1 lose nothing.

Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

import torch
import triton
import triton.language as tl

from bmsn.ops.norm_relu import EPS

# Estimates, still to be measured on a GPU: tiles of some 8,192 values in `batch_statistics`, of 4,096 numbers in the
# merge, where few programs read long columns and want many loads in flight.
STATISTICS_TILE, STATISTICS_CHANNELS = 8192, 128
MERGE_TILE, MERGE_CHANNELS = 4096, 64
NUM_WARPS = 4


@triton.jit
def store_partial(values, valid, count, partial_ptr, channel, C: tl.constexpr):
    """values (BLOCK_M, BLOCK_C) float32, of which `count` rows are `valid`; partial_ptr: the tile's (2, C) numbers."""
    mean = tl.sum(tl.where(valid[:, None], values, 0.0), axis=0) / count
    centred = tl.where(valid[:, None], values - mean[None, :], 0.0)
    # the first sum rounds at the size of the values; this one, of the differences, at the size of their spread
    rest = tl.sum(centred, axis=0) / count
    m2 = tl.sum(centred * centred, axis=0) - count * rest * rest
    tl.store(partial_ptr + channel, mean + rest, mask=channel < C)
    tl.store(partial_ptr + C + channel, m2, mask=channel < C)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _batch_statistics_kernel(
    x_ptr,  # (G, pixels, C)
    partial_ptr,  # (G, tiles, 2, C)
    pixels,
    tiles,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile, channel = program // channel_blocks, program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    group, start = tile // tiles, tile % tiles * BLOCK_M
    pixel = start + tl.arange(0, BLOCK_M)
    valid = pixel < pixels
    offset = (group.to(tl.int64) * pixels + pixel)[:, None] * C + channel[None, :]
    values = tl.load(x_ptr + offset, mask=valid[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)
    count = tl.minimum(BLOCK_M, pixels - start).to(tl.float32)
    store_partial(values, valid, count, partial_ptr + tile.to(tl.int64) * 2 * C, channel, C)


@triton.jit(do_not_specialize=["pixels", "tiles", "num_groups"])
def _finalise_kernel(
    partial_ptr,  # (G, tiles, 2, C)
    stats_ptr,  # (2, G, C)
    pixels,
    tiles,
    num_groups,
    eps,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        there = tile < tiles
        counts = tl.where(there, tl.minimum(BLOCK_M, pixels - tile * BLOCK_M), 0).to(tl.float32)
        rows = partial_ptr + (group.to(tl.int64) * tiles + tile)[:, None] * 2 * C + channel[None, :]
        mask = there[:, None] & known[None, :]
        means = tl.load(rows, mask=mask, other=0.0)
        block_count = tl.sum(counts, axis=0)
        block_mean = tl.sum(counts[:, None] * means, axis=0) / block_count
        block_mean += tl.sum(counts[:, None] * (means - block_mean[None, :]), axis=0) / block_count
        apart = means - block_mean[None, :]
        squares = tl.load(rows + C, mask=mask, other=0.0) + counts[:, None] * apart * apart
        delta = block_mean - mean
        total = count + block_count
        mean += delta * (block_count / total)
        m2 += tl.sum(squares, axis=0) + delta * delta * (count * block_count / total)
        count = total
    place = group.to(tl.int64) * C + channel
    tl.store(stats_ptr + place, mean, mask=known)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, count) + eps))
    tl.store(stats_ptr + num_groups.to(tl.int64) * C + place, rstd, mask=known)


def empty_partials(x: torch.Tensor, num_groups: int, tiles: int, channels: int) -> torch.Tensor:
    """(G, tiles, 2, C) float32: what the tiles of a map of `channels` leave for `finalise`."""
    return torch.empty((num_groups, tiles, 2, channels), dtype=torch.float32, device=x.device)


def finalise(partials: torch.Tensor, pixels: int, block_m: int, stats: torch.Tensor) -> None:
    """Merges `partials` of tiles of `block_m` pixels, `pixels` in each group, into `stats` (2, G, C)."""
    num_groups, tiles, _, channels = partials.shape
    block_c = min(max(16, triton.next_power_of_2(channels)), MERGE_CHANNELS)
    block_t = min(MERGE_TILE // block_c, triton.next_power_of_2(tiles))
    with torch.cuda.device_of(partials):
        _finalise_kernel[(num_groups, triton.cdiv(channels, block_c))](
            partials,
            stats,
            pixels,
            tiles,
            num_groups,
            EPS,
            C=channels,
            BLOCK_M=block_m,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            num_warps=NUM_WARPS,
        )


def launch_batch_statistics(x: torch.Tensor, num_groups: int, stats: torch.Tensor) -> None:
    channels, pixels = x.shape[1], len(x) // num_groups * x.shape[2] * x.shape[3]
    block_c = min(max(16, triton.next_power_of_2(channels)), STATISTICS_CHANNELS)
    block_m = STATISTICS_TILE // block_c
    tiles = triton.cdiv(pixels, block_m)
    partials = empty_partials(x, num_groups, tiles, channels)
    with torch.cuda.device_of(x):
        _batch_statistics_kernel[(num_groups * tiles * triton.cdiv(channels, block_c),)](
            x, partials, pixels, tiles, C=channels, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=NUM_WARPS
        )
    finalise(partials, pixels, block_m, stats)
