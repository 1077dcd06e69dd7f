"""Convolution with padding k // 2, differentiable once, by C++ kernels of ours where a CPU's oneDNN is slower.

    dx[n,i,h,w] = sum over o, r, s of grad[n,o,h-r+1,w-s+1] * w[o,i,r,s]
    dw[o,i,r,s] = sum over n, h, w of grad[n,o,h,w] * x[n,i,h+r-1,w+s-1]

`normed_conv2d` is that of relu(norm(x)), which ours never writes to memory: x is normalised while it is loaded, forward
and again for dw, and ReLU's mask and the sums of the normalisation's gradient are taken while dx is stored.

In bfloat16, 3x3, at 16 to 64 channels, on two cores of a Zen 5: forward pass and data gradient 640 to 860 GFLOP/s,
where oneDNN has 380 to 850, the less the narrower; weight gradients 370 to 480 a core against 180 to 360. With AMX,
oneDNN's own are taken. In float32, 3x3, at 16 to 128 channels, on two cores of a Skylake Xeon with AVX-512, against
oneDNN's between sweeps that do the rest: forward 1.6 to 2.0 times as fast, the data gradient 1.4 to 1.7 times, the
weight gradient 1.1 to 1.7 times (`benchmarks/bench_conv2d.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import extension, resolve
from bmsn.ops.checks import check_dense, group_shape, loaded_extension
from bmsn.ops.convolution import Branch, convolve_cpp, has_cpp_convolution
from bmsn.ops.norm_relu import norm_relu

MAX_CHANNELS = {torch.bfloat16: 64, torch.float32: 128}  # up to which the weight gradient was measured to pay
MIN_PIXELS = 2048  # of a batch, from which on it does in float32
CHOICES = ("cpp", "triton", "reference")  # where all ops shall run in Triton, convolutions are torch's

# stats: mean and rstd of x, where relu(norm(x)) is convolved.
torch.library.define(
    "bmsn::conv_forward",
    "(Tensor x, Tensor weight, Tensor? stats, bool transposed, bool measure) -> (Tensor y, Tensor stats)",
)
torch.library.define("bmsn::conv_weight_gradient", "(Tensor x, Tensor? stats, Tensor grad) -> Tensor")
torch.library.define("bmsn::normed_conv_gradient", "(Tensor grad, Tensor weight, Tensor x, Tensor stats) -> Tensor")


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, backend: str = "auto") -> Tensor:
    """F.conv2d(x, weight, stride=stride, padding=k // 2), differentiable once.

    Args:
        x: (B, I, H, W); weight: (O, I, k, k), of its dtype; both channels_last where C++ shall run.
        stride: of the convolution.
        backend: auto, reference (all torch's) or cpp; asked for where both could run, see `has_cpp_convolution`
            (forward pass and data gradient) and `has_cpp_gradient`.
    Raises:
        What torch raises.
    """
    return _run(x, weight, stride, backend, measure=False)[0]


def measured_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """`conv2d` and, where they cost nothing, mean and rstd of the result, (2, 1, O) float32; they have no gradient."""
    return _run(x, weight, stride, backend, measure=True)


def normed_conv2d(
    x: Tensor, weight: Tensor, *, stats: Tensor | None, stride: int = 1, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """`measured_conv2d` of relu(norm(x)), where norm is BatchNorm over the batch without an affine step.

    Args:
        x, weight, stride, backend: as in `conv2d`.
        stats: (2, 1, I) float32 (float64 for float64), contiguous: mean and rstd of x, as the convolution before has
            measured them; the gradient is as if they had been taken here. None: they are.
    Raises:
        InputError: as `bmsn.ops.norm_relu.norm_relu`. What torch raises.
    """
    if stats is not None and _is_normed_ours(x, weight, stride) and resolve("conv2d", backend, CHOICES) == "cpp":
        check_dense("stats", stats, x, (2, 1, x.shape[1]), torch.float32)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _NormedConv2d.apply(x, weight, stats)
        return torch.ops.bmsn.conv_forward(x, weight, stats, False, True)
    x = norm_relu(x, stats=None if stats is None else stats[None], backend=backend)
    return measured_conv2d(x, weight, stride=stride, backend=backend)


def _run(x: Tensor, weight: Tensor, stride: int, backend: str, *, measure: bool) -> tuple[Tensor, Tensor | None]:
    if not _is_ours(x, weight, stride) or resolve("conv2d", backend, CHOICES) != "cpp":
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y, stats = _Conv2d.apply(x, weight, measure)
    else:
        y, stats = torch.ops.bmsn.conv_forward(x, weight, None, False, measure)
    return y, stats if measure else None


def _is_normed_ours(x: Tensor, weight: Tensor, stride: int) -> bool:
    """With both gradients, so that relu(norm(x)) is not wanted after all."""
    return stride == 1 and _is_ours(x, weight, stride) and has_cpp_gradient(x, weight)


def _is_ours(x: Tensor, weight: Tensor, stride: int) -> bool:
    return (
        x.shape[1:2] == weight.shape[1:2]
        and x.device == weight.device
        and weight.is_contiguous(memory_format=torch.channels_last)
        and has_cpp_convolution(x, weight, stride)
        and not torch.is_autocast_enabled(x.device.type)  # which casts what torch convolves
    )


def has_cpp_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether C++ has the weight gradient of this convolution: 3x3, 16 to `MAX_CHANNELS` channels, and what
    `has_cpp_convolution` asks for: bfloat16 and a width in fours, or float32 and even maps of some size."""
    out_channels, in_channels, *kernel = weight.shape
    return (
        has_cpp_convolution(x, weight)
        and kernel == [3, 3]
        and in_channels % 16 == 0
        and max(in_channels, out_channels) <= MAX_CHANNELS[x.dtype]
        and (x.dtype == torch.bfloat16 or x.numel() >= MIN_PIXELS * in_channels)
        and _has_weight_gradient(x.dtype)
    )


@functools.cache
def _has_weight_gradient(dtype: torch.dtype) -> bool:
    module = extension()
    return module is not None and module.has_conv_weight_gradient(dtype == torch.bfloat16)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, measure: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        y, stats = torch.ops.bmsn.conv_forward(x, weight, None, False, measure)
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        wanted = list(ctx.needs_input_grad[:2])
        dx = dw = None
        if wanted[0] and has_cpp_convolution(grad, weight.transpose(0, 1)):
            dx, wanted[0] = torch.ops.bmsn.conv_forward(grad, weight, None, True, False)[0], False
        if wanted[1] and has_cpp_gradient(x, weight):
            dw, wanted[1] = torch.ops.bmsn.conv_weight_gradient(x, None, grad), False
        if any(wanted):
            padding = [weight.shape[-1] // 2] * 2
            places = ([1, 1], padding, [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, ..., groups
            theirs = torch.ops.aten.convolution_backward(grad, x, weight, None, *places, (*wanted, False))
            dx, dw = (ours if ours is not None else other for ours, other in zip((dx, dw), theirs, strict=False))
        return dx, dw, None


class _NormedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, stats)
        y, of_y = torch.ops.bmsn.conv_forward(x, weight, stats, False, True)
        ctx.mark_non_differentiable(of_y)
        return y, of_y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, stats = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = torch.ops.bmsn.normed_conv_gradient(grad, weight, x, stats) if ctx.needs_input_grad[0] else None
        dw = torch.ops.bmsn.conv_weight_gradient(x, stats, grad) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _outputs(x: Tensor, weight: Tensor, transposed: bool, measure: bool) -> tuple[Tensor, Tensor]:
    """Empty y and stats; no elements of these where they are not wanted."""
    channels = weight.shape[int(transposed)]
    y = x.new_empty((len(x), *x.shape[2:], channels)).permute(0, 3, 1, 2)  # channels_last
    return y, x.new_empty((2, 1, channels) if measure else 0, dtype=torch.float32)


@torch.library.impl("bmsn::conv_forward", "CPU")
def _conv_forward_cpu(
    x: Tensor, weight: Tensor, stats: Tensor | None, transposed: bool, measure: bool
) -> tuple[Tensor, Tensor]:
    y, of_y = _outputs(x, weight, transposed, measure)
    convolve_cpp(x, [Branch(weight[None], y, of_y, transposed)], stats=stats)
    return y, of_y


@torch.library.register_fake("bmsn::conv_forward")
def _conv_forward_fake(
    x: Tensor, weight: Tensor, stats: Tensor | None, transposed: bool, measure: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, transposed, measure)


def _empty_weight(x: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty((grad.shape[1], 3, 3, x.shape[1])).permute(0, 3, 1, 2)  # channels_last


@torch.library.impl("bmsn::conv_weight_gradient", "CPU")
def _conv_weight_gradient_cpu(x: Tensor, stats: Tensor | None, grad: Tensor) -> Tensor:
    dw = _empty_weight(x, grad)
    images, in_channels, height, width = x.shape
    shape = (images, height, width, in_channels, grad.shape[1])
    addresses = (x.data_ptr(), 0 if stats is None else stats.data_ptr(), grad.data_ptr(), dw.data_ptr())
    loaded_extension().conv_weight_gradient(shape, x.dtype == torch.bfloat16, *addresses, torch.get_num_threads())
    return dw


@torch.library.register_fake("bmsn::conv_weight_gradient")
def _conv_weight_gradient_fake(x: Tensor, stats: Tensor | None, grad: Tensor) -> Tensor:
    return _empty_weight(x, grad)


@torch.library.impl("bmsn::normed_conv_gradient", "CPU")
def _normed_conv_gradient_cpu(grad: Tensor, weight: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    e, line = _outputs(grad, weight, True, True)
    convolve_cpp(grad, [Branch(weight[None], e, line, True, masked_by=x, masked_stats=stats)])
    addresses = (t.data_ptr() for t in (e, x, stats, line, e))
    loaded_extension().norm_gradient(group_shape(x, 1), x.dtype == torch.bfloat16, *addresses, torch.get_num_threads())
    return e


@torch.library.register_fake("bmsn::normed_conv_gradient")
def _normed_conv_gradient_fake(grad: Tensor, weight: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    return _outputs(grad, weight, True, False)[0]
