"""The pass between two layers: BatchNorm of the main path, shortcut, ReLU, and what the next wave reads.

    z = relu((y - mean) * rstd + s),  s = shortcut, (shortcut - its mean) * its rstd, or nothing (a stem)

z goes to `full`, its 2x2 pooled map to `pooled`: slots of the buffers of the children that keep and that pool.

Source: Ioffe & Szegedy 2015, alg. 1 without the affine step; Javan et al. 2023, section 2.1 (pooling before a block).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import (
    accumulator_dtype,
    check_dense,
    check_feature_map,
    check_groups,
    check_same_kind,
    group_shape,
    loaded_extension,
)

POOLS = ("max", "avg")

torch.library.define(
    "bmsn::bn_add_relu_pool",
    "(Tensor y, Tensor stats, Tensor? shortcut, Tensor? shortcut_stats, Tensor(a!)? full, Tensor(b!)? pooled, "
    "str pool, str backend) -> ()",
)


def bn_add_relu_pool(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None = None,
    shortcut_stats: Tensor | None = None,
    *,
    full: Tensor | None = None,
    pooled: Tensor | None = None,
    pool: str = "max",
    backend: str = "auto",
) -> None:
    """Writes relu(norm(y) + shortcut) into `full`, and pooled 2x2 into `pooled`: one read of its inputs. Forward only.

    Args:
        y: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        stats: (2, G, C) float32 (float64 for float64): mean and rstd of y, for each of the G statistics groups.
        shortcut: like y; None: nothing is added.
        shortcut_stats: like stats: the shortcut is normalised by them. None: it is added as it is.
        full: (G*N, C, H, W), channels_last, dtype of y. It may be y or the shortcut itself; nothing else may overlap.
        pooled: (G*N, C, H/2, W/2), likewise; H and W even. At least one of the two is given.
        pool: "max" or "avg", of the values rounded to the dtype of y.
        backend: auto, reference, cpp or triton.
    Raises:
        InputError: a dtype, rank, layout, device or shape not listed, no output, or an odd map that is to be pooled.
    """
    check_feature_map("y", y)
    if stats.ndim != 3:
        raise InputError(f"stats must be (2, G, C); got {tuple(stats.shape)}")
    num_groups = stats.shape[1]
    check_groups(y, num_groups)
    shape = (2, num_groups, y.shape[1])
    check_dense("stats", stats, y, shape, accumulator_dtype(y))
    if shortcut is not None:
        check_same_kind("shortcut", shortcut, y, tuple(y.shape))
    if shortcut_stats is not None:
        if shortcut is None:
            raise InputError("shortcut_stats must be None where there is no shortcut; got statistics")
        check_dense("shortcut_stats", shortcut_stats, y, shape, accumulator_dtype(y))
    if pool not in POOLS:
        raise InputError(f"pool must be one of {', '.join(POOLS)}; got {pool!r}")
    if full is None and pooled is None:
        raise InputError("at least one of full and pooled must be given; got None for both")
    if full is not None:
        check_same_kind("full", full, y, tuple(y.shape))
    if pooled is not None:
        if y.shape[2] % 2 or y.shape[3] % 2:
            raise InputError(f"a map that is pooled 2x2 must have even H and W; got y {tuple(y.shape)}")
        check_same_kind("pooled", pooled, y, (*y.shape[:2], y.shape[2] // 2, y.shape[3] // 2))
    available = ("reference",) if y.dtype == torch.float64 else None
    chosen = resolve("bn_add_relu_pool", backend, available, y.device)
    torch.ops.bmsn.bn_add_relu_pool(y, stats, shortcut, shortcut_stats, full, pooled, pool, chosen)


def normalise(x: Tensor, stats: Tensor) -> Tensor:
    """(x - mean) * rstd in the dtype of x; the reference of every op that applies statistics (2, G, C).

    bfloat16 takes torch's own pass, which computes x * rstd - mean * rstd in float32 (ten times as fast here). With a
    large mean that form loses digits, but none that bfloat16 holds; wider dtypes subtract first.
    """
    if x.dtype != torch.bfloat16:
        mean, rstd = (per_image(t, len(x)) for t in stats)
        return (x - mean).mul_(rstd)
    y = torch.empty_like(x)
    ones, zeros, unused = torch.ones_like(stats[0, 0]), torch.zeros_like(stats[0, 0]), stats.new_empty(0)
    for group, normed, mean, rstd in zip(x.chunk(stats.shape[1]), y.chunk(stats.shape[1]), *stats, strict=True):
        torch.native_batch_norm(group, rstd, zeros, mean, ones, False, 0.0, 0.0, out=(normed, unused, unused))
    return y


def per_image(values: Tensor, num_images: int) -> Tensor:
    """(G, C) -> (num_images, C, 1, 1), each group's values for each of its images."""
    return values.repeat_interleave(num_images // len(values), 0)[:, :, None, None]


def bn_add_relu_pool_reference(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None = None,
    shortcut_stats: Tensor | None = None,
    full: Tensor | None = None,
    pooled: Tensor | None = None,
    pool: str = "max",
) -> None:
    z = normalise(y, stats)
    if shortcut is not None:
        z += shortcut if shortcut_stats is None else normalise(shortcut, shortcut_stats)
    z = torch.clamp_min(z, 0, out=z if full is None else full)
    if pooled is not None and pool == "max":  # three times as fast as F.max_pool2d, which keeps an int64 index
        rows = torch.maximum(z[:, :, ::2], z[:, :, 1::2])
        torch.maximum(rows[..., ::2], rows[..., 1::2], out=pooled)
    elif pooled is not None:
        pooled.copy_(F.avg_pool2d(z, 2))


@torch.library.impl("bmsn::bn_add_relu_pool", "CompositeExplicitAutograd")
def _bn_add_relu_pool_impl(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    shortcut_stats: Tensor | None,
    full: Tensor | None,
    pooled: Tensor | None,
    pool: str,
    backend: str,
) -> None:
    if backend == "triton":
        from bmsn.kernels.bn_add_relu_pool import launch_bn_add_relu_pool

        launch_bn_add_relu_pool(y, stats, shortcut, shortcut_stats, full, pooled, pool)
        return
    if backend == "cpp":
        cpp = loaded_extension()
        kind = cpp.Shortcut.none if shortcut is None else cpp.Shortcut.plain
        addresses = [0 if t is None else t.data_ptr() for t in (y, shortcut, stats, shortcut_stats, full, pooled)]
        cpp.norm_add_relu_pool(
            *(group_shape(y, stats.shape[1]), y.dtype == torch.bfloat16),
            *(kind if shortcut_stats is None else cpp.Shortcut.normalised, *addresses),
            *(getattr(cpp.Pool, pool), y.shape[3], torch.get_num_threads()),
        )
        return
    bn_add_relu_pool_reference(y, stats, shortcut, shortcut_stats, full, pooled, pool)


@torch.library.register_fake("bmsn::bn_add_relu_pool")
def _bn_add_relu_pool_fake(
    y: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    shortcut_stats: Tensor | None,
    full: Tensor | None,
    pooled: Tensor | None,
    pool: str,
    backend: str,
) -> None:
    return None
