"""Convolution with frozen BatchNorm, shortcut and ReLU behind it, all before the result is stored.

    y[g] = relu(conv(x[g], weight[weight_index[g]]) * scale[g] + shift[g] + shortcut[g]),  padding (k - 1) / 2

for the images of group g; ReLU and shortcut where they are asked for. With scale = rstd and shift = -mean * rstd this
is BatchNorm by statistics that were measured before.

In C++ where `has_cpp_convolution` says so. Elsewhere on a CPU a sweep of its own is as fast: oneDNN's convolution with
scaled weights, a bias and ReLU at its end took 6 to 12 % more than the bare one.

Source: Ioffe & Szegedy 2015, section 3.1 (inference), without the affine step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmsn.backend import convolution_choice, resolve
from bmsn.ops.bn_add_relu_pool import per_image
from bmsn.ops.checks import accumulator_dtype, check_dense, check_same_kind
from bmsn.ops.convolution import (
    Branch,
    check_convolution,
    convolve,
    convolve_cpp,
    empty_map,
    has_cpp_convolution,
    output_shape,
)

torch.library.define(
    "bmsn::conv_scale",
    "(Tensor x, Tensor weight, int num_groups, Tensor scale, Tensor shift, bool relu, Tensor? shortcut, "
    "Tensor? weight_index, int stride, str backend) -> Tensor",
)


def conv_scale(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    *,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    shortcut: Tensor | None = None,
    weight_index: Tensor | None = None,
    stride: int = 1,
    into: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """conv(x, weight[weight_index[g]]) * scale[g] + shift[g], + shortcut, ReLU: BatchNorm frozen. Forward only.

    Args:
        x, weight, num_groups, weight_index, stride: as in `conv_bn`; a group may be a single image.
        scale, shift: (G, O) float32 (float64 for float64): rstd and -mean * rstd of the frozen statistics.
        relu: whether ReLU comes last.
        shortcut: what is added before ReLU, of the output's shape, layout and dtype.
        into: memory for the result, apart from all that is read; it is what is returned.
        backend: auto, reference, triton, or cpp where `has_cpp_convolution` says so.
    Returns:
        (G*N, O, ceil(H / stride), ceil(W / stride)), channels_last, dtype of x. rounded to it no earlier than at the
        end where the kernel is ours. NaN propagates.
    Raises:
        InputError: as `conv_bn`, but for the size of a group.
    """
    check_convolution(x, weight, num_groups, weight_index, stride)
    shape = output_shape(x, weight, stride)
    for name, tensor in (("scale", scale), ("shift", shift)):
        check_dense(name, tensor, x, (num_groups, shape[1]), accumulator_dtype(x))
    if shortcut is not None:
        check_same_kind("shortcut", shortcut, x, shape)
    available = ["reference"] if x.dtype == torch.float64 else ["triton", "reference"]
    if has_cpp_convolution(x, weight, stride):
        available.insert(0, "cpp")
    chosen = resolve("conv_scale", backend, available, x.device)
    arguments = (x, weight, num_groups, scale, shift, relu, shortcut, weight_index, stride)
    if into is None:
        return torch.ops.bmsn.conv_scale(*arguments, chosen)
    check_same_kind("into", into, x, shape)
    _write(*arguments, chosen, into)
    return into


def conv_scale_reference(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    shortcut: Tensor | None = None,
    weight_index: Tensor | None = None,
    stride: int = 1,
    into: Tensor | None = None,
) -> Tensor:
    y = convolve(x, weight, num_groups, weight_index, stride)
    scale, shift = (per_image(t, len(x)) for t in (scale, shift))
    z = y.to(scale.dtype) * scale + shift
    if shortcut is not None:
        z = z + shortcut
    return (y if into is None else into).copy_(z.relu() if relu else z)


def _write(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    shortcut: Tensor | None,
    weight_index: Tensor | None,
    stride: int,
    backend: str,
    y: Tensor,
) -> None:
    if backend == "triton" and convolution_choice() != "library":
        from bmsn.kernels.conv_bn import launch_conv_scale

        launch_conv_scale(x, weight, num_groups, scale, shift, relu, shortcut, weight_index, stride, y)
    elif backend == "cpp":
        branch = Branch(weight, y, scale=scale, shift=shift, shortcut=shortcut, relu=relu)
        convolve_cpp(x, [branch], num_groups, weight_index=weight_index)
    else:
        conv_scale_reference(x, weight, num_groups, scale, shift, relu, shortcut, weight_index, stride, y)


@torch.library.impl("bmsn::conv_scale", "CompositeExplicitAutograd")
def _conv_scale_impl(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    shortcut: Tensor | None,
    weight_index: Tensor | None,
    stride: int,
    backend: str,
) -> Tensor:
    y = empty_map(x, weight, stride)
    _write(x, weight, num_groups, scale, shift, relu, shortcut, weight_index, stride, backend, y)
    return y


@torch.library.register_fake("bmsn::conv_scale")
def _conv_scale_fake(
    x: Tensor,
    weight: Tensor,
    num_groups: int,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    shortcut: Tensor | None,
    weight_index: Tensor | None,
    stride: int,
    backend: str,
) -> Tensor:
    return empty_map(x, weight, stride)
