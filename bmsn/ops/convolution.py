"""What the convolving ops share: their checks, the shape of what they return, torch's own convolution and ours.

Ours normalises what it loads and takes statistics of what it stores. In bfloat16, for CPUs with AVX512-BF16, it is 3x3
or 1x1: at 16 to 128 channels 570 to 890 GFLOP/s on two cores of a Zen 5, oneDNN's without any of that 360 to 900. Where
a CPU has AMX, oneDNN's is taken. In float32, for CPUs with AVX-512, it is 3x3 by Winograd's F(2x2, 3x3), for maps and
batches of some size (measured on a Skylake Xeon; see `benchmarks/bench_conv2d.py`); an infinity may become NaN in it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.ops.checks import check_feature_map, check_groups, check_rows, check_weight_index, loaded_extension
from bmsn.ops.norm_relu import EPS

MAX_CHANNELS = 128  # up to which ours was measured to pay
MIN_MAP, MIN_PIXELS = 64, 512  # of a map and of a batch: from which on it does in float32


def check_convolution(x: Tensor, weight: Tensor, num_groups: int, weight_index: Tensor | None, stride: int) -> None:
    check_feature_map("x", x)
    check_groups(x, num_groups)
    if stride not in (1, 2):
        raise InputError(f"stride must be 1 or 2; got {stride}")
    kernel = weight.shape[-1] if weight.ndim == 5 and weight.shape[-1] in (1, 3) else "k"
    check_weight("weight", weight, x, ("S", "O", x.shape[1], kernel, kernel))
    check_weight_index(weight_index, x, num_groups)


def check_weight(name: str, weight: Tensor, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """`shape` says what is fixed by a number, and what is free, but not 0, by a letter."""
    fits = weight.ndim == 5 and all(
        size == wanted if isinstance(wanted, int) else wanted != "k" and size > 0
        for size, wanted in zip(weight.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise InputError(f"{name} must be ({wanted}), k 1 or 3, none of them 0; got {tuple(weight.shape)}")
    check_rows(name, weight, x, x.dtype)


def output_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    return len(x), weight.shape[1], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1


def empty_map(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    shape = output_shape(x, weight, stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Within it cuDNN convolves float32 as IEEE float32 instead of TF32, its default with 10 bits of each factor.

    The setting is the process's and is put back in the end. On a CPU nothing is touched.
    """
    settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch's hints lack it
    if device.type != "cuda" or settings.fp32_precision != "tf32":
        yield
        return
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "tf32"


def convolve(x: Tensor, weight: Tensor, num_groups: int, weight_index: Tensor | None, stride: int) -> Tensor:
    """By torch's own convolution, in float32 without TF32; all groups at once where they share their weights."""
    padding = weight.shape[-1] // 2
    with without_tf32(x.device):
        if weight_index is None:
            y = F.conv2d(x, weight[0], stride=stride, padding=padding)
            return y.contiguous(memory_format=torch.channels_last)
        y = empty_map(x, weight, stride)
        for g, (group, out) in enumerate(zip(x.chunk(num_groups), y.chunk(num_groups), strict=True)):
            row = weight.index_select(0, weight_index[g : g + 1])[0]
            out.copy_(F.conv2d(group, row, stride=stride, padding=padding))
    return y


def has_cpp_convolution(x: Tensor, weight: Tensor, stride: int = 1) -> bool:
    """Whether the C++ kernel has this convolution.

    Args:
        x: (B, I, H, W), I at most `MAX_CHANNELS`. In bfloat16 W is a multiple of 4; in float32 H and W of 2, I of 16,
            H * W is at least `MIN_MAP`, B * H * W `MIN_PIXELS`.
        weight: (..., O, I, k, k), k 3, in bfloat16 also 1, O a multiple of 16 and at most `MAX_CHANNELS`. Both are
            bfloat16 or float32, and lie with the channels last, which is checked of x alone.
        stride: of the convolution, 1.
    """
    outputs, inputs, *kernel = weight.shape[-4:]
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and x.dtype == weight.dtype
        and stride == 1
        and (_fits_half if x.dtype == torch.bfloat16 else _fits_winograd)(x, inputs, kernel)
        and outputs % 16 == 0
        and max(inputs, outputs) <= MAX_CHANNELS
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and _has_kernel(x.dtype)
    )


