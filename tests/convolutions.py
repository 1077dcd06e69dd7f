"""Convolutions of stacked states as the tests of conv_bn and conv_scale take them, and their float64 formulas."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bmsn.backend import extension
from bmsn.ops import conv2d
from bmsn.ops import convolution as ops
from bmsn.ops.conv_bn import ConvBn, batch_statistics_reference, conv_bn
from oracles import assert_no_worse
from stacked import device_for, random_map, random_rows


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the C++ convolution of bfloat16 or float32 was built and runs here."""
    cpp = extension()
    return cpp is not None and cpp.has_conv_forward(dtype == torch.bfloat16)


def take_ours_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ convolution also where it is tested, but not taken: oneDNN has AMX, or maps and batches are small."""
    monkeypatch.setattr(ops, "_has_kernel", has_instructions)
    monkeypatch.setattr(ops, "MIN_MAP", 0)
    monkeypatch.setattr(ops, "MIN_PIXELS", 0)
    monkeypatch.setattr(conv2d, "MIN_PIXELS", 0)


def needs_convolution(dtype: torch.dtype) -> pytest.MarkDecorator:
    instructions = "AVX512-BF16" if dtype == torch.bfloat16 else "AVX-512"
    return pytest.mark.skipif(not has_instructions(dtype), reason=f"bmsn._C was not built, or no {instructions}")


def assert_exact_enough(actual: Tensor, *, eager: Tensor, oracle: Tensor) -> None:
    """`assert_no_worse`; in float32 12 units are allowed, for what Winograd adds up can be larger than the result."""
    assert_no_worse(actual, eager=eager, oracle=oracle, units=12 if actual.dtype == torch.float32 else 1)


@dataclass(frozen=True)
class Case:
    """Arguments of a convolution; three weight sets, one for each group, not in order."""

    x: Tensor
    weight: Tensor
    weight_index: Tensor
    stats: Tensor | None
    shortcut_weight: Tensor | None
    stride: int

    @property
    def num_groups(self) -> int:
        return len(self.weight_index)

    def to(self, target: torch.dtype | torch.device) -> Case:
        """In another dtype (statistics in the one that goes with it), or on another device."""
        stats_target = torch.promote_types(target, torch.float32) if isinstance(target, torch.dtype) else target
        index = self.weight_index if isinstance(target, torch.dtype) else self.weight_index.to(target)
        x, weight = self.x.to(target), self.weight.to(target)
        stats = None if self.stats is None else self.stats.to(stats_target)
        shortcut_weight = None if self.shortcut_weight is None else self.shortcut_weight.to(target)
        return Case(x, weight, index, stats, shortcut_weight, self.stride)

    def run(self, backend: str) -> ConvBn:
        device = device_for(backend)
        case = self.to(device)
        return conv_bn(
            *(case.x, case.weight, case.num_groups),
            stats=case.stats,
            weight_index=case.weight_index,
            stride=case.stride,
            shortcut_weight=case.shortcut_weight,
            backend=backend,
        )


# groups, images, I, O, H, W, k, stride, shortcut; the widths take every tuned configuration of the Triton kernel
SHAPES = [
    (2, 1, 3, 5, 6, 7, 3, 1, False),  # a stem: 3 channels, fewer than a product takes
    (3, 2, 16, 16, 8, 9, 3, 1, False),  # a ResNet-20 layer; tiles that are not full
    (2, 2, 20, 33, 7, 9, 3, 2, True),  # ragged in pixels, input and output channels at once; odd map, halved
    (1, 3, 40, 70, 5, 5, 1, 2, True),  # 1x1, halved; three blocks of output channels
    (2, 3, 18, 8, 1, 1, 3, 1, True),  # a map smaller than the kernel: nothing but its centre counts
    (2, 1, 16, 32, 5, 7, 3, 1, False),  # ResNet-20's other widths, with a shortcut and without
    (1, 2, 40, 32, 6, 5, 3, 2, True),
    (2, 1, 20, 64, 4, 6, 3, 1, False),
    (1, 2, 16, 128, 3, 5, 1, 1, False),  # a bottleneck's wide end
]


def make_case(shape: tuple[int, ...], normed: bool, dtype: torch.dtype = torch.float32) -> Case:
    groups, images, i, o, h, w, k, stride, shortcut = shape
    x = random_map(groups * images, i, h, w, seed=1, dtype=dtype)
    index = torch.tensor([2, 0, 1][:groups], dtype=torch.int32)
    stats = batch_statistics_reference(x, groups) if normed else None
    weight, shortcut_weight = (random_rows(3, o, i, size, size, seed=size, dtype=dtype) for size in (k, 1))
    return Case(x, weight, index, stats, shortcut_weight if shortcut else None, stride)


def convolution(a: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Tap by tap."""
    k, (height, width) = weight.shape[-1], a.shape[2:]
    padded = a.new_zeros((*a.shape[:2], height + k - 1, width + k - 1))
    padded[:, :, k // 2 : k // 2 + height, k // 2 : k // 2 + width] = a
    shifted = [
        torch.einsum("nchw,oc->nohw", padded[:, :, i : i + height : stride, j : j + width : stride], weight[:, :, i, j])
        for i in range(k)
        for j in range(k)
    ]
    return torch.stack(shifted).sum(0)


def statistics(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3))
    return torch.stack([mean.flatten(), 1 / (variance + 1e-5).sqrt()])


def formula(case: Case) -> list[Tensor]:
    """y, stats, shortcut, shortcut_stats in float64, group by group."""
    wide = case.to(torch.float64)
    found: list[Tensor] = []
    for weight in (wide.weight, wide.shortcut_weight):
        if weight is None:
            continue
        parts = []
        for g, group in enumerate(wide.x.chunk(case.num_groups)):
            if wide.stats is not None:
                mean, rstd = (t[g].reshape(1, -1, 1, 1) for t in wide.stats)
                group = ((group - mean) * rstd).clamp(min=0)
            parts.append(convolution(group, weight[int(case.weight_index[g])], case.stride))
        found += [torch.cat(parts), torch.stack([statistics(part) for part in parts], 1)]
    return found
