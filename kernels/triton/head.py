"""Global average, linear layer, argmax and count of hits, for `bmsn.ops.head`.

A program takes BLOCK_B images of one group: it averages BLOCK_C channels at a time and multiplies them with the weights
of all classes at once, so that an image's logits never leave its program. Counts are added as integers: in any order
they are the same.
"""

import torch
import triton
import triton.language as tl

# Images of a program (the smallest that a product takes) and channels of one product, by the padded number of classes.
# Estimates, still to be measured on a GPU: what counts is to have many programs, each reading whole lines.
BLOCK_B = 16
BLOCK_C = {16: 64, 32: 64, 64: 64, 128: 32}
MANY_CLASSES_BLOCK_C = 16  # above 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["images", "pixels", "tiles"])
def _head_kernel(
    x_ptr,  # (G, images, pixels, C)
    labels_ptr,  # (images,)
    weight_ptr,  # (S, K, C), weight_stride apart
    bias_ptr,  # (S, K), bias_stride apart
    weight_index_ptr,  # (G,), or None: 0
    correct_ptr,  # (G,), zeros
    images,
    pixels,
    tiles,
    weight_stride,
    bias_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // tiles
    image = program % tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    valid = image < images
    k = tl.arange(0, BLOCK_K)
    weights = weight_ptr
    biases = bias_ptr
    if weight_index_ptr is not None:
        row = tl.load(weight_index_ptr + group).to(tl.int64)
        weights += row * weight_stride
        biases += row * bias_stride

    x_rows = x_ptr + (group.to(tl.int64) * images + image) * pixels * C
    logits = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        mask = valid[:, None] & (c < C)[None, :]
        values = x_rows[:, None] + c[None, :]
        for _ in range(pixels):
            total += tl.load(values, mask=mask, other=0.0).to(tl.float32)
            values += C
        b = tl.load(weights + k[None, :] * C + c[:, None], mask=(k < K)[None, :] & (c < C)[:, None], other=0.0)
        logits = tl.dot(total / pixels, b, logits, input_precision="ieee")
    logits += tl.load(biases + k, mask=k < K, other=0.0)[None, :]

    # torch.argmax: the first NaN if there is one, else the first maximum (what pads the classes comes after all)
    nan = (logits != logits) & (k < K)[None, :]
    largest = tl.max(tl.where(nan | (k >= K)[None, :], float("-inf"), logits), axis=1)
    hit = tl.where((tl.max(nan.to(tl.int32), axis=1) > 0)[:, None], nan, logits == largest[:, None])
    predicted = tl.min(tl.where(hit, k[None, :], BLOCK_K), axis=1)
    label = tl.load(labels_ptr + image, mask=valid, other=-1)  # -1 is predicted for none
    correct = tl.sum((predicted == label).to(tl.int64), axis=0)
    tl.atomic_add(correct_ptr + group, correct, sem="relaxed")


def launch_head(
    x: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    weight_index: torch.Tensor | None,
    correct: torch.Tensor,
) -> None:
    channels, classes, images = x.shape[1], weight.shape[1], len(labels)
    block_k = max(16, triton.next_power_of_2(classes))
    tiles = triton.cdiv(images, BLOCK_B)
    correct.zero_()
    with torch.cuda.device_of(x):
        _head_kernel[(num_groups * tiles,)](
            x,
            labels,
            weight,
            bias,
            weight_index,
            correct,
            images,
            x.shape[2] * x.shape[3],
            tiles,
            weight.stride(0),
            bias.stride(0),
            C=channels,
            K=classes,
            BLOCK_B=BLOCK_B,
            BLOCK_C=min(max(16, triton.next_power_of_2(channels)), BLOCK_C.get(block_k, MANY_CLASSES_BLOCK_C)),
            BLOCK_K=block_k,
            num_warps=NUM_WARPS,
        )
