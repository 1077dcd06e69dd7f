"""What the ops agree on: images channels_last in statistics groups, statistics (2, G, C), and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from bmsn.backend import extension
from bmsn.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # float64 on the reference only


def check_images(name: str, x: Tensor, like: Tensor | None = None, shape: Sequence[int] | None = None) -> None:
    """Raises unless `x` is (N, C, H, W), channels_last, listed dtype; dtype and device of `like`; `shape`."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float64; got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be (N, C, H, W); got {tuple(x.shape)}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype}; it must be {like.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device}")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{name} is {tuple(x.shape)}; it must be {tuple(shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} must be channels_last; got strides {x.stride()} for shape {tuple(x.shape)} "
            "(convert once with .contiguous(memory_format=torch.channels_last))"
        )


def check_groups(x: Tensor, num_groups: int) -> None:
    """Raises InputError unless the images of `x` divide into groups of at least 2 values a channel."""
    if num_groups < 1 or x.shape[0] % num_groups:
        raise InputError(f"num_groups must be at least 1 and divide the batch of {x.shape[0]} images; got {num_groups}")
    values = x.shape[0] // num_groups * x.shape[2] * x.shape[3]
    if values < 2 or x.shape[1] == 0:
        raise InputError(
            f"a statistics group needs at least 1 channel and 2 values in each; "
            f"{tuple(x.shape)} in {num_groups} groups has {x.shape[1]} channels and {values} values"
        )


def check_statistics(name: str, stats: Tensor, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raises unless `stats` are (2, G, C), contiguous, for the images `x` in G groups."""
    if stats.dtype != torch.promote_types(x.dtype, torch.float32):
        raise TypeError(f"{name} must be {torch.promote_types(x.dtype, torch.float32)}; got {stats.dtype}")
    fits = stats.ndim == 3 and stats.shape[0] == 2 and stats.shape[2] == x.shape[1] and stats.is_contiguous()
    if not fits or stats.device != x.device or (shape is not None and stats.shape != tuple(shape)):
        raise ValueError(
            f"{name} must be contiguous (2, groups, {x.shape[1]}) on {x.device}"
            f"{'' if shape is None else f', {tuple(shape)}'}; got {tuple(stats.shape)} on {stats.device}"
        )
    check_groups(x, stats.shape[1])


def per_image(stats: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd as (G*N, C, 1, 1)."""
    mean, rstd = stats.repeat_interleave(x.shape[0] // stats.shape[1], 1)[..., None, None]
    return mean, rstd


def group_shape(x: Tensor, num_groups: int) -> tuple[int, int, int]:
    """Groups, rows of a group (all its pixels), channels."""
    return num_groups, x.shape[0] // num_groups * x.shape[2] * x.shape[3], x.shape[1]


def loaded_extension() -> ModuleType:
    """bmsn._C. Raises RuntimeError where it is not there."""
    module = extension()
    if module is None:
        raise RuntimeError("torch.ops.bmsn.* need bmsn._C, which is not there; bmsn.backend_report() says why")
    return module
