"""A convolution between two BatchNorms: normalises its input on the way in, takes the statistics of its output.

    y = conv(relu((x - mean) * rstd), w),  and mean and rstd of y in each statistics group

Forward only. Source: Ioffe & Szegedy 2015, alg. 1 without the affine step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.layout import check_groups, check_images, check_statistics, group_shape, loaded_extension
from bmsn.ops.norm_relu import EPS

torch.library.define("bmsn::batch_statistics", "(Tensor x, int num_groups) -> Tensor")


class ConvBn(NamedTuple):
    """Un-normalised maps and their statistics (2, G, C); the shortcut's are None without one."""

    y: Tensor
    stats: Tensor
    shortcut: Tensor | None
    shortcut_stats: Tensor | None


def conv_bn(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    *,
    stats: Tensor | None = None,
    overwrite: bool = False,
    stride: int = 1,
    shortcut_weight: Tensor | None = None,
    backend: str = "auto",
) -> ConvBn:
    """Convolution with its input normalised on load and its output's statistics taken.

    The statistics are those of the values as stored. Two groups never share a value, so a group's result does not
    depend on what it is stacked with.

    Args:
        x: (G*N, I, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        weight: (O, I, k, k), k odd, of the dtype of x.
        num_groups: G statistics groups of N consecutive images each.
        stats: (2, G, I) float32 (float64 for float64), mean and rstd of x: relu((x - mean) * rstd), rounded to the
            dtype of x, goes into the convolution; None: x itself does.
        overwrite: that normalised input may replace x, which saves a pass over fresh memory.
        stride: of the convolution, whose padding is k // 2.
        shortcut_weight: (O', I, 1, 1): a second convolution of the same input, with the same stride.
        backend: auto, reference or cpp.
    Returns:
        y (G*N, O, H', W'), channels_last, dtype of x, and its statistics; the same of the shortcut.
    Raises:
        TypeError: a dtype not listed, or two that differ.
        ValueError: a shape, layout or device that does not fit, with both shapes.
        InputError: groups that do not divide the batch or are left with fewer than 2 values a channel, or a stride
            below 1.
    """
    check_images("x", x)
    check_groups(x, num_groups)
    if stats is not None:
        check_statistics("stats", stats, x, (2, num_groups, x.shape[1]))
    if stride < 1:
        raise InputError(f"stride must be at least 1; got {stride}")
    for name, w in (("weight", weight), ("shortcut_weight", shortcut_weight)):
        if w is None:
            continue
        if w.dtype != x.dtype:
            raise TypeError(f"{name} is {w.dtype}; it must be {x.dtype}, as x is")
        if w.ndim != 4 or w.shape[1] != x.shape[1] or w.shape[2] != w.shape[3] or w.shape[2] % 2 == 0:
            raise ValueError(f"{name} must be (O, {x.shape[1]}, k, k) with an odd k; got {tuple(w.shape)}")
        if w.device != x.device:
            raise ValueError(f"{name} is on {w.device}; it must be on {x.device}, as x is")
    if stats is not None:
        normalised = x if overwrite else torch.empty_like(x)
        bn_add_relu_pool(x, stats, full=normalised, backend=backend)
        x = normalised
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    shortcut = None if shortcut_weight is None else F.conv2d(x, shortcut_weight, stride=stride)
    return ConvBn(
        y,
        batch_statistics(y, num_groups, backend=backend),
        shortcut,
        None if shortcut is None else batch_statistics(shortcut, num_groups, backend=backend),
    )


def batch_statistics(x: Tensor, num_groups: int, *, backend: str = "auto") -> Tensor:
    """Mean and 1 / sqrt(biased variance + EPS) of each channel in each statistics group.

    Args:
        x: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        num_groups: G statistics groups of N consecutive images each.
        backend: auto, reference or cpp.
    Returns:
        (2, G, C) float32 (float64 for float64). Nothing cancels: 262,144 values of mean 1000 and variance 1 keep their
        variance. NaN propagates to its channel.
    Raises:
        TypeError, ValueError, InputError: as `conv_bn`.
    """
    check_images("x", x)
    check_groups(x, num_groups)
    available = ("reference",) if x.dtype == torch.float64 else None
    if resolve("batch_statistics", backend, available, x.device) == "reference":
        return batch_statistics_reference(x, num_groups)
    return torch.ops.bmsn.batch_statistics(x, num_groups)


def batch_statistics_reference(x: Tensor, num_groups: int) -> Tensor:
    values = x.to(torch.promote_types(x.dtype, torch.float32)).permute(0, 2, 3, 1)
    variance, mean = torch.var_mean(values.reshape(*group_shape(x, num_groups)), 1, correction=0)
    return torch.stack([mean, (variance + EPS).rsqrt()])


def _empty_statistics(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((2, num_groups, x.shape[1]), dtype=torch.float32)


@torch.library.impl("bmsn::batch_statistics", "CPU")
def _batch_statistics_cpu(x: Tensor, num_groups: int) -> Tensor:
    stats = _empty_statistics(x, num_groups)
    loaded_extension().batch_statistics(
        *(group_shape(x, num_groups), x.dtype == torch.bfloat16, x.data_ptr()),
        *(stats.data_ptr(), EPS, torch.get_num_threads()),
    )
    return stats


@torch.library.register_fake("bmsn::batch_statistics")
def _batch_statistics_fake(x: Tensor, num_groups: int) -> Tensor:
    return _empty_statistics(x, num_groups)
