"""Scores of all (architecture, supernet) pairs: `score_architectures` in one pass, `score_one_by_one` as its oracle.

A score is the number of images that a pair classifies correctly. BatchNorm takes its statistics from each scoring batch
of each architecture (a *statistics group*), in fixed order and of fixed size, so a score depends on weights,
architecture, images and batch size only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.errors import InputError
from bmsn.network import SupernetMixture, Weights, check_images
from bmsn.ops.norm_relu import norm_add_relu, norm_relu
from bmsn.plan import EvaluationPlan, Pair, PlannedState, Wave

DEFAULT_MAX_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Scores:
    """Counts of a scoring, in the order of `pairs`.

    Attributes:
        pairs: (architecture, supernet index).
        correct: (len(pairs),) int64, on the CPU.
        total: number of images scored.
    """

    pairs: tuple[Pair, ...]
    correct: Tensor
    total: int

    @property
    def accuracy(self) -> Tensor:
        """(len(pairs),) float64 in [0, 1]."""
        return self.correct.double() / self.total


def all_pairs(mixture: SupernetMixture) -> tuple[Pair, ...]:
    """Every architecture with every supernet, architecture-major."""
    return tuple((architecture, m) for architecture in mixture.space for m in range(mixture.num_supernets))


@torch.no_grad()
def score_architectures(
    mixture: SupernetMixture,
    images: Tensor,
    labels: Tensor,
    pairs: Sequence[Pair] | None = None,
    batch_size: int = 256,
    norm: Literal["batch"] = "batch",
    backend: str = "auto",
    max_bytes: int | None = None,
) -> Scores:
    """Counts the correctly classified images of every pair in one pass that computes each shared prefix once.

    Source: the scoring of Javan et al. 2023, section 2.3 (architecture after architecture there).

    Args:
        mixture: the supernets; images go to the device of its weights.
        images: (N, C, H, W) float32, bfloat16 or float64, normalised, in any memory format: their dtype is that of the
            computation. Or uint8 (N, H, W, C): normalised by `mixture.pixel_table`, computed in float32 (float64 if the
            weights are). H and W are multiples of `space.total_stride`.
        labels: (N,) integers in [0, num_classes).
        pairs: (architecture, supernet index), each once; None: `all_pairs`.
        batch_size: images in a statistics group; the last, smaller batch is a group of its own.
        norm: "batch": statistics of the scoring batch.
        backend: "auto", "reference" or "cpp", for the passes between convolutions.
        max_bytes: bound on the activations alive at one time; images, weights and the convolution library's own
            workspace do not count. None: what is fastest, about 1 GiB or one state's need if that is more.
    Returns:
        Scores, equal to `score_one_by_one`'s in float64, and but for rounding ties in float32 and bfloat16.
    Raises:
        InputError: any of these out of range, or `max_bytes` too small for one state (says how much is needed).
    """
    if norm != "batch":
        raise InputError(f"norm must be 'batch'; got {norm!r}")
    pairs = all_pairs(mixture) if pairs is None else tuple(pairs)
    images, labels = _checked(mixture, images, labels, pairs, batch_size)
    plan = make_plan(mixture, images, pairs, batch_size=batch_size, max_bytes=max_bytes)
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=images.device)
    weights = {m: mixture.weights(mixture.arena[m], images.dtype) for m in sorted({m for _, m in pairs})}
    correct = torch.zeros(len(pairs), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].contiguous(memory_format=torch.channels_last)
        _run(plan, weights, arena, batch, labels[start : start + batch_size], correct, backend)
    return Scores(pairs, correct.cpu(), len(images))


@torch.no_grad()
def score_one_by_one(
    mixture: SupernetMixture, images: Tensor, labels: Tensor, pairs: Sequence[Pair] | None = None, batch_size: int = 256
) -> Scores:
    """The oracle of `score_architectures`, same arguments: every pair alone, by the mixture's `forward`."""
    pairs = all_pairs(mixture) if pairs is None else tuple(pairs)
    images, labels = _checked(mixture, images, labels, pairs, batch_size)
    correct = torch.zeros(len(pairs), dtype=torch.int64)
    for index, (architecture, supernet) in enumerate(pairs):
        for start in range(0, len(images), batch_size):
            logits = mixture(images[start : start + batch_size], architecture, supernet)
            correct[index] += (logits.argmax(1) == labels[start : start + batch_size]).sum().cpu()
    return Scores(pairs, correct, len(images))


def make_plan(
    mixture: SupernetMixture,
    images: Tensor,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 256,
    max_bytes: int | None = None,
) -> EvaluationPlan:
    """The plan that `score_architectures` runs for (N, C, H, W) `images`."""
    plan = partial(
        EvaluationPlan,
        mixture.space,
        pairs,
        batch_size=min(batch_size, len(images)),
        image_size=(images.shape[2], images.shape[3]),
        itemsize=images.element_size(),
        # bfloat16 may be computed in float32 on the way: twice the bytes a map.
        workspace_maps=5 if images.element_size() > 2 else 9,
    )
    if max_bytes is not None:
        return plan(max_bytes=max_bytes)
    try:
        return plan(max_bytes=DEFAULT_MAX_BYTES)
    except InputError:  # not even one state fits
        return plan(max_bytes=None)


