"""Convolutions of stacked states: normalise + ReLU on load, statistics of the output on store, a shortcut riding along.

    y[g] = conv(a[g], weight[weight_index[g]]),  a[g] = relu((x[g] - mean[g]) * rstd[g]) or x[g],  padding (k - 1) / 2

for the images of statistics group g (one state's batch). y is not normalised: it comes with its own mean and
rstd = 1 / sqrt(variance + EPS), the variance biased, which the next op applies. `conv_scale` is the variant for frozen
statistics.

Source: Ioffe & Szegedy 2015, alg. 1 without the affine step; Javan et al. 2023, section 2.3 for what is stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bmsn.backend import resolve
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool, normalise
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
from bmsn.ops.convolution import (
    Branch,
    check_convolution,
    check_weight,
    convolve,
    convolve_cpp,
    empty_map,
    has_cpp_convolution,
    output_shape,
)
from bmsn.ops.convolution_choice import takes_library
from bmsn.ops.norm_relu import EPS

torch.library.define(
    "bmsn::conv_bn",
    "(Tensor x, Tensor weight, int num_groups, Tensor? stats, Tensor? weight_index, int stride, "
    "Tensor? shortcut_weight, str backend) -> Tensor[]",
)
torch.library.define("bmsn::batch_statistics", "(Tensor x, int num_groups, str backend) -> Tensor")


class ConvBn(NamedTuple):
    """What `conv_bn` returns.

    Attributes:
        y: (G*N, O, ceil(H / stride), ceil(W / stride)), channels_last, dtype of x: the convolution, not normalised.
        stats: (2, G, O) float32 (float64 for float64): mean and rstd of y, for each group and channel; no elements
            where they are not wanted.
        shortcut: like y, of the shortcut's convolution; None where there is none.
        shortcut_stats: like stats, of `shortcut`.
    """

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
    weight_index: Tensor | None = None,
    stride: int = 1,
    shortcut_weight: Tensor | None = None,
    measure: bool = True,
    into: Sequence[Tensor] = (),
    backend: str = "auto",
) -> ConvBn:
    """Convolves every group with its weight set and returns the output with its statistics. Forward only.

    Args:
        x: (G*N, I, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        weight: (S, O, I, k, k), k 1 or 3, dtype of x, in (S, O, kh, kw, I) order, dense but for the stride of S.
        num_groups: G statistics groups of N consecutive images, N*H*W at most 2^31 - 2^16.
        stats: (2, G, I) float32 (float64 for float64): mean and rstd of x. Given, the convolution's input is
            relu((x - mean) * rstd), computed in that dtype and rounded to that of x; padding is 0 after it.
        overwrite: that input may replace x, which spares a backend that normalises in a pass of its own fresh memory.
        weight_index: (G,) int32: the weight set of each group, 0..S-1 (not checked: that would wait for the GPU).
            None: 0 for all. Our CPU kernel does look, and raises IndexError.
        stride: 1 or 2.
        shortcut_weight: (S, O, I, 1, 1), like `weight`: a 1x1 convolution of the same input with the same stride.
        measure: whether the statistics of y and of the shortcut are wanted.
        into: memory for y and, where there is one, for the shortcut, apart from all that is read; it may be what is
            returned. Our CPU kernel is spared pages that were never touched, which are slow to write to.
        backend: auto, reference, cpp (one kernel of ours; or C++ normalises, then each convolution is ours or
            oneDNN's, which C++ measures: see `bmsn.ops.convolution`) or triton (ours or cuDNN's: see
            `bmsn.ops.convolution_choice`).
    Returns:
        See `ConvBn`. Sums in float32; statistics of the stored values, or of those before rounding. NaN propagates.
    Raises:
        InputError: a dtype, rank, layout, device or shape not listed, or a group with fewer than 2 values of y.
    """
    check_convolution(x, weight, num_groups, weight_index, stride)
    if stats is not None:
        check_dense("stats", stats, x, (2, num_groups, x.shape[1]), accumulator_dtype(x))
    if shortcut_weight is not None:
        check_weight("shortcut_weight", shortcut_weight, x, (*weight.shape[:3], 1, 1))
    shape = output_shape(x, weight, stride)
    if measure:
        check_group_values(shape[0] // num_groups * shape[2] * shape[3])
    chosen = _resolve("conv_bn", x, backend)
    weights = (weight,) if shortcut_weight is None else (weight, shortcut_weight)
    for y in into:
        check_same_kind("into", y, x, shape)
    if (into or not measure) and chosen == "cpp" and _is_fused(x, weights, stride, stats):
        return _as_conv_bn(_fused_cpp(x, weights, num_groups, stats, weight_index, measure, into))
    if stats is not None and not (measure and chosen != "cpp"):  # a pass of its own
        x = _normalised(x, stats, chosen, x if overwrite else None)
        stats = None
    if not measure:
        return _as_conv_bn(
            [t for w in weights for t in _convolved(x, w, num_groups, weight_index, stride, chosen, measure=False)]
        )
    out = torch.ops.bmsn.conv_bn(x, weight, num_groups, stats, weight_index, stride, shortcut_weight, chosen)
    return _as_conv_bn(out)


def batch_statistics(x: Tensor, num_groups: int, *, backend: str = "auto") -> Tensor:
    """Mean and rstd of every group and channel of a map that another library convolved. Forward only.

    Args:
        x: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only).
        num_groups: G statistics groups of N consecutive images, N*H*W at most 2^31 - 2^16.
        backend: auto, reference, cpp or triton.
    Returns:
        (2, G, C) float32 (float64 for float64); no sum of squares is kept, so a large mean cancels nothing.
    Raises:
        InputError: a dtype, rank or layout not listed, or a group with fewer than 2 values.
    """
    check_feature_map("x", x)
    check_groups(x, num_groups)
    check_group_values(len(x) // num_groups * x.shape[2] * x.shape[3])
    return torch.ops.bmsn.batch_statistics(x, num_groups, _resolve("batch_statistics", x, backend))


def conv_bn_reference(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    stats: Tensor | None = None,
    weight_index: Tensor | None = None,
    stride: int = 1,
    shortcut_weight: Tensor | None = None,
) -> list[Tensor]:
    a = x if stats is None else normalise(x, stats).relu_()
    found = []
    for w in (weight,) if shortcut_weight is None else (weight, shortcut_weight):
        y = convolve(a, w, num_groups, weight_index, stride)
        found += [y, batch_statistics_reference(y, num_groups)]
    return found


def batch_statistics_reference(x: Tensor, num_groups: int) -> Tensor:
    stats = _empty_stats(x, num_groups, x.shape[1])
    zeros = torch.zeros_like(stats[0, 0])  # in the dtype that torch shall keep its sums in
    for g, group in enumerate(x.chunk(num_groups)):
        if x.dtype == torch.bfloat16:  # ten times as fast here; its sums lose digits of a large mean in float32
            mean, variance = torch.batch_norm_update_stats(group, zeros, zeros.clone(), 0.0)
        else:
            variance, mean = torch.var_mean(group, (0, 2, 3), correction=0)
        stats[0, g], stats[1, g] = mean, (variance + EPS).rsqrt()
    return stats


def _statistics_cpp(x: Tensor, num_groups: int) -> Tensor:
    stats = _empty_stats(x, num_groups, x.shape[1])
    loaded_extension().batch_statistics(
        *(group_shape(x, num_groups), x.dtype == torch.bfloat16, x.data_ptr()),
        *(stats.data_ptr(), EPS, torch.get_num_threads()),
    )
    return stats


def _as_conv_bn(out: Sequence[Tensor]) -> ConvBn:
    return ConvBn(out[0], out[1], *((out[2], out[3]) if len(out) == 4 else (None, None)))


def _is_fused(x: Tensor, weights: Sequence[Tensor], stride: int, stats: Tensor | None) -> bool:
    """Whether C++ normalises, convolves and takes statistics at once."""
    return all(has_cpp_convolution(x, w, stride) for w in weights) and (stats is None or x.shape[1] % 16 == 0)


def _fused_cpp(
    x: Tensor,
    weights: Sequence[Tensor],
    num_groups: int,
    stats: Tensor | None,
    weight_index: Tensor | None,
    measure: bool = True,
    into: Sequence[Tensor] = (),
) -> list[Tensor]:
    maps = list(into) or [empty_map(x, w, 1) for w in weights]
    stats_out = [_empty_stats(x, num_groups if measure else 0, w.shape[1]) for w in weights]
    branches = [Branch(*branch) for branch in zip(weights, maps, stats_out, strict=True)]
    convolve_cpp(x, branches, num_groups, stats=stats, weight_index=weight_index)
    return [tensor for pair in zip(maps, stats_out, strict=True) for tensor in pair]


def _convolved(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    weight_index: Tensor | None,
    stride: int,
    backend: str,
    *,
    measure: bool = True,
) -> list[Tensor]:
    """One convolution of x as it is, and its statistics where they are wanted."""
    if backend == "cpp" and has_cpp_convolution(x, weight, stride):
        return _fused_cpp(x, [weight], num_groups, None, weight_index, measure)
    y = convolve(x, weight, num_groups, weight_index, stride)
    if not measure:
        return [y, _empty_stats(x, 0, y.shape[1])]
    return [y, torch.ops.bmsn.batch_statistics(y, num_groups, backend)]


def _normalised(x: Tensor, stats: Tensor, backend: str, to: Tensor | None = None) -> Tensor:
    """relu((x - mean) * rstd), in `to` or in memory of its own."""
    to = torch.empty_like(x) if to is None else to
    bn_add_relu_pool(x, stats, full=to, backend=backend)
    return to


def _resolve(op: str, x: Tensor, backend: str) -> str:
    available = ("reference",) if x.dtype == torch.float64 else None
    return resolve(op, backend, available, x.device)


# Outputs, by the same functions for the kernels and for the fake ones. ------------------------------------------------


def _empty_stats(x: Tensor, num_groups: int, channels: int) -> Tensor:
    return x.new_empty((2, num_groups, channels), dtype=accumulator_dtype(x))


def _empty_conv_bn(
    x: Tensor, weight: Tensor, num_groups: int, stride: int, shortcut_weight: Tensor | None
) -> list[Tensor]:
    branches = 1 if shortcut_weight is None else 2
    return [
        tensor
        for _ in range(branches)
        for tensor in (empty_map(x, weight, stride), _empty_stats(x, num_groups, weight.shape[1]))
    ]


# Every backend behind one name on every device, so that Triton's interpreter is reached like Triton on a GPU. ---------


@torch.library.impl("bmsn::conv_bn", "CompositeExplicitAutograd")
def _conv_bn_impl(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    stats: Tensor | None,
    weight_index: Tensor | None,
    stride: int,
    shortcut_weight: Tensor | None,
    backend: str,
) -> list[Tensor]:
    if backend == "reference":
        return conv_bn_reference(x, weight, num_groups, stats, weight_index, stride, shortcut_weight)
    weights = (weight,) if shortcut_weight is None else (weight, shortcut_weight)
    if backend == "cpp" and _is_fused(x, weights, stride, stats):
        return _fused_cpp(x, weights, num_groups, stats, weight_index)
    if backend == "cpp" or takes_library(weight):
        if stats is not None:
            x = _normalised(x, stats, backend)
        return [t for w in weights for t in _convolved(x, w, num_groups, weight_index, stride, backend)]
    from bmsn.kernels.conv_bn import launch_conv_bn

    out = _empty_conv_bn(x, weight, num_groups, stride, shortcut_weight)
    launch_conv_bn(x, weight, num_groups, stats, weight_index, stride, shortcut_weight, *out)
    return out


@torch.library.impl("bmsn::batch_statistics", "CompositeExplicitAutograd")
def _batch_statistics_impl(x: Tensor, num_groups: int, backend: str) -> Tensor:
    if backend == "reference":
        return batch_statistics_reference(x, num_groups)
    if backend == "cpp":
        return _statistics_cpp(x, num_groups)
    from bmsn.kernels.statistics import launch_batch_statistics

    stats = _empty_stats(x, num_groups, x.shape[1])
    launch_batch_statistics(x, num_groups, stats)
    return stats


@torch.library.register_fake("bmsn::conv_bn")
def _conv_bn_fake(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    stats: Tensor | None,
    weight_index: Tensor | None,
    stride: int,
    shortcut_weight: Tensor | None,
    backend: str,
) -> list[Tensor]:
    return _empty_conv_bn(x, weight, num_groups, stride, shortcut_weight)


@torch.library.register_fake("bmsn::batch_statistics")
def _batch_statistics_fake(x: Tensor, num_groups: int, backend: str) -> Tensor:
    return _empty_stats(x, num_groups, x.shape[1])
