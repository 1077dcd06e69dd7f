"""What stands between two convolutions of a supernet: BatchNorm over batch statistics, residual addition, ReLU.

    norm_relu(x) = relu(norm(x))        norm_add_relu(x, shortcut) = relu(norm(x) + shortcut), or + norm(shortcut)

and, where the next layer wants it, 2x2 max-pooling of that.

    norm(x)[n,c,h,w] = (x[n,c,h,w] - mean[g,c]) * rstd[g,c],  g = the statistics group of image n

mean and rstd = 1 / sqrt(variance + EPS) are those of (N, H, W) within the group, the variance biased; no affine step.
In C++ and in Triton two sweeps over memory forward (statistics; everything else), two backward (sums; everything else).

Source: Ioffe & Szegedy 2015, alg. 1 without the affine step; Javan et al. 2023, section 2 for the supernet's use of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import (
    check_feature_map,
    check_group_values,
    check_groups,
    check_same_kind,
    group_shape,
    loaded_extension,
)

EPS = 1e-5  # of torch.nn.BatchNorm2d

# index: which of each four values max-pooling took, (G*N, C, H/2, W/2) uint8; without pooling it has no elements, like
# dshortcut without a shortcut.
torch.library.define(
    "bmsn::norm_relu",
    "(Tensor x, Tensor? shortcut, int num_groups, bool normalise_shortcut, bool max_pool, str backend) "
    "-> (Tensor y, Tensor stats, Tensor index)",
)
torch.library.define(
    "bmsn::norm_relu_backward",
    "(Tensor grad, Tensor? y, Tensor x, Tensor? shortcut, Tensor stats, Tensor? index, bool adds, str backend) "
    "-> (Tensor dx, Tensor dshortcut)",
)


def norm_relu(x: Tensor, num_groups: int = 1, *, max_pool: bool = False, backend: str = "auto") -> Tensor:
    """relu(norm(x)), max-pooled if asked for, differentiable once.

    Args:
        x: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        num_groups: G statistics groups of N consecutive images each.
        max_pool: 2x2 windows with stride 2 of the result, rounded to its dtype; of equal values the first gets the
            gradient.
        backend: auto, reference, cpp or triton.
    Returns:
        Shape (half the height and width if pooled), layout and dtype of `x`; computed in float32 (float64 for float64);
        NaN propagates to its channel.
    Raises:
        InputError: a dtype or layout not listed (nothing is copied silently), groups that do not divide the batch or
            have fewer than 2 values a channel, odd height or width with `max_pool`.
    """
    _check(x, num_groups, max_pool)
    chosen = _resolve(x, backend)
    if chosen == "reference":
        return norm_relu_reference(x, num_groups, max_pool=max_pool)
    return _run(x, None, num_groups, False, max_pool, chosen)


def norm_add_relu(
    x: Tensor,
    shortcut: Tensor,
    num_groups: int = 1,
    *,
    normalise_shortcut: bool,
    max_pool: bool = False,
    backend: str = "auto",
) -> Tensor:
    """relu(norm(x) + shortcut), or + norm(shortcut), max-pooled if asked for; differentiable once.

    Args:
        x, shortcut: as in `norm_relu`, both of one shape and dtype on one device.
        num_groups: G statistics groups of N consecutive images each.
        normalise_shortcut: whether the shortcut is a convolution's output, which is normalised by its own statistics.
        max_pool: as in `norm_relu`.
        backend: auto, reference, cpp or triton.
    Returns:
        As `norm_relu`.
    Raises:
        As `norm_relu`; also for a shortcut of another shape, dtype or device.
    """
    _check(x, num_groups, max_pool)
    check_same_kind("shortcut", shortcut, x, tuple(x.shape))
    chosen = _resolve(x, backend)
    if chosen == "reference":
        return norm_add_relu_reference(
            x, shortcut, num_groups, normalise_shortcut=normalise_shortcut, max_pool=max_pool
        )
    return _run(x, shortcut, num_groups, normalise_shortcut, max_pool, chosen)


def norm_relu_reference(x: Tensor, num_groups: int = 1, *, max_pool: bool = False) -> Tensor:
    return _relu_pool(_norm_reference(x, num_groups), max_pool)


def norm_add_relu_reference(
    x: Tensor, shortcut: Tensor, num_groups: int = 1, *, normalise_shortcut: bool, max_pool: bool = False
) -> Tensor:
    if normalise_shortcut:
        shortcut = _norm_reference(shortcut, num_groups)
    return _relu_pool(_norm_reference(x, num_groups) + shortcut, max_pool)


def _relu_pool(x: Tensor, max_pool: bool) -> Tensor:
    return F.max_pool2d(F.relu(x), 2) if max_pool else F.relu(x)


def _norm_reference(x: Tensor, num_groups: int) -> Tensor:
    normed = [F.batch_norm(group, None, None, training=True, eps=EPS) for group in x.chunk(num_groups)]
    return normed[0] if num_groups == 1 else torch.cat(normed)


def _check(x: Tensor, num_groups: int, max_pool: bool) -> None:
    check_feature_map("x", x)
    check_groups(x, num_groups)
    check_group_values(len(x) // num_groups * x.shape[2] * x.shape[3])
    if max_pool and (x.shape[2] % 2 or x.shape[3] % 2):
        raise InputError(f"2x2 pooling needs an even height and width; x is {tuple(x.shape)}")


def _resolve(x: Tensor, backend: str) -> str:
    available = ("reference",) if x.dtype == torch.float64 else None
    return resolve("norm_relu", backend, available, x.device)


def _run(
    x: Tensor, shortcut: Tensor | None, num_groups: int, normalise_shortcut: bool, max_pool: bool, backend: str
) -> Tensor:
    arguments = (x, shortcut, num_groups, normalise_shortcut, max_pool, backend)
    if torch.is_grad_enabled() and (x.requires_grad or (shortcut is not None and shortcut.requires_grad)):
        return _NormRelu.apply(*arguments)
    return torch.ops.bmsn.norm_relu(*arguments)[0]


class _NormRelu(torch.autograd.Function):
    """Keeps x, the statistics, and a normalised shortcut: norm(x) costs less to compute again than to read.

    ReLU's mask is that of norm(x), or of y, which is the next layer's input and so alive anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        num_groups: int,
        normalise_shortcut: bool,
        max_pool: bool,
        backend: str,
    ) -> Tensor:
        y, stats, index = torch.ops.bmsn.norm_relu(x, shortcut, num_groups, normalise_shortcut, max_pool, backend)
        ctx.save_for_backward(
            None if shortcut is None and not max_pool else y,
            x,
            shortcut if normalise_shortcut else None,
            stats,
            index if max_pool else None,
        )
        ctx.adds, ctx.backend = shortcut is not None, backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dshortcut = torch.ops.bmsn.norm_relu_backward(_dense(grad), *ctx.saved_tensors, ctx.adds, ctx.backend)
        return dx, dshortcut if ctx.adds else None, None, None, None, None


