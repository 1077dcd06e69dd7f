"""The end of a state: global average, linear layer, argmax, and the number of images it gets right.

    correct[g] = number of images i < N with argmax over k of (sum over c of f[g,i,c] * weight[m,k,c] + bias[m,k])
                 equal to labels[i],   f[g,i] = mean over (H, W) of x[g*N + i],  m = weight_index[g]

Counts stay on the device: nothing waits for them before the end of a scoring.

Source: Javan et al. 2023, section 2.3 (the accuracy of an architecture on the validation half).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.checks import (
    accumulator_dtype,
    check_dense,
    check_feature_map,
    check_groups,
    check_rows,
    check_weight_index,
)

_CACHED_VALUES = 1 << 20  # averaged at a time by the reference

torch.library.define(
    "bmsn::head",
    "(Tensor x, Tensor labels, Tensor weight, Tensor bias, int num_groups, Tensor? weight_index, str backend) "
    "-> Tensor",
)


def head(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    weight_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Counts each group's correctly classified images; every group holds the same N images. Forward only.

    Args:
        x: (G*N, C, H, W), channels_last; float32, bfloat16, or float64 (on the reference only). Already ReLU'd.
        labels: (N,) int64: image i of every group is of class labels[i]. One outside 0..K-1 is never right.
        weight: (S, K, C) float32 (float64 for float64), dense but for the stride of S.
        bias: (S, K), likewise.
        num_groups: G groups of N consecutive images.
        weight_index: (G,) int32: the weight set of each group, 0..S-1 (not checked). None: 0 for all.
        backend: auto, reference or triton.
    Returns:
        (G,) int64. Averages and logits in the dtype of `weight`; of equal logits the first counts, and NaN is the
        largest, as in torch.argmax.
    Raises:
        InputError: a dtype, rank, layout, device or shape not listed.
    """
    check_feature_map("x", x)
    check_groups(x, num_groups)
    check_dense("labels", labels, x, (len(x) // num_groups,), torch.int64)
    if weight.ndim != 3 or weight.shape[2] != x.shape[1] or 0 in weight.shape:
        raise InputError(f"weight must be (S, K, {x.shape[1]}), none of them 0; got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:2]:
        raise InputError(f"bias must be {tuple(weight.shape[:2])}; got {tuple(bias.shape)}")
    check_rows("weight", weight, x, accumulator_dtype(x))
    check_rows("bias", bias, x, accumulator_dtype(x))
    check_weight_index(weight_index, x, num_groups)
    available = ("reference",) if x.dtype == torch.float64 else None
    chosen = resolve("head", backend, available, x.device)
    return torch.ops.bmsn.head(x, labels, weight, bias, num_groups, weight_index, chosen)


def head_reference(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, num_groups: int, weight_index: Tensor | None = None
) -> Tensor:
    # torch widens before it sums: some images at a time stay in cache (a fifth of the time for the largest maps).
    parts = x.split(max(1, _CACHED_VALUES // x.shape[1:].numel()))
    features = torch.cat([part.mean((2, 3), dtype=weight.dtype) for part in parts])
    features = features.view(num_groups, len(labels), -1)  # (G, N, C)
    if weight_index is None:
        weight, bias = weight[:1], bias[:1]
    else:
        weight, bias = weight.index_select(0, weight_index), bias.index_select(0, weight_index)
    logits = features @ weight.mT + bias[:, None]  # (G, N, K)
    return (logits.argmax(2) == labels).sum(1)


def _empty_counts(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty(num_groups, dtype=torch.int64)


@torch.library.impl("bmsn::head", "CompositeExplicitAutograd")
def _head_impl(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    weight_index: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return head_reference(x, labels, weight, bias, num_groups, weight_index)
    from bmsn.kernels.head import launch_head

    correct = _empty_counts(x, num_groups)
    launch_head(x, labels, weight, bias, num_groups, weight_index, correct)
    return correct


@torch.library.register_fake("bmsn::head")
def _head_fake(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    weight_index: Tensor | None,
    backend: str,
) -> Tensor:
    return _empty_counts(x, num_groups)