def _fits_half(x: Tensor, inputs: int, kernel: list[int]) -> bool:
    return kernel in ([1, 1], [3, 3]) and x.shape[3] % 4 == 0


def _fits_winograd(x: Tensor, inputs: int, kernel: list[int]) -> bool:
    images, _, height, width = x.shape
    is_large = height * width >= MIN_MAP and images * height * width >= MIN_PIXELS
    is_even = height % 2 == width % 2 == 0
    return x.dtype == torch.float32 and kernel == [3, 3] and is_even and is_large and inputs % 16 == 0


@functools.cache
def _has_kernel(dtype: torch.dtype) -> bool:
    module = extension()
    is_half = dtype == torch.bfloat16
    if module is None or (is_half and torch.cpu._is_amx_tile_supported()):
        return False
    return module.has_conv_forward(is_half)


class Branch(NamedTuple):
    """One of the convolutions that read the same map.

    Attributes:
        weight: (S, O, I, k, k), as `has_cpp_convolution` wants it.
        y: (B, O, H, W), dtype of the map, channels_last: gets the result.
        stats: (2, G, O) float32, contiguous: gets mean and rstd of y; None or no elements: not wanted.
        transposed: the map is the gradient of a convolution's output, (B, O, H, W), and y, (B, I, H, W), gets that of
            its input; then I is the multiple of 16, and O even.
        scale, shift: (G, O) float32, contiguous: y is multiplied and shifted by them; None: neither. Not with stats.
        shortcut: like y, added after that; None: nothing is.
        relu: whether ReLU comes last, with a scale.
        masked_by: (B, I, H, W), like y, with transposed: y is 0 where it is not greater than its mean, as ReLU behind
            its normalisation makes it, and `stats`, which must be there, gets the two terms of `norm_gradient`; None:
            not masked.
        masked_stats: (2, G, I) float32, contiguous: mean and rstd of masked_by.
    """

    weight: Tensor
    y: Tensor
    stats: Tensor | None = None
    transposed: bool = False
    scale: Tensor | None = None
    shift: Tensor | None = None
    shortcut: Tensor | None = None
    relu: bool = False
    masked_by: Tensor | None = None
    masked_stats: Tensor | None = None


def convolve_cpp(
    x: Tensor,
    branches: Sequence[Branch],
    num_groups: int = 1,
    *,
    stats: Tensor | None = None,
    weight_index: Tensor | None = None,
) -> None:
    """The C++ kernel, for what `has_cpp_convolution` accepts; x, num_groups, stats and weight_index as in `conv_bn`.

    With stats, the channels of x are a multiple of 16. Fake tensors have no memory: nothing is done.
    """
    if isinstance(x, FakeTensor):
        return

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()

    def described(branch: Branch) -> tuple[object, ...]:
        weight, y = branch.weight, branch.y
        scaled = tuple(map(address, (branch.scale, branch.shift, branch.shortcut)))
        return (
            *(weight.shape[-1], y.shape[1], weight.data_ptr(), len(weight), weight.stride(0), branch.transposed),
            *(y.data_ptr(), address(branch.stats), scaled, branch.relu),
            tuple(map(address, (branch.masked_by, branch.masked_stats))),
        )

    loaded_extension().conv_forward(
        (num_groups, len(x) // num_groups, x.shape[2], x.shape[3], x.shape[1]),
        *(x.dtype == torch.bfloat16, x.data_ptr(), address(stats), address(weight_index)),
        [described(branch) for branch in branches],
        *(EPS, torch.get_num_threads()),
    )
