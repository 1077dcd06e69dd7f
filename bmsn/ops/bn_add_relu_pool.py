"""The end of a block: BatchNorm by given statistics, residual addition, ReLU, and 2x2 pooling, in one sweep.

    z = relu((y - mean) * rstd + shortcut),  the shortcut normalised too where it has statistics

Forward only; z is written to where the caller wants it, as it is, pooled, or both.

Source: Ioffe & Szegedy 2015, alg. 1 without the affine step; Javan et al. 2023, section 2.1 (pooling before a block).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.layout import check_images, check_statistics, group_shape, loaded_extension, per_image

PoolOp = Literal["max", "avg"]

torch.library.define(
    "bmsn::bn_add_relu_pool",
    "(Tensor y, Tensor stats, Tensor? shortcut, Tensor? shortcut_stats, Tensor(a!)? full, Tensor(b!)? pooled, "
    "str pool) -> ()",
)


def bn_add_relu_pool(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None = None,
    shortcut_stats: Tensor | None = None,
    *,
    full: Tensor | None = None,
    pooled: Tensor | None = None,
    pool: PoolOp = "max",
    backend: str = "auto",
) -> None:
    """Writes z into `full`, and its pooled map into `pooled`, whichever is given.

    Args:
        y: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        stats: (2, G, C) float32 (float64 for float64): mean and rstd of y in each of G groups of N consecutive images.
        shortcut: like y; None: nothing is added.
        shortcut_stats: like `stats`, of the shortcut; None: it is added as it is.
        full: like y, written to; may be y itself.
        pooled: (G*N, C, H/2, W/2), channels_last, dtype of y, written to: 2x2 windows of z as rounded to its dtype.
        pool: "max" or "avg".
        backend: auto, reference or cpp.
    Raises:
        TypeError: a dtype not listed, or two that differ.
        ValueError: a shape, layout or device that does not fit, with both shapes; odd H or W with `pooled`.
        InputError: neither `full` nor `pooled`, or another pool.
    """
    check_images("y", y)
    check_statistics("stats", stats, y)
    if shortcut is not None:
        check_images("shortcut", shortcut, y, y.shape)
        if shortcut_stats is not None:
            check_statistics("shortcut_stats", shortcut_stats, y, stats.shape)
    if full is None and pooled is None:
        raise InputError("bn_add_relu_pool needs full or pooled to write to; got neither")
    if pool not in ("max", "avg"):
        raise InputError(f"pool must be max or avg; got {pool!r}")
    if full is not None:
        check_images("full", full, y, y.shape)
    if pooled is not None:
        images, channels, height, width = y.shape
        if height % 2 or width % 2:
            raise ValueError(f"2x2 pooling needs an even height and width; y is {tuple(y.shape)}")
        check_images("pooled", pooled, y, (images, channels, height // 2, width // 2))
    if _resolve(y, backend) == "reference":
        bn_add_relu_pool_reference(y, stats, shortcut, shortcut_stats, full, pooled, pool)
    else:
        torch.ops.bmsn.bn_add_relu_pool(y, stats, shortcut, shortcut_stats, full, pooled, pool)


def bn_add_relu_pool_reference(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    shortcut_stats: Tensor | None,
    full: Tensor | None,
    pooled: Tensor | None,
    pool: str,
) -> None:
    z = _normalise(y, stats)
    if shortcut is not None:
        z = z + (shortcut if shortcut_stats is None else _normalise(shortcut, shortcut_stats))
    z = F.relu(z).to(y.dtype)
    if full is not None:
        full.copy_(z)
    if pooled is not None:
        pooled.copy_((F.max_pool2d if pool == "max" else F.avg_pool2d)(z, 2))


def _normalise(x: Tensor, stats: Tensor) -> Tensor:
    mean, rstd = per_image(stats, x)
    return (x.to(stats.dtype) - mean) * rstd


def _resolve(y: Tensor, backend: str) -> str:
    available = ("reference",) if y.dtype == torch.float64 else None
    return resolve("bn_add_relu_pool", backend, available, y.device)


@torch.library.impl("bmsn::bn_add_relu_pool", "CPU")
def _bn_add_relu_pool_cpu(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    shortcut_stats: Tensor | None,
    full: Tensor | None,
    pooled: Tensor | None,
    pool: str,
) -> None:
    cpp = loaded_extension()
    kind = cpp.Shortcut.none if shortcut is None else cpp.Shortcut.plain
    addresses = [0 if t is None else t.data_ptr() for t in (y, shortcut, stats, shortcut_stats, full, pooled)]
    cpp.norm_add_relu_pool(
        *(group_shape(y, stats.shape[1]), y.dtype == torch.bfloat16),
        *(kind if shortcut_stats is None else cpp.Shortcut.normalised, *addresses),
        *(getattr(cpp.Pool, pool), y.shape[3], torch.get_num_threads()),
    )


@torch.library.register_fake("bmsn::bn_add_relu_pool")
def _bn_add_relu_pool_fake(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    shortcut_stats: Tensor | None,
    full: Tensor | None,
    pooled: Tensor | None,
    pool: str,
) -> None:
    return None
