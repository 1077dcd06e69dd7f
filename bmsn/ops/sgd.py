"""Momentum SGD with weight decay on one row of an arena, as `torch.optim.SGD` does it, in one pass.

    g = gradient + weight_decay * w        v = momentum * v + g        w = w - lr * v

for w = weights[row], v = velocity[row]; the new w, rounded, goes to copies[row] in the same pass. The row, the learning
rate and the loss, which decides whether anything is done, are read on the device: nothing waits for them.

Bit for bit as torch on the CPU: a product is rounded with the sum it is added to (fused), but for momentum * v.

Source: Sutskever et al. 2013, section 2, in torch's formulation: no dampening, no Nesterov.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import check_dense, loaded_extension

torch.library.define(
    "bmsn::sgd",
    "(Tensor(a!) weights, Tensor(b!) velocity, Tensor(c!)? copies, Tensor gradient, Tensor row, Tensor lr, "
    "Tensor loss, float momentum, float weight_decay, str backend) -> ()",
)


def sgd(
    weights: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    row: Tensor,
    lr: Tensor,
    loss: Tensor,
    *,
    momentum: float,
    weight_decay: float,
    copies: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step on one row; none, and nothing written, where the loss is not finite.

    Args:
        weights: (M, P), contiguous, float32, or float64 (on the reference only). Changed in place.
        velocity: likewise. A row of zeros is a fresh one (torch's first step: velocity = gradient).
        gradient: (P,), likewise, not changed.
        row: () int64, 0..M-1 (not checked on a GPU). Like all that follow, on the device of `weights`.
        lr: (), dtype of `weights`.
        loss: (), dtype of `weights`.
        momentum, weight_decay: of the step.
        copies: (M, P) bfloat16: of the row that is changed it gets the rounded weights.
        backend: auto, reference, cpp or triton. The reference rounds lr * v before it subtracts it.
    Raises:
        InputError: a dtype, shape, layout or device not listed. IndexError: on the CPU, a row that is not there.
    """
    if weights.dtype not in (torch.float32, torch.float64) or weights.ndim != 2 or 0 in weights.shape:
        raise InputError(
            f"weights must be (M, P), none of them 0, float32 or float64 (on the reference only); "
            f"got {tuple(weights.shape)}, {weights.dtype}"
        )
    shape, dtype = tuple(weights.shape), weights.dtype
    check_dense("weights", weights, weights, shape, dtype)
    check_dense("velocity", velocity, weights, shape, dtype)
    check_dense("gradient", gradient, weights, shape[1:], dtype)
    check_dense("row", row, weights, (), torch.int64)
    check_dense("lr", lr, weights, (), dtype)
    check_dense("loss", loss, weights, (), dtype)
    if copies is not None:
        check_dense("copies", copies, weights, shape, torch.bfloat16)
    available = ("reference",) if dtype == torch.float64 else None
    chosen = resolve("sgd", backend, available, weights.device)
    torch.ops.bmsn.sgd(weights, velocity, copies, gradient, row, lr, loss, momentum, weight_decay, chosen)


def sgd_reference(
    weights: Tensor,
    velocity: Tensor,
    copies: Tensor | None,
    gradient: Tensor,
    row: Tensor,
    lr: Tensor,
    loss: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    index = row.view(1)
    w, v = weights.index_select(0, index), velocity.index_select(0, index)  # (1, P)
    new_v = v * momentum + torch.add(gradient, w, alpha=weight_decay)
    new_w = w - lr * new_v
    finite = loss.isfinite()
    weights.index_copy_(0, index, torch.where(finite, new_w, w))
    velocity.index_copy_(0, index, torch.where(finite, new_v, v))
    if copies is not None:
        old = copies.index_select(0, index)
        copies.index_copy_(0, index, torch.where(finite, new_w.bfloat16(), old))


@torch.library.impl("bmsn::sgd", "CompositeExplicitAutograd")
def _sgd_impl(
    weights: Tensor,
    velocity: Tensor,
    copies: Tensor | None,
    gradient: Tensor,
    row: Tensor,
    lr: Tensor,
    loss: Tensor,
    momentum: float,
    weight_decay: float,
    backend: str,
) -> None:
    arguments = (weights, velocity, copies, gradient, row, lr, loss)
    if backend == "reference":
        sgd_reference(*arguments, momentum, weight_decay)
    elif backend == "triton":
        from bmsn.kernels.sgd import launch_sgd

        launch_sgd(*arguments, momentum, weight_decay)
    else:
        addresses = (0 if t is None else t.data_ptr() for t in arguments)
        loaded_extension().sgd(tuple(weights.shape), *addresses, momentum, weight_decay, torch.get_num_threads())


@torch.library.register_fake("bmsn::sgd")
def _sgd_fake(
    weights: Tensor,
    velocity: Tensor,
    copies: Tensor | None,
    gradient: Tensor,
    row: Tensor,
    lr: Tensor,
    loss: Tensor,
    momentum: float,
    weight_decay: float,
    backend: str,
) -> None:
    return None
