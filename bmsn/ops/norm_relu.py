"""What stands between two convolutions in training: BatchNorm over batch statistics, residual addition, ReLU.

    norm_relu(x) = relu(norm(x))        norm_add_relu(x, shortcut) = relu(norm(x) + shortcut), or + norm(shortcut)

and, where the next layer wants it, 2x2 pooling of that.

    norm(x)[n,c,h,w] = (x[n,c,h,w] - mean[g,c]) * rstd[g,c],  g = the statistics group of image n

mean and rstd = 1 / sqrt(variance + EPS) are those of (N, H, W) within the group, the variance biased. A supernet has no
affine step; `affine_norm_relu`, for networks trained alone, multiplies by a weight and adds a bias of each channel.
In C++ and in Triton two sweeps over memory forward (statistics; everything else), two backward (sums; everything else).

Source: Ioffe & Szegedy 2015, alg. 1; Javan et al. 2023, section 2 for its use without the affine step in supernets.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import (
    accumulator_dtype,
    check_dense,
    check_feature_map,
    check_group_values,
    check_groups,
    check_same_kind,
    group_shape,
    loaded_extension,
)

EPS = 1e-5  # of torch.nn.BatchNorm2d

Pool = Literal["max", "avg"]

# index: (G*N, C, H/2, W/2) uint8, which of each four values max-pooling took; or four bits, which average-pooling
# found positive. Without pooling it has no elements, like dshortcut without a shortcut and daffine without an affine.
torch.library.define(
    "bmsn::norm_relu",
    "(Tensor x, Tensor? shortcut, Tensor? affine, Tensor? known, int num_groups, bool normalise_shortcut, str? pool, "
    "str backend) -> (Tensor y, Tensor stats, Tensor index)",
)
torch.library.define(
    "bmsn::norm_relu_backward",
    "(Tensor grad, Tensor? y, Tensor x, Tensor? shortcut, Tensor? affine, Tensor stats, Tensor? index, str? pool, "
    "bool adds, str backend) -> (Tensor dx, Tensor dshortcut, Tensor daffine)",
)


def norm_relu(
    x: Tensor, num_groups: int = 1, *, stats: Tensor | None = None, pool: Pool | None = None, backend: str = "auto"
) -> Tensor:
    """relu(norm(x)), pooled if asked for, differentiable once.

    Args:
        x: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        num_groups: G statistics groups of N consecutive images each.
        stats: (1, 2, G, C) float32 (float64 for float64), contiguous: mean and rstd of x where a convolution has taken
            them already, which C++ then uses; the gradient is as if they had been taken here.
        pool: "max" or "avg": 2x2 windows with stride 2 of the result, rounded to its dtype; of equal values the first
            gets the gradient of their maximum. None: not pooled.
        backend: auto, reference, cpp or triton.
    Returns:
        Shape (half the height and width if pooled), layout and dtype of `x`; computed in float32 (float64 for float64);
        NaN propagates to its channel.
    Raises:
        InputError: a dtype or layout not listed (nothing is copied silently), groups that do not divide the batch or
            have fewer than 2 values a channel, another pool, or odd height or width with one.
    """
    _check(x, num_groups, pool)
    _check_stats(stats, x, 1, num_groups)
    chosen = _resolve(x, backend)
    if chosen == "reference":
        return norm_relu_reference(x, num_groups, pool=pool)
    return _run(x, None, None, stats, num_groups, False, pool, chosen)[0]


def norm_add_relu(
    x: Tensor,
    shortcut: Tensor,
    num_groups: int = 1,
    *,
    normalise_shortcut: bool,
    stats: Tensor | None = None,
    pool: Pool | None = None,
    backend: str = "auto",
) -> Tensor:
    """relu(norm(x) + shortcut), or + norm(shortcut), pooled if asked for; differentiable once.

    Args:
        x, shortcut: as in `norm_relu`, both of one shape and dtype on one device.
        num_groups: G statistics groups of N consecutive images each.
        normalise_shortcut: whether the shortcut is a convolution's output, which is normalised by its own statistics.
        stats: as in `norm_relu`, (2, 2, G, C) with the shortcut's behind those of x where that is normalised.
        pool: as in `norm_relu`.
        backend: auto, reference, cpp or triton.
    Returns:
        As `norm_relu`.
    Raises:
        As `norm_relu`; also for a shortcut of another shape, dtype or device.
    """
    _check(x, num_groups, pool)
    check_same_kind("shortcut", shortcut, x, tuple(x.shape))
    _check_stats(stats, x, 1 + normalise_shortcut, num_groups)
    chosen = _resolve(x, backend)
    if chosen == "reference":
        return norm_add_relu_reference(x, shortcut, num_groups, normalise_shortcut=normalise_shortcut, pool=pool)
    return _run(x, shortcut, None, stats, num_groups, normalise_shortcut, pool, chosen)[0]


def affine_norm_relu(
    x: Tensor,
    affine: Tensor,
    shortcut: Tensor | None = None,
    *,
    stats: Tensor | None = None,
    pool: Pool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """relu(norm(x)), or relu(norm(x) + shortcut), or + norm(shortcut); norm is BatchNorm with its affine step.

    Args:
        x: as in `norm_relu`, one statistics group.
        affine: (branches, 2, C) float32 (float64 for float64), contiguous: weight and bias of x; with two branches also
            of the shortcut, which is then normalised by its own statistics. It gets a gradient too.
        shortcut: as in `norm_add_relu`; None: nothing is added.
        stats: as in `norm_relu`, (branches, 2, 1, C).
        pool: as in `norm_relu`.
        backend: auto, reference, cpp or triton.
    Returns:
        y: as that of `norm_relu`, differentiable once.
        stats: (branches, 2, C), dtype of `affine`: mean and rstd of the batch, for running statistics; no gradient.
    Raises:
        As `norm_add_relu`; also for an affine of another shape, dtype, layout or device.
    """
    _check(x, 1, pool)
    if shortcut is not None:
        check_same_kind("shortcut", shortcut, x, tuple(x.shape))
    branches = 2 if shortcut is not None and len(affine) == 2 else 1
    check_dense("affine", affine, x, (branches, 2, x.shape[1]), accumulator_dtype(x))
    _check_stats(stats, x, branches, 1)
    chosen = _resolve(x, backend)
    if chosen == "reference":
        return affine_norm_relu_reference(x, affine, shortcut, pool=pool)
    y, found = _run(x, shortcut, affine, stats, 1, branches == 2, pool, chosen)
    return y, found[:, :, 0]


def norm_relu_reference(x: Tensor, num_groups: int = 1, *, pool: Pool | None = None) -> Tensor:
    return _relu_pool(_norm_reference(x, num_groups), pool)


def norm_add_relu_reference(
    x: Tensor, shortcut: Tensor, num_groups: int = 1, *, normalise_shortcut: bool, pool: Pool | None = None
) -> Tensor:
    if normalise_shortcut:
        shortcut = _norm_reference(shortcut, num_groups)
    return _relu_pool(_norm_reference(x, num_groups) + shortcut, pool)


def affine_norm_relu_reference(
    x: Tensor, affine: Tensor, shortcut: Tensor | None = None, *, pool: Pool | None = None
) -> tuple[Tensor, Tensor]:
    branches = (x,) if shortcut is None or len(affine) == 1 else (x, shortcut)
    normed, means, rstds = zip(
        *(
            torch.native_batch_norm(branch, weight, bias, None, None, True, 0.0, EPS)
            for branch, (weight, bias) in zip(branches, affine, strict=True)
        ),
        strict=True,
    )
    value = normed[0]
    if shortcut is not None:
        value = value + (shortcut if len(branches) == 1 else normed[1])
    stats = torch.stack([torch.stack(means), torch.stack(rstds)], 1).detach()
    return _relu_pool(value, pool), stats


def _relu_pool(x: Tensor, pool: Pool | None) -> Tensor:
    y = F.relu(x)
    return y if pool is None else F.max_pool2d(y, 2) if pool == "max" else F.avg_pool2d(y, 2)


def _norm_reference(x: Tensor, num_groups: int) -> Tensor:
    normed = [F.batch_norm(group, None, None, training=True, eps=EPS) for group in x.chunk(num_groups)]
    return normed[0] if num_groups == 1 else torch.cat(normed)


def _check(x: Tensor, num_groups: int, pool: Pool | None) -> None:
    check_feature_map("x", x)
    check_groups(x, num_groups)
    check_group_values(len(x) // num_groups * x.shape[2] * x.shape[3])
    if pool not in (None, "max", "avg"):
        raise InputError(f"pool must be max, avg or None; got {pool!r}")
    if pool and (x.shape[2] % 2 or x.shape[3] % 2):
        raise InputError(f"2x2 pooling needs an even height and width; x is {tuple(x.shape)}")


def _check_stats(stats: Tensor | None, x: Tensor, branches: int, num_groups: int) -> None:
    if stats is not None:
        check_dense("stats", stats, x, (branches, 2, num_groups, x.shape[1]), accumulator_dtype(x))


def _resolve(x: Tensor, backend: str) -> str:
    available = ("reference",) if x.dtype == torch.float64 else None
    return resolve("norm_relu", backend, available, x.device)


def _run(
    x: Tensor,
    shortcut: Tensor | None,
    affine: Tensor | None,
    known: Tensor | None,
    num_groups: int,
    normalise_shortcut: bool,
    pool: Pool | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, shortcut, affine, known, num_groups, normalise_shortcut, pool, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:3]):
        return _NormRelu.apply(*arguments)
    y, stats, _ = torch.ops.bmsn.norm_relu(*arguments)
    return y, stats


class _NormRelu(torch.autograd.Function):
    """Keeps x, the statistics, and a normalised shortcut: norm(x) costs less to compute again than to read.

    ReLU's mask is that of norm(x), of y, which is the next layer's input and so alive anyway, or in the index.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        affine: Tensor | None,
        known: Tensor | None,
        num_groups: int,
        normalise_shortcut: bool,
        pool: Pool | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        arguments = (x, shortcut, affine, known, num_groups, normalise_shortcut, pool, backend)
        y, stats, index = torch.ops.bmsn.norm_relu(*arguments)
        ctx.save_for_backward(
            y if pool == "max" or (pool is None and shortcut is not None) else None,
            x,
            shortcut if normalise_shortcut else None,
            affine,
            stats,
            index if pool else None,
        )
        ctx.mark_non_differentiable(stats)
        ctx.pool, ctx.adds, ctx.backend = pool, shortcut is not None, backend
        return y, stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (_dense(grad), *ctx.saved_tensors, ctx.pool, ctx.adds, ctx.backend)
        dx, dshortcut, daffine = torch.ops.bmsn.norm_relu_backward(*arguments)
        affine = ctx.saved_tensors[3]
        given = (dx, dshortcut if ctx.adds else None, daffine if affine is not None else None)
        return *given, None, None, None, None, None


