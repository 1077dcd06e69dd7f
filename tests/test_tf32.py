"""Float32 on a GPU: no convolution of the evaluator in TF32, and cuDNN's setting is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.evaluator import score_architectures
from bmsn.network import SupernetMixture
from bmsn.ops.convolution import convolve, without_tf32
from bmsn.space import SearchSpace
from global_state import unchanged
from stacked import random_map, random_rows

SETTINGS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def cudnn_default() -> Iterator[None]:
    before = SETTINGS.fp32_precision
    SETTINGS.fp32_precision = "tf32"
    yield
    SETTINGS.fp32_precision = before


@pytest.fixture
def convolved_with(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What cuDNN was set to in every call of torch's convolution."""
    found: list[str] = []
    plain = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: found.append(SETTINGS.fp32_precision) or plain(*a, **k))
    return found


@pytest.mark.parametrize("weight_index", [None, torch.zeros(2, dtype=torch.int32)], ids=["shared", "indexed"])
def test_library_convolutions_are_ieee(
    weight_index: Tensor | None, convolved_with: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is taken for a GPU, here and below."""
    monkeypatch.setattr("bmsn.ops.convolution.without_tf32", lambda device: without_tf32(GPU))
    with unchanged():
        convolve(random_map(2, 3, 4, 4, seed=1), random_rows(1, 5, 3, 3, 3, seed=2), 2, weight_index, 1)
    assert set(convolved_with) == {"ieee"}


def test_the_setting_comes_back_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), unchanged(), without_tf32(GPU):
        raise ZeroDivisionError
    assert SETTINGS.fp32_precision == "tf32"


@pytest.mark.parametrize("chosen", ["ieee", "tf32"])
def test_a_setting_of_the_program_around_it_stays(chosen: str) -> None:
    SETTINGS.fp32_precision = chosen
    with without_tf32(GPU):
        assert SETTINGS.fp32_precision == "ieee"
    assert SETTINGS.fp32_precision == chosen


def test_nothing_is_touched_on_a_cpu(convolved_with: list[str]) -> None:
    convolve(random_map(2, 3, 4, 4, seed=1), random_rows(1, 5, 3, 3, 3, seed=2), 1, None, 1)
    assert convolved_with == ["tf32"]


def test_a_large_stem_is_ieee(convolved_with: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """7x7, which no kernel of ours has."""
    monkeypatch.setattr("bmsn.execution.without_tf32", lambda device: without_tf32(GPU))
    space = SearchSpace.named("resnet18-imagenet", width=0.05)
    nets = SupernetMixture(space, 1, 3)
    images = random_map(2, 3, space.total_stride, space.total_stride, seed=1)
    score_architectures(nets, images, torch.zeros(2, dtype=torch.int64), [(space[0], 0)])
    assert convolved_with.count("ieee") == 1
