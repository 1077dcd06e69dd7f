"""Convolution with padding k // 2 whose weight gradient, on a CPU, is ours where oneDNN's is slow.

    dw[o,i,r,s] = sum over n, h, w of grad[n,o,h,w] * x[n,i,h+r-1,w+s-1]

oneDNN's bfloat16 weight gradients of narrow 3x3 convolutions are the slowest third of a training step: 180 to 360
GFLOP/s a core of a Zen 5 at 16 to 64 channels, where its forward passes have 350 to 470 and this one 370 to 480.
Forward pass and data gradient are torch's. With AMX, oneDNN's own are taken.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import extension, resolve
from bmsn.ops.checks import loaded_extension

MAX_CHANNELS = 64  # up to which it was measured to pay
_SAME = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups

torch.library.define("bmsn::conv_weight_gradient", "(Tensor x, Tensor grad) -> Tensor")


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, backend: str = "auto") -> Tensor:
    """F.conv2d(x, weight, stride=stride, padding=k // 2), differentiable once.

    Args:
        x: (B, I, H, W); weight: (O, I, k, k), of its dtype; both channels_last where the C++ weight gradient shall run.
        stride: of the convolution.
        backend: auto, reference (all torch's) or cpp; asked for where both could run, see `has_cpp_gradient`.
    Raises:
        What torch raises.
    """
    wanted = torch.is_grad_enabled() and weight.requires_grad
    if wanted and stride == 1 and has_cpp_gradient(x, weight) and resolve("conv2d", backend) == "cpp":
        return _Conv2d.apply(x, weight)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def has_cpp_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether C++ has the weight gradient of this convolution: 3x3, bfloat16, channels_last, 16 to 64 channels."""
    out_channels, in_channels, *kernel = weight.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and kernel == [3, 3]
        and in_channels % 16 == out_channels % 16 == 0
        and max(in_channels, out_channels) <= MAX_CHANNELS
        and x.shape[3] % 2 == 0
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and _supported()
    )


@functools.cache
def _supported() -> bool:
    module = extension()
    return module is not None and module.has_conv_weight_gradient() and not torch.cpu._is_amx_tile_supported()


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(grad, x, weight, None, *_SAME, (True, False, False))[0]
        return dx, torch.ops.bmsn.conv_weight_gradient(x, grad)


def _empty_weight(x: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty((grad.shape[1], 3, 3, x.shape[1])).permute(0, 3, 1, 2)  # channels_last


@torch.library.impl("bmsn::conv_weight_gradient", "CPU")
def _conv_weight_gradient_cpu(x: Tensor, grad: Tensor) -> Tensor:
    dw = _empty_weight(x, grad)
    images, in_channels, height, width = x.shape
    shape = (images, height, width, in_channels, grad.shape[1])
    addresses = (t.data_ptr() for t in (x, grad, dw))
    loaded_extension().conv_weight_gradient(shape, *addresses, torch.get_num_threads())
    return dw


@torch.library.register_fake("bmsn::conv_weight_gradient")
def _conv_weight_gradient_fake(x: Tensor, grad: Tensor) -> Tensor:
    return _empty_weight(x, grad)
