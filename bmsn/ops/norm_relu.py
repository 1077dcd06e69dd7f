"""What stands between two convolutions of a supernet: BatchNorm over batch statistics, residual addition, ReLU.

    norm_relu(x) = relu(norm(x))        norm_add_relu(x, shortcut) = relu(norm(x) + shortcut), or + norm(shortcut)

and, where the next layer wants it, 2x2 max-pooling of that.

    norm(x)[n,c,h,w] = (x[n,c,h,w] - mean[g,c]) * rstd[g,c],  g = the statistics group of image n

mean and rstd = 1 / sqrt(variance + EPS) are those of (N, H, W) within the group, the variance biased; no affine step.
In C++ two sweeps over memory forward (statistics; everything else) and two backward (sums; everything else).

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

# index: which of each four values max-pooling took, (G*N, C, H/2, W/2) uint8; without pooling it has no elements.
torch.library.define(
    "bmsn::norm_relu", "(Tensor x, int num_groups, bool max_pool) -> (Tensor y, Tensor stats, Tensor index)"
)
torch.library.define(
    "bmsn::norm_relu_backward", "(Tensor grad, Tensor? y, Tensor x, Tensor stats, Tensor? index) -> Tensor"
)
torch.library.define(
    "bmsn::norm_add_relu",
    "(Tensor x, Tensor shortcut, int num_groups, bool normalise_shortcut, bool max_pool) "
    "-> (Tensor y, Tensor stats, Tensor index)",
)
torch.library.define(
    "bmsn::norm_add_relu_backward",
    "(Tensor grad, Tensor y, Tensor x, Tensor? shortcut, Tensor stats, Tensor? index) -> (Tensor dx, Tensor dshortcut)",
)


def norm_relu(x: Tensor, num_groups: int = 1, *, max_pool: bool = False, backend: str = "auto") -> Tensor:
    """relu(norm(x)), max-pooled if asked for, differentiable once.

    Args:
        x: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        num_groups: G statistics groups of N consecutive images each.
        max_pool: 2x2 windows with stride 2 of the result, rounded to its dtype; of equal values the first gets the
            gradient.
        backend: auto, reference or cpp.
    Returns:
        Shape (half the height and width if pooled), layout and dtype of `x`; computed in float32 (float64 for float64);
        NaN propagates to its channel.
    Raises:
        InputError: a dtype or layout not listed (nothing is copied silently), groups that do not divide the batch or
            have fewer than 2 values a channel, odd height or width with `max_pool`.
    """
    _check(x, num_groups, max_pool)
    if _resolve(x, backend) == "reference":
        return norm_relu_reference(x, num_groups, max_pool=max_pool)
    if torch.is_grad_enabled() and x.requires_grad:
        return _NormRelu.apply(x, num_groups, max_pool)
    return torch.ops.bmsn.norm_relu(x, num_groups, max_pool)[0]


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
        backend: auto, reference or cpp.
    Returns:
        As `norm_relu`.
    Raises:
        As `norm_relu`; also for a shortcut of another shape, dtype or device.
    """
    _check(x, num_groups, max_pool)
    check_same_kind("shortcut", shortcut, x, tuple(x.shape))
    if _resolve(x, backend) == "reference":
        return norm_add_relu_reference(
            x, shortcut, num_groups, normalise_shortcut=normalise_shortcut, max_pool=max_pool
        )
    if torch.is_grad_enabled() and (x.requires_grad or shortcut.requires_grad):
        return _NormAddRelu.apply(x, shortcut, num_groups, normalise_shortcut, max_pool)
    return torch.ops.bmsn.norm_add_relu(x, shortcut, num_groups, normalise_shortcut, max_pool)[0]


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


