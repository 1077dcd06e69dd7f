"""Softmax cross-entropy, the number of correct images and the gradient of the logits, in one pass.

    loss = mean over n of (log(sum over k of exp(z[n,k])) - z[n,labels[n]])
    correct = number of images with argmax over k of z[n,k] equal to labels[n]
    gradient[n,k] = (softmax(z[n])[k] - (k == labels[n])) / N

Everything stays on the device: nothing waits for the loss.

Source: Javan et al. 2023, section 2.2 (the training loss).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import check_dense, loaded_extension

torch.library.define(
    "bmsn::cross_entropy",
    "(Tensor logits, Tensor labels, str backend) -> (Tensor loss, Tensor correct, Tensor gradient)",
)


def cross_entropy(logits: Tensor, labels: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean loss, differentiable once, and the count of correct images.

    Args:
        logits: (N, K), contiguous, float32, or float64 (on the reference only); at least one of each.
        labels: (N,) int64. One outside 0..K-1 makes the loss NaN and is never right.
        backend: auto, reference, cpp or triton.
    Returns:
        loss (), in the dtype of `logits`; correct () int64: of equal logits the first counts, and NaN is the largest,
        as in torch.argmax.
    Raises:
        InputError: a dtype, rank, layout, device or shape not listed.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise InputError(f"logits must be float32 or float64 (on the reference only); got {logits.dtype}")
    if logits.ndim != 2 or 0 in logits.shape or not logits.is_contiguous():
        raise InputError(
            f"logits must be (N, K), contiguous, with at least 1 of each; "
            f"got {tuple(logits.shape)} with strides {logits.stride()}"
        )
    check_dense("labels", labels, logits, (len(logits),), torch.int64)
    available = ("reference",) if logits.dtype == torch.float64 else None
    chosen = resolve("cross_entropy", backend, available, logits.device)
    if chosen == "reference":
        return cross_entropy_reference(logits, labels)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, labels, chosen)
    loss, correct, _ = torch.ops.bmsn.cross_entropy(logits, labels, chosen)
    return loss, correct


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    num_classes = logits.shape[1]
    known = (labels >= 0) & (labels < num_classes)
    losses = -logits.log_softmax(1).gather(1, labels.clamp(0, num_classes - 1)[:, None])[:, 0]
    loss = torch.where(known, losses, torch.nan).mean()
    return loss, (logits.argmax(1) == labels).sum()


class _CrossEntropy(torch.autograd.Function):
    """Keeps the gradient alone, which the forward pass has made."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        loss, correct, gradient = torch.ops.bmsn.cross_entropy(logits, labels, backend)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_correct: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(()), logits.new_empty((), dtype=torch.int64), torch.empty_like(logits)


@torch.library.impl("bmsn::cross_entropy", "CompositeExplicitAutograd")
def _cross_entropy_impl(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(logits)
    if backend == "triton":
        from bmsn.kernels.cross_entropy import launch_cross_entropy

        launch_cross_entropy(logits, labels, *outputs)
        return outputs
    addresses = (t.data_ptr() for t in (logits, labels, *outputs))
    loaded_extension().cross_entropy(tuple(logits.shape), *addresses, torch.get_num_threads())
    return outputs


@torch.library.register_fake("bmsn::cross_entropy")
def _cross_entropy_fake(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits)