def _dense(grad: Tensor) -> Tensor:
    """A gradient comes in whatever layout its maker chose: a mean over (H, W) hands back an expanded one."""
    return grad.contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _outputs(x: Tensor, num_groups: int, max_pool: bool, normalise_shortcut: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty y, stats (branches, 2, G, C) float32: mean and rstd of x, then of a normalised shortcut; and index."""
    images, channels, height, width = x.shape
    halves = (images, channels, height // 2, width // 2)
    empty = partial(torch.empty, device=x.device)
    y = empty(halves, dtype=x.dtype, memory_format=torch.channels_last) if max_pool else _empty_like(x)
    stats = empty((1 + normalise_shortcut, 2, num_groups, channels), dtype=torch.float32)
    index = (
        empty(halves, dtype=torch.uint8, memory_format=torch.channels_last) if max_pool else empty(0, dtype=torch.uint8)
    )
    return y, stats, index


def _gradients(x: Tensor, adds: bool) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_like(x) if adds else x.new_empty(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


@torch.library.impl("bmsn::norm_relu", "CompositeExplicitAutograd")
def _norm_relu_impl(
    x: Tensor, shortcut: Tensor | None, num_groups: int, normalise_shortcut: bool, max_pool: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, stats, index = _outputs(x, num_groups, max_pool, normalise_shortcut)
    if backend == "triton":
        from bmsn.kernels.norm_relu import launch_norm_relu

        launch_norm_relu(x, shortcut, y, stats, index if max_pool else None)
        return y, stats, index
    cpp = loaded_extension()
    cpp.norm_relu(
        *(group_shape(x, num_groups), x.dtype == torch.bfloat16, _kind(shortcut is not None, normalise_shortcut)),
        *(x.data_ptr(), _address(shortcut), y.data_ptr(), stats.data_ptr(), _address(index), x.shape[3]),
        *(EPS, torch.get_num_threads()),
    )
    return y, stats, index


@torch.library.impl("bmsn::norm_relu_backward", "CompositeExplicitAutograd")
def _norm_relu_backward_impl(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    stats: Tensor,
    index: Tensor | None,
    adds: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dx, dshortcut = _gradients(x, adds)
    if backend == "triton":
        from bmsn.kernels.norm_relu import launch_norm_relu_backward

        launch_norm_relu_backward(grad, y, x, shortcut, stats, index, dx, dshortcut if adds else None)
        return dx, dshortcut
    loaded_extension().norm_relu_backward(
        *(group_shape(x, stats.shape[2]), x.dtype == torch.bfloat16, _kind(adds, shortcut is not None)),
        *(grad.data_ptr(), _address(y), x.data_ptr(), _address(shortcut)),
        *(stats.data_ptr(), dx.data_ptr(), _address(dshortcut)),
        *(_address(index), x.shape[3], torch.get_num_threads()),
    )
    return dx, dshortcut


def _kind(adds: bool, normalises: bool) -> Any:
    kinds = loaded_extension().Shortcut
    return kinds.none if not adds else kinds.normalised if normalises else kinds.plain


@torch.library.register_fake("bmsn::norm_relu")
def _norm_relu_fake(
    x: Tensor, shortcut: Tensor | None, num_groups: int, normalise_shortcut: bool, max_pool: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, num_groups, max_pool, normalise_shortcut)


@torch.library.register_fake("bmsn::norm_relu_backward")
def _norm_relu_backward_fake(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    stats: Tensor,
    index: Tensor | None,
    adds: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _gradients(x, adds)