def _dense(grad: Tensor) -> Tensor:
    """A gradient comes in whatever layout its maker chose: a mean over (H, W) hands back an expanded one."""
    return grad.contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _outputs(x: Tensor, num_groups: int, normalise_shortcut: bool, pool: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty y, stats (branches, 2, G, C) float32: mean and rstd of x, then of a normalised shortcut; and index."""
    images, channels, height, width = x.shape
    halves = (images, channels, height // 2, width // 2)
    empty = partial(torch.empty, device=x.device)
    y = empty(halves, dtype=x.dtype, memory_format=torch.channels_last) if pool else _empty_like(x)
    stats = empty((1 + normalise_shortcut, 2, num_groups, channels), dtype=torch.float32)
    index = empty(halves, dtype=torch.uint8, memory_format=torch.channels_last) if pool else empty(0, dtype=torch.uint8)
    return y, stats, index


def _gradients(x: Tensor, affine: Tensor | None, adds: bool) -> tuple[Tensor, Tensor, Tensor]:
    daffine = x.new_empty(0) if affine is None else torch.empty_like(affine)
    return _empty_like(x), _empty_like(x) if adds else x.new_empty(0), daffine


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


@torch.library.impl("bmsn::norm_relu", "CompositeExplicitAutograd")
def _norm_relu_impl(
    x: Tensor,
    shortcut: Tensor | None,
    affine: Tensor | None,
    known: Tensor | None,
    num_groups: int,
    normalise_shortcut: bool,
    pool: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, stats, index = _outputs(x, num_groups, normalise_shortcut, pool)
    if backend == "triton":
        from bmsn.kernels.norm_relu import launch_norm_relu

        launch_norm_relu(x, shortcut, affine, y, stats, index if pool else None, pool)
        return y, stats, index
    cpp = loaded_extension()
    if known is not None:
        stats.copy_(known)
    cpp.norm_relu(
        *(group_shape(x, num_groups), x.dtype == torch.bfloat16, _kind(shortcut is not None, normalise_shortcut)),
        *(*(_address(t) for t in (x, shortcut, y, stats)), known is not None, *map(_address, (affine, index))),
        *(getattr(cpp.Pool, pool or "max"), x.shape[3], EPS, torch.get_num_threads()),
    )
    return y, stats, index


@torch.library.impl("bmsn::norm_relu_backward", "CompositeExplicitAutograd")
def _norm_relu_backward_impl(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    affine: Tensor | None,
    stats: Tensor,
    index: Tensor | None,
    pool: str | None,
    adds: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshortcut, daffine = _gradients(x, affine, adds)
    if backend == "triton":
        from bmsn.kernels.norm_relu import launch_norm_relu_backward

        launch_norm_relu_backward(
            *(grad, y, x, shortcut, affine, stats, index, pool),
            *(dx, dshortcut if adds else None, None if affine is None else daffine),
        )
        return dx, dshortcut, daffine
    cpp = loaded_extension()
    cpp.norm_relu_backward(
        *(group_shape(x, stats.shape[2]), x.dtype == torch.bfloat16, _kind(adds, shortcut is not None)),
        *(_address(t) for t in (grad, y, x, shortcut, stats, affine, dx, dshortcut, daffine, index)),
        *(getattr(cpp.Pool, pool or "max"), x.shape[3], torch.get_num_threads()),
    )
    return dx, dshortcut, daffine


def _kind(adds: bool, normalises: bool) -> Any:
    kinds = loaded_extension().Shortcut
    return kinds.none if not adds else kinds.normalised if normalises else kinds.plain


@torch.library.register_fake("bmsn::norm_relu")
def _norm_relu_fake(
    x: Tensor,
    shortcut: Tensor | None,
    affine: Tensor | None,
    known: Tensor | None,
    num_groups: int,
    normalise_shortcut: bool,
    pool: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, num_groups, normalise_shortcut, pool)


@torch.library.register_fake("bmsn::norm_relu_backward")
def _norm_relu_backward_fake(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    affine: Tensor | None,
    stats: Tensor,
    index: Tensor | None,
    pool: str | None,
    adds: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, affine, adds)