def _checked(
    mixture: SupernetMixture, images: Tensor, labels: Tensor, pairs: Sequence[Pair], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Images as (N, C, H, W) of the dtype of the computation and labels, both on the mixture's device."""
    if batch_size < 2:
        raise InputError(f"batch_size must be at least 2; got {batch_size}")
    for index, (_, supernet) in enumerate(pairs):
        if not 0 <= supernet < mixture.num_supernets:
            raise InputError(f"pairs[{index}]: supernet must be in 0..{mixture.num_supernets - 1}; got {supernet}")
    device = mixture.arena.device
    if images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] != mixture.in_channels:
            raise InputError(f"uint8 images must be (N, H, W, {mixture.in_channels}); got {tuple(images.shape)}")
        table = mixture.pixel_table.to(device, mixture.arena.dtype)
        images = torch.stack([table[images[..., c].to(device).int(), c] for c in range(mixture.in_channels)], 1)
    check_images(
        mixture, images[len(images) // batch_size * batch_size :] if len(images) % batch_size else images[:batch_size]
    )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise InputError(f"labels must be {len(images)} integers; got {tuple(labels.shape)} of {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < mixture.num_classes:
        bad = int(((labels < 0) | (labels >= mixture.num_classes)).nonzero()[0])
        raise InputError(f"labels[{bad}] must be in 0..{mixture.num_classes - 1}; got {int(labels[bad])}")
    return images.to(device), labels.to(device)


# Running a plan on one batch. -----------------------------------------------------------------------------------------


def _run(
    plan: EvaluationPlan,
    weights: dict[int, Weights],
    arena: Tensor,
    batch: Tensor,
    labels: Tensor,
    correct: Tensor,
    backend: str,
) -> None:
    """Adds each pair's correct classifications of one batch (channels_last) to `correct`."""
    maps = [_map(plan, wave, arena, batch) for wave in plan.waves]
    for wave, out in zip(plan.waves, maps, strict=True):
        for first, last in _runs(wave):
            state = wave.states[first]
            if state.parent is None:
                source = batch
            else:
                parent = state.parent
                source = maps[parent.wave][parent.place * len(batch) : (parent.place + last - first) * len(batch)]
            result = _layer(plan, wave.layer, weights[state.supernet], source, state, last - first, backend)
            out[first * len(batch) : last * len(batch)] = result
        if wave.heads:
            _count(wave, out, weights, labels, correct)


def _map(plan: EvaluationPlan, wave: Wave, arena: Tensor, batch: Tensor) -> Tensor:
    """A wave's buffer as (states * N, C, H, W), channels_last."""
    channels, height, width = plan.map_shape(wave.layer, wave.num_pools)
    shape = (len(wave.states) * len(batch), height, width, channels)
    num_bytes = shape[0] * height * width * channels * batch.element_size()
    return arena[wave.offset : wave.offset + num_bytes].view(batch.dtype).view(shape).permute(0, 3, 1, 2)


def _runs(wave: Wave) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of at most `chunk` states with one supernet, one kind of step and parents in a row."""
    breaks = [0]
    for place in range(1, len(wave.states)):
        before, state = wave.states[place - 1], wave.states[place]
        follows = (
            state.parent is not None
            and before.parent is not None
            and (
                state.parent == (before.parent.wave, before.parent.place + 1)
                and state.supernet == before.supernet
                and state.pools == before.pools
            )
        )
        if not follows or place - breaks[-1] == wave.chunk:
            breaks.append(place)
    return pairwise([*breaks, len(wave.states)])


def _layer(
    plan: EvaluationPlan, index: int, weights: Weights, x: Tensor, state: PlannedState, groups: int, backend: str
) -> Tensor:
    """One layer on `groups` stacked states, each a statistics group."""
    space, layer, w = plan.space, plan.space.layers[index], weights.layers[index]
    if state.parent is None and weights.stem is not None:
        x = F.max_pool2d(norm_relu(F.conv2d(x, weights.stem, stride=2, padding=3), groups, backend=backend), 3, 2, 1)
    if layer.kind == "stem":
        return norm_relu(F.conv2d(x, w["conv"], padding=1), groups, backend=backend)
    stride = 1
    if state.pools:
        if space.pool == "stride":
            stride = 2
        else:
            x = (F.max_pool2d if space.pool == "max" else F.avg_pool2d)(x, 2)
    if space.block == "basic":
        y = norm_relu(F.conv2d(x, w["conv1"], stride=stride, padding=1), groups, backend=backend)
        y = F.conv2d(y, w["conv2"], padding=1)
    else:
        y = norm_relu(F.conv2d(x, w["conv1"]), groups, backend=backend)
        y = norm_relu(F.conv2d(y, w["conv2"], stride=stride, padding=1), groups, backend=backend)
        y = F.conv2d(y, w["conv3"])
    projects = "shortcut" in w
    if projects:
        x = F.conv2d(x, w["shortcut"], stride=stride)
    elif stride == 2:
        x = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    return norm_add_relu(y, x, groups, normalise_shortcut=projects, backend=backend)


def _count(wave: Wave, maps: Tensor, weights: dict[int, Weights], labels: Tensor, correct: Tensor) -> None:
    """The head for the pairs that end in this wave."""
    num_images = len(labels)
    for place, pair in wave.heads:
        w = weights[wave.states[place].supernet]
        features = maps[place * num_images : (place + 1) * num_images].mean((2, 3), dtype=w.head_weight.dtype)
        correct[pair] += (F.linear(features, w.head_weight, w.head_bias).argmax(1) == labels).sum()
