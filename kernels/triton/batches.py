"""Gather, crop, flip, normalise and cast of a whole batch, for `bmsn.ops.batches`.

A program takes BLOCK consecutive values of one output image (NHWC), and draws that image's crop for itself: ten rounds
of Philox on scalars cost less than a launch of their own and a trip through memory.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # values: a CIFAR image is three programs. An estimate, still to be measured on a GPU
NUM_WARPS = 4


@triton.jit(do_not_specialize=["steps_per_epoch", "key"])
def _augment_kernel(
    images_ptr,  # (N, H, W, C) uint8
    labels_ptr,  # (N,) int64, or None
    order_ptr,  # (steps_per_epoch * B,) int64
    table_ptr,  # (256, C)
    step_ptr,  # () int64
    pixels_ptr,  # (B, H, W, C)
    chosen_ptr,  # (B,) int64, or None
    steps_per_epoch,
    key,
    H,
    W,
    C: tl.constexpr,
    CROP: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    step = tl.load(step_ptr)
    index = tl.load(order_ptr + step % steps_per_epoch * tl.num_programs(0) + image)
    if labels_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(chosen_ptr + image, tl.load(labels_ptr + index))

    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) flat HWC
    c, x, y = e % C, e // C % W, e // (C * W)
    if CROP:
        low, high = (step & 0xFFFFFFFF).to(tl.uint32), (step >> 32).to(tl.uint32)
        first, second, third, _ = tl.philox(key, image.to(tl.uint32), low, high, tl.zeros_like(low))
        PLACES: tl.constexpr = 2 * PADDING + 1
        top = (first.to(tl.uint64) * PLACES >> 32).to(tl.int32)
        left = (second.to(tl.uint64) * PLACES >> 32).to(tl.int32)
        flip = (third >> 31) == 1
        x = tl.where(flip, W - 1 - x, x) + left - PADDING
        y = y + top - PADDING
    valid = e < H * W * C
    inside = valid & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    size = H * W * C  # of one image: fits in int32, all of them together do not
    value = tl.load(images_ptr + index * size + (y * W + x) * C + c, mask=inside, other=0).to(tl.int32)
    out = tl.load(table_ptr + value * C + c, mask=inside, other=0.0)
    tl.store(pixels_ptr + image.to(tl.int64) * size + e, out, mask=valid)


def launch_augment(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    order: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    key: int,
    crop: bool,
    padding: int,
    pixels: torch.Tensor,
    chosen: torch.Tensor,
) -> None:
    batch_size, channels, height, width = pixels.shape
    with torch.cuda.device_of(images):
        _augment_kernel[(batch_size, triton.cdiv(height * width * channels, BLOCK))](
            images,
            labels,
            order,
            table,
            step,
            pixels,
            None if labels is None else chosen,
            len(order) // batch_size,
            key,
            height,
            width,
            C=channels,
            CROP=crop,
            PADDING=padding,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
