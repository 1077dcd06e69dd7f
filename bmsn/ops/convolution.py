"""What the convolving ops share: their checks, the shape of what they return, torch's own convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.checks import check_feature_map, check_groups, check_rows, check_weight_index


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


def convolve(x: Tensor, weight: Tensor, num_groups: int, weight_index: Tensor | None, stride: int) -> Tensor:
    """By torch's own convolution, all groups at once where they share their weights."""
    padding = weight.shape[-1] // 2
    if weight_index is None:
        y = F.conv2d(x, weight[0], stride=stride, padding=padding)
        return y.contiguous(memory_format=torch.channels_last)
    y = empty_map(x, weight, stride)
    for g, (group, out) in enumerate(zip(x.chunk(num_groups), y.chunk(num_groups), strict=True)):
        row = weight.index_select(0, weight_index[g : g + 1])[0]
        out.copy_(F.conv2d(group, row, stride=stride, padding=padding))
    return y
