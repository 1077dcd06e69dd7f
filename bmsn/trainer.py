"""One training step of one supernet with one architecture, and the accuracy of a pair on one batch.

Source: Javan et al. 2023, section 2.2: one SGD step of w_m on a training batch, then one validation batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bmsn.config import Procedure
from bmsn.errors import InputError, RunStopped
from bmsn.network import SupernetMixture
from bmsn.ops.cross_entropy import cross_entropy
from bmsn.ops.sgd import sgd
from bmsn.space import Architecture

_HOST_IS_FULL = "DefaultCPUAllocator: can't allocate memory"  # torch has no class of its own for this error


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" names. Raises InputError where there is no GPU to name."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device must be cpu or auto on this machine: torch sees no CUDA GPU")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with AMX or AVX512-BF16, float32 elsewhere."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def out_of_memory_said(where: Callable[[], str], device: torch.device) -> Iterator[None]:
    """Turns torch's errors for want of memory into RunStopped, which says how much was in use at most.

    Args:
        where: what was going on, asked for when it fails.
        device: of the computation; batches may be made on the host.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            full = f"{device} at a peak of {peak / 2**30:.2f} GiB"
        elif _HOST_IS_FULL in str(error):
            full = "cpu"
        else:
            raise
        raise RunStopped(
            f"{where()}: out of memory on {full}; a smaller batch_size may help ({str(error).splitlines()[0]})"
        ) from error


def learning_rate(progress: float, lr: float, min_lr: float, procedure: Procedure) -> float:
    """Learning rate at `progress` in [0, 1): cosine from `lr` to `min_lr`, or steps at the milestones."""
    if procedure.milestones:
        return lr * procedure.factor ** sum(progress >= milestone for milestone in procedure.milestones)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def working_copies(mixture: SupernetMixture, dtype: torch.dtype) -> Tensor | None:
    """(M, P) bfloat16, the rounded arena, for `device_step`; None where the computation is in another dtype."""
    return mixture.arena.detach().to(dtype) if dtype == torch.bfloat16 else None


def device_step(
    mixture: SupernetMixture,
    velocity: Tensor,
    copies: Tensor | None,
    architecture: Architecture,
    row: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """One step of momentum SGD on row `row` of the arena, as `torch.optim.SGD` does it; the host waits for nothing.

    Args:
        mixture: changed in place, unless the loss or a gradient is not finite. All tensors lie on its device.
        velocity: (M, P) momentum buffers, dtype of the arena; a row of zeros is a fresh one.
        copies: `working_copies` of the mixture, kept up by every step; None: weights are rounded on the way.
        architecture: one of the space's.
        row: () int64, the supernet.
        images: (N, C, H, W) channels_last, in the dtype of the computation.
        labels: (N,) int64.
        lr: (), dtype of the arena.
    Returns:
        As `arena_step`.
    """

    def forward(convs: Tensor, head: Tensor) -> Tensor:
        return mixture.forward_weights(mixture.views(convs, head), images, architecture)

    return arena_step(
        mixture.arena.detach(), velocity, copies, row, mixture.part_sizes[0], forward, images.dtype, labels,
        lr=lr, momentum=momentum, weight_decay=weight_decay,
    )  # fmt: skip


def arena_step(
    arena: Tensor,
    velocity: Tensor,
    copies: Tensor | None,
    row: Tensor,
    num_convs: int,
    forward: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    labels: Tensor,
    *,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """`device_step` of whatever has its weights in the rows of an arena.

    Args:
        arena: (M, P), changed in place, unless the loss or a gradient is not finite.
        velocity, copies, row, labels, lr: as in `device_step`.
        num_convs: how many of a row's weights, from the first, are convolutions.
        forward: logits (N, num_classes) from the convolutions, in `dtype`, and the other weights, in the wider of
            `dtype` and float32: the two parts of the row.
        dtype: of the computation.
    Returns:
        loss: () mean cross-entropy, NaN where it or a gradient is not finite: then nothing has changed.
        correct: () int64, how many of the images were classified correctly.
    """
    index = row.view(1)
    convs, others = arena.index_select(0, index)[0].tensor_split([num_convs])
    if copies is not None:
        convs = copies[:, :num_convs].index_select(0, index)[0]
    else:
        convs = convs.to(dtype)
    others = others.to(torch.promote_types(dtype, torch.float32))
    with torch.enable_grad():
        convs, others = convs.requires_grad_(), others.requires_grad_()
        loss, correct = cross_entropy(forward(convs, others), labels)
        gradients = torch.autograd.grad(loss, (convs, others))
    gradient = torch.cat([part.to(arena.dtype) for part in gradients])
    loss = loss.detach().to(arena.dtype) + 0 * gradient.sum()  # NaN with a gradient that is not finite
    sgd(
        arena, velocity, gradient, row, lr, loss,
        momentum=momentum, weight_decay=weight_decay, copies=copies,
    )  # fmt: skip
    return loss, correct


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
    copies: Tensor | None = None,
) -> float:
    """`device_step` for a host that waits for the loss.

    Returns:
        The mean cross-entropy; where it or a gradient is not finite NaN, and nothing has changed.
    Raises:
        InputError: an architecture or supernet that is not there.
    """
    mixture.check(architecture, supernet)
    arena = mixture.arena
    loss, _ = device_step(
        mixture, velocity, copies, architecture, torch.tensor(supernet, device=arena.device), images, labels,
        lr=torch.tensor(lr, dtype=arena.dtype, device=arena.device), momentum=momentum, weight_decay=weight_decay,
    )  # fmt: skip
    value = loss.item()
    return value if math.isfinite(value) else math.nan


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
    """Share of `images` (channels_last) that the pair classifies correctly, as one statistics group.

    Raises:
        InputError: an architecture or supernet that is not there.
    """
    mixture.check(architecture, supernet)
    logits = mixture.forward_row(mixture.arena[supernet], images, architecture)
    return (logits.argmax(1) == labels).sum().item() / len(labels)
