"""Momentum SGD with weight decay on one row of an arena, for `bmsn.ops.sgd`: every weight is read and written once.

Row, learning rate and loss are read from memory, so that a CUDA graph can be replayed with others. Fused and separate
roundings are those of torch's CPU kernels: hence `tl.fma`, and no contraction by the compiler.
"""

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 1024, 4  # estimates, still to be measured on a GPU: 8 weights a thread, 268 programs for ResNet-20


@triton.jit
def _sgd_kernel(
    weights_ptr,  # (M, size)
    velocity_ptr,  # like weights
    copies_ptr,  # like weights in bfloat16, or None
    gradient_ptr,  # (size,)
    row_ptr,
    lr_ptr,
    loss_ptr,
    size,
    momentum,
    weight_decay,
    BLOCK: tl.constexpr,
):
    loss = tl.load(loss_ptr)
    end = tl.where(loss - loss == 0.0, size, 0)  # nothing is read or written where the loss is not finite
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < end
    offset = tl.load(row_ptr) * size + place  # int64
    lr = tl.load(lr_ptr)
    w = tl.load(weights_ptr + offset, mask=mask, other=0.0)
    g = tl.load(gradient_ptr + place, mask=mask, other=0.0)
    v = tl.load(velocity_ptr + offset, mask=mask, other=0.0)
    v = v * momentum + tl.fma(w, tl.zeros_like(w) + weight_decay, g)
    w = tl.fma(v, tl.zeros_like(v) - lr, w)
    tl.store(velocity_ptr + offset, v, mask=mask)
    tl.store(weights_ptr + offset, w, mask=mask)
    if copies_ptr is not None:
        tl.store(copies_ptr + offset, w.to(copies_ptr.dtype.element_ty), mask=mask)


def launch_sgd(
    weights: torch.Tensor,
    velocity: torch.Tensor,
    copies: torch.Tensor | None,
    gradient: torch.Tensor,
    row: torch.Tensor,
    lr: torch.Tensor,
    loss: torch.Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    size = weights.shape[1]
    with torch.cuda.device_of(weights):
        _sgd_kernel[(triton.cdiv(size, BLOCK),)](
            weights,
            velocity,
            copies,
            gradient,
            row,
            lr,
            loss,
            size,
            momentum,
            weight_decay,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
