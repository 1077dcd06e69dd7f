"""What the ops of the evaluator ask of their tensors: feature maps in NHWC memory, rows of statistics and weights.

Every function raises InputError with the argument's name, what is accepted and what was given, and copies nothing.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bmsn.backend import extension
from bmsn.errors import InputError

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Kernels number a group's pixels in int32, with room for one more tile; addresses are int64, whatever the size.
MAX_GROUP_PIXELS = 2**31 - 2**16


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What sums and statistics of `x` are kept in: float32, or float64 for the oracle's float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_feature_map(name: str, x: Tensor) -> None:
    """(B, C, H, W), channels_last, none of them 0, of a dtype that the ops compute in."""
    if x.dtype not in FEATURE_DTYPES:
        raise InputError(f"{name} must be float32, bfloat16 or float64 (on the reference only); got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape:
        raise InputError(f"{name} must be (B, C, H, W) with at least 1 of each; got {tuple(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise InputError(
            f"{name} must be channels_last; got strides {x.stride()} for shape {tuple(x.shape)} "
            "(convert once with .contiguous(memory_format=torch.channels_last))"
        )


def check_same_kind(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """A channels_last tensor of `shape` with the dtype and device of `x`."""
    check_feature_map(name, tensor)
    if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise InputError(
            f"{name} must be {shape}, {x.dtype} on {x.device}; "
            f"got {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )


def check_groups(x: Tensor, num_groups: int) -> None:
    """`num_groups` groups of the same number of images, whose pixels can be numbered in 31 bits."""
    if num_groups < 1 or len(x) % num_groups:
        raise InputError(f"num_groups must be at least 1 and divide the batch of {len(x)} images; got {num_groups}")
    pixels = len(x) // num_groups * x.shape[2] * x.shape[3]
    if pixels > MAX_GROUP_PIXELS:
        raise InputError(f"a group must have at most {MAX_GROUP_PIXELS} pixels; got {pixels} ({tuple(x.shape)})")


def check_group_values(values: int) -> None:
    """A variance needs two values a channel in each group."""
    if values < 2:
        raise InputError(f"a statistics group needs at least 2 values in each channel; got {values}")


def check_dense(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A contiguous tensor of `shape` and `dtype` on the device of `x`: statistics, scales, labels, weight indices."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
        raise InputError(
            f"{name} must be {shape}, contiguous, {dtype} on {x.device}; "
            f"got {tuple(tensor.shape)}{layout}, {tensor.dtype} on {tensor.device}"
        )


def check_weight_index(weight_index: Tensor | None, x: Tensor, num_groups: int) -> None:
    """(G,) int32. Its values are not looked at: that would wait for the GPU."""
    if weight_index is not None:
        check_dense("weight_index", weight_index, x, (num_groups,), torch.int32)


def check_rows(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Weight sets (S, ...): each dense, with channels last if it has four dimensions; S apart by any stride."""
    if tensor.dtype != dtype or tensor.device != x.device:
        raise InputError(f"{name} must be {dtype} on {x.device}; got {tensor.dtype} on {tensor.device}")
    row = tensor[0] if len(tensor) else tensor
    if not row.is_contiguous(memory_format=torch.channels_last if row.ndim == 4 else torch.contiguous_format):
        order = "(S, O, kh, kw, I)" if row.ndim == 4 else "dimension"
        raise InputError(
            f"{name} must lie in {order} order in memory, dense but for the stride between its S rows; "
            f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        )


def group_shape(x: Tensor, num_groups: int) -> tuple[int, int, int]:
    """Groups, rows of a group (all its pixels), channels: how the C++ passes see a map."""
    return num_groups, len(x) // num_groups * x.shape[2] * x.shape[3], x.shape[1]


def loaded_extension() -> ModuleType:
    """bmsn._C. Raises RuntimeError where it is not there."""
    module = extension()
    if module is None:
        raise RuntimeError("torch.ops.bmsn.* need bmsn._C, which is not there; bmsn.backend_report() says why")
    return module
