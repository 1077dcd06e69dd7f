"""Softmax cross-entropy, count and gradient, for `bmsn.ops.cross_entropy`.

A program takes BLOCK_N images with all their classes: their logits are read once and never leave it. It leaves its sum
of losses and its count, and one more program adds these up in the order of the images: no float atomics.
"""

import torch
import triton
import triton.language as tl

# Logits of a program, at most; what one program adds up at a time. Estimates, still to be measured on a GPU: 128 images
# of 10 classes are 2 programs, and what counts is the latency of a launch.
TILE, TOTAL = 1024, 256
NUM_WARPS = 4


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (images, K)
    labels_ptr,  # (images,)
    partial_ptr,  # (tiles,)
    counts_ptr,  # (tiles,)
    gradient_ptr,  # like logits
    images,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = image < images
    valid = there[:, None] & (k < K)[None, :]
    place = image.to(tl.int64)[:, None] * K + k[None, :]
    label = tl.load(labels_ptr + image, mask=there, other=0)
    z = tl.load(logits_ptr + place, mask=valid, other=float("-inf"))

    # torch.argmax: the first NaN if there is one, else the first maximum (what pads the classes comes after all)
    nan = (z != z) & valid
    any_nan = tl.max(nan.to(tl.int32), axis=1) > 0
    top = tl.max(tl.where(nan, float("-inf"), z), axis=1)
    hit = tl.where(any_nan[:, None], nan, (z == top[:, None]) & (k < K)[None, :])
    predicted = tl.min(tl.where(hit, k[None, :], BLOCK_K), axis=1)

    centred = tl.where(valid, z - top[:, None], float("-inf"))
    e = tl.exp(centred)
    total = tl.sum(e, axis=1)
    known = (label >= 0) & (label < K)
    own = k[None, :] == label[:, None]
    share = tl.div_rn(e, (total * images)[:, None])
    # of the label itself p - 1 is the sum of the others, negated: near p = 1 a difference would keep no digit
    others = tl.sum(tl.where(own, 0.0, share), axis=1)
    gradient = tl.where(known[:, None], tl.where(own, -others[:, None], share), 0.0)
    tl.store(gradient_ptr + place, gradient, mask=valid)
    loss = tl.log(total) - tl.sum(tl.where(own, centred, 0.0), axis=1)
    loss = tl.where(known, loss, float("nan"))
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(there, loss, 0.0), axis=0))
    tl.store(counts_ptr + tl.program_id(0), tl.sum((there & (predicted == label)).to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["images", "tiles"])
def _total_kernel(partial_ptr, counts_ptr, loss_ptr, correct_ptr, images, tiles, TOTAL: tl.constexpr):
    loss = tl.zeros((TOTAL,), tl.float32)
    count = tl.zeros((TOTAL,), tl.int64)
    for first in range(0, tiles, TOTAL):
        tile = first + tl.arange(0, TOTAL)
        loss += tl.load(partial_ptr + tile, mask=tile < tiles, other=0.0)
        count += tl.load(counts_ptr + tile, mask=tile < tiles, other=0)
    tl.store(loss_ptr, tl.div_rn(tl.sum(loss, axis=0), images.to(tl.float32)))
    tl.store(correct_ptr, tl.sum(count, axis=0))


def launch_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor, correct: torch.Tensor, gradient: torch.Tensor
) -> None:
    images, classes = logits.shape
    block_k = triton.next_power_of_2(classes)
    block_n = max(1, TILE // block_k)
    tiles = triton.cdiv(images, block_n)
    partials, counts = loss.new_empty(tiles), correct.new_empty(tiles)
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(tiles,)](
            logits, labels, partials, counts, gradient, images,
            K=classes, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=NUM_WARPS,
        )  # fmt: skip
        _total_kernel[(1,)](
            partials, counts, loss, correct, images, tiles, TOTAL=TOTAL, num_warps=NUM_WARPS
        )  # fmt: skip