class _NormRelu(torch.autograd.Function):
    """Keeps x and its statistics: norm(x), and with it the mask of ReLU, costs less to compute again than to read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, max_pool: bool) -> Tensor:
        y, stats, index = torch.ops.bmsn.norm_relu(x, num_groups, max_pool)
        ctx.save_for_backward(y if max_pool else None, x, stats, index if max_pool else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.bmsn.norm_relu_backward(_dense(grad), *ctx.saved_tensors), None, None


class _NormAddRelu(torch.autograd.Function):
    """Keeps x, y, the statistics, and a normalised shortcut; y, the next layer's input, is alive anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor, num_groups: int, normalise_shortcut: bool, max_pool: bool
    ) -> Tensor:
        y, stats, index = torch.ops.bmsn.norm_add_relu(x, shortcut, num_groups, normalise_shortcut, max_pool)
        ctx.save_for_backward(y, x, shortcut if normalise_shortcut else None, stats, index if max_pool else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.bmsn.norm_add_relu_backward(_dense(grad), *ctx.saved_tensors), None, None, None


def _dense(grad: Tensor) -> Tensor:
    """A gradient comes in whatever layout its maker chose: a mean over (H, W) hands back an expanded one."""
    return grad.contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _outputs(
    x: Tensor, num_groups: int, max_pool: bool, normalise_shortcut: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


@torch.library.impl("bmsn::norm_relu", "CPU")
def _norm_relu_cpu(x: Tensor, num_groups: int, max_pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, stats, index = _outputs(x, num_groups, max_pool)
    cpp = loaded_extension()
    cpp.norm_relu(
        *(group_shape(x, num_groups), x.dtype == torch.bfloat16, cpp.Shortcut.none),
        *(x.data_ptr(), 0, y.data_ptr(), stats.data_ptr(), _address(index), x.shape[3]),
        *(EPS, torch.get_num_threads()),
    )
    return y, stats, index


@torch.library.impl("bmsn::norm_relu_backward", "CPU")
def _norm_relu_backward_cpu(grad: Tensor, y: Tensor | None, x: Tensor, stats: Tensor, index: Tensor | None) -> Tensor:
    dx = _empty_like(x)
    cpp = loaded_extension()
    cpp.norm_relu_backward(
        *(group_shape(x, stats.shape[2]), x.dtype == torch.bfloat16, cpp.Shortcut.none),
        *(grad.data_ptr(), _address(y), x.data_ptr(), 0, stats.data_ptr(), dx.data_ptr(), 0),
        *(_address(index), x.shape[3], torch.get_num_threads()),
    )
    return dx


@torch.library.impl("bmsn::norm_add_relu", "CPU")
def _norm_add_relu_cpu(
    x: Tensor, shortcut: Tensor, num_groups: int, normalise_shortcut: bool, max_pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, stats, index = _outputs(x, num_groups, max_pool, normalise_shortcut)
    cpp = loaded_extension()
    kind = cpp.Shortcut.normalised if normalise_shortcut else cpp.Shortcut.plain
    cpp.norm_relu(
        *(group_shape(x, num_groups), x.dtype == torch.bfloat16, kind),
        *(x.data_ptr(), shortcut.data_ptr(), y.data_ptr(), stats.data_ptr(), _address(index), x.shape[3]),
        *(EPS, torch.get_num_threads()),
    )
    return y, stats, index


@torch.library.impl("bmsn::norm_add_relu_backward", "CPU")
def _norm_add_relu_backward_cpu(
    grad: Tensor, y: Tensor, x: Tensor, shortcut: Tensor | None, stats: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx, dshortcut = _empty_like(x), _empty_like(x)
    cpp = loaded_extension()
    kind = cpp.Shortcut.plain if shortcut is None else cpp.Shortcut.normalised
    cpp.norm_relu_backward(
        *(group_shape(x, stats.shape[2]), x.dtype == torch.bfloat16, kind),
        *(grad.data_ptr(), y.data_ptr(), x.data_ptr(), _address(shortcut)),
        *(stats.data_ptr(), dx.data_ptr(), dshortcut.data_ptr()),
        *(_address(index), x.shape[3], torch.get_num_threads()),
    )
    return dx, dshortcut


@torch.library.register_fake("bmsn::norm_relu")
def _norm_relu_fake(x: Tensor, num_groups: int, max_pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, num_groups, max_pool)


@torch.library.register_fake("bmsn::norm_relu_backward")
def _norm_relu_backward_fake(grad: Tensor, y: Tensor | None, x: Tensor, stats: Tensor, index: Tensor | None) -> Tensor:
    return _empty_like(x)


@torch.library.register_fake("bmsn::norm_add_relu")
def _norm_add_relu_fake(
    x: Tensor, shortcut: Tensor, num_groups: int, normalise_shortcut: bool, max_pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, num_groups, max_pool, normalise_shortcut)


@torch.library.register_fake("bmsn::norm_add_relu_backward")
def _norm_add_relu_backward_fake(
    grad: Tensor, y: Tensor, x: Tensor, shortcut: Tensor | None, stats: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_like(x)
