"""One training step of one supernet with one architecture, and the accuracy of a pair on one batch. Eager torch.

Source: Javan et al. 2023, section 2.2: one SGD step of w_m on a training batch, then one validation batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.config import Procedure
from bmsn.errors import InputError
from bmsn.network import SupernetMixture
from bmsn.space import Architecture


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" names. Raises InputError where there is no GPU to name."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device must be cpu or auto on this machine: torch sees no CUDA GPU")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with AMX or AVX512-BF16, float32 elsewhere."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def learning_rate(progress: float, lr: float, min_lr: float, procedure: Procedure) -> float:
    """Learning rate at `progress` in [0, 1): cosine from `lr` to `min_lr`, or steps at the milestones."""
    if procedure.milestones:
        return lr * procedure.factor ** sum(progress >= milestone for milestone in procedure.milestones)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def train_step(
    mixture: SupernetMixture,
    velocity: Tensor,
    architecture: Architecture,
    supernet: int,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> float:
    """One step of momentum SGD on row `supernet` of the arena, as `torch.optim.SGD` does it.

    Args:
        mixture: changed in place, unless the loss or a gradient is not finite.
        velocity: (M, P) momentum buffers; a row of zeros is a fresh one (torch's first step: velocity = gradient).
        images: (N, C, H, W) channels_last, in the dtype of the computation.
        labels: (N,) int64.
    Returns:
        The mean cross-entropy; where it is not finite, nothing has changed.
    """
    return descend(
        mixture.arena.detach()[supernet],
        velocity[supernet],
        lambda row: F.cross_entropy(mixture.forward_row(row, images, architecture), labels),
        lr=lr, momentum=momentum, weight_decay=weight_decay,
    )  # fmt: skip


def descend(
    weights: Tensor,
    velocity: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> float:
    """One step of momentum SGD on `weights`, in place, as `torch.optim.SGD` does it.

    Args:
        weights: changed, unless the loss or a gradient is not finite.
        velocity: momentum buffer of the same shape, changed with them.
        loss_of: from weights to a scalar loss.
    Returns:
        The loss; NaN where nothing has changed.
    """
    leaf = weights.detach().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    value = loss.item()
    if not math.isfinite(value) or not math.isfinite(gradient.sum().item()):
        return math.nan
    with torch.no_grad():
        gradient.add_(weights, alpha=weight_decay)
        velocity.mul_(momentum).add_(gradient)
        weights.sub_(velocity, alpha=lr)
    return value


@torch.no_grad()
def batch_accuracy(
    mixture: SupernetMixture, architecture: Architecture, supernet: int, images: Tensor, labels: Tensor
) -> float:
    """Share of `images` (channels_last) that the pair classifies correctly, as one statistics group."""
    logits = mixture.forward_row(mixture.arena[supernet], images, architecture)
    return (logits.argmax(1) == labels).sum().item() / len(labels)
