"""Scores of all (architecture, supernet) pairs: `score_architectures` in one pass, `score_one_by_one` as its oracle.

A score is the number of images that a pair classifies correctly. BatchNorm takes its statistics from each scoring batch
of each architecture (a *statistics group*), in fixed order and of fixed size, so a score depends on weights,
architecture, images and batch size only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.errors import InputError
from bmsn.network import SupernetMixture, Weights, check_images
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.conv_bn import batch_statistics, conv_bn
from bmsn.ops.head import head
from bmsn.plan import EvaluationPlan, Pair, PlannedState, Wave
from bmsn.space import SearchSpace

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
        backend: "auto", "reference", "cpp" or "triton": of the ops, see `bmsn.backend.resolve`.
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
    weights = mixture.weights(mixture.arena, images.dtype)
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
    return images.to(device), labels.to(device, torch.int64)


# Running a plan on one batch. -----------------------------------------------------------------------------------------


def _run(
    plan: EvaluationPlan,
    weights: Weights,
    arena: Tensor,
    batch: Tensor,
    labels: Tensor,
    correct: Tensor,
    backend: str,
) -> None:
    """Adds each pair's correct classifications of one batch (channels_last) to `correct`."""
    for wave in plan.waves:
        source_shape = plan.map_shape(wave.layer - 1, wave.num_pools - wave.strides) if wave.layer else batch.shape[1:]
        shape = channels, height, width = plan.map_shape(wave.layer, wave.num_pools)
        for run in _runs(wave, mixed=_mixes(batch, backend)):
            state, groups = run[0], len(run)
            supernets = [state.supernet for state in run]
            rows = _Rows(weights, supernets, batch.device)

            def stacked(offset: int | None, shape: tuple[int, ...], groups: int = groups) -> Tensor | None:
                return None if offset is None else _maps(plan, arena, offset, groups, shape, batch)

            source = batch if state.source is None else stacked(state.source, source_shape)
            assert source is not None
            full, pooled = stacked(state.full, shape), stacked(state.pooled, (channels, height // 2, width // 2))
            ends = _layer(plan.space, wave, rows, source, groups, full, pooled, backend)
            if state.pair is not None:
                places = [state.pair for state in run]
                correct[places] += head(
                    ends, labels, rows(weights.head_weight), rows(weights.head_bias), groups, weight_index=rows.index,
                    backend="auto" if backend == "cpp" else backend,  # too little work for a C++ version of its own
                )  # fmt: skip


class _Rows:
    """The weight sets of a run's states: `rows(w)`, and which of them each state takes if that is not the same one."""

    def __init__(self, weights: Weights, supernets: list[int], device: torch.device) -> None:
        self.weights, self._first = weights, supernets[0]
        one = len(set(supernets)) == 1
        self.index = None if one else torch.tensor(supernets, dtype=torch.int32, device=device)

    def __call__(self, weight: Tensor) -> Tensor:
        return weight[self._first : self._first + 1] if self.index is None else weight


def _maps(
    plan: EvaluationPlan, arena: Tensor, offset: int, groups: int, shape: tuple[int, ...], batch: Tensor
) -> Tensor:
    """The maps of `groups` states that begin at byte `offset`, as (groups * N, C, H, W), channels_last."""
    channels, height, width = shape
    start = offset // plan.batch_size * len(batch)  # the last batch may be smaller
    size = groups * len(batch) * height * width * channels * batch.element_size()
    maps = arena[start : start + size].view(batch.dtype).view(groups * len(batch), height, width, channels)
    return maps.permute(0, 3, 1, 2)


def _mixes(batch: Tensor, backend: str) -> bool:
    """Whether states of several supernets go together: our kernels take all weight sets, a library's convolution one."""
    return batch.is_cuda or backend == "triton"


def _runs(wave: Wave, *, mixed: bool) -> Iterator[tuple[PlannedState, ...]]:
    """Runs of at most `chunk` states that read, and write, maps which lie one behind the other.

    They are of one supernet, unless `mixed`.
    """
    run: list[PlannedState] = []
    for state in wave.states:
        if run and (len(run) == wave.chunk or not _follows(run[-1], state, wave, mixed)):
            yield tuple(run)
            run = []
        run.append(state)
    yield tuple(run)


def _follows(before: PlannedState, state: PlannedState, wave: Wave, mixed: bool) -> bool:
    def one_behind(a: int | None, b: int | None, step: int) -> bool:
        return b is None if a is None else b == a + step

    return (
        (mixed or state.supernet == before.supernet)
        and before.source is not None
        and one_behind(before.source, state.source, wave.source_bytes)
        and one_behind(before.full, state.full, wave.map_bytes)
        and one_behind(before.pooled, state.pooled, wave.map_bytes // 4)
        and (before.pair is None) == (state.pair is None)
    )


def _layer(
    space: SearchSpace,
    wave: Wave,
    rows: _Rows,
    x: Tensor,
    groups: int,
    full: Tensor | None,
    pooled: Tensor | None,
    backend: str,
) -> Tensor:
    """One layer on `groups` stacked states, each a statistics group; writes their maps, and returns them where no
    child wants them."""
    layer, stride = space.layers[wave.layer], 1 + wave.strides
    w = {name: rows(weight) for name, weight in rows.weights.layers[wave.layer].items()}
    conv = partial(conv_bn, num_groups=groups, weight_index=rows.index, backend=backend)
    if wave.layer == 0 and rows.weights.stem is not None:
        x = F.conv2d(x, rows(rows.weights.stem)[0], stride=2, padding=3)  # the images: a run of one state
        bn_add_relu_pool(x, batch_statistics(x, groups, backend=backend), full=x, backend=backend)
        x = F.max_pool2d(x, 3, 2, 1)
    first, *others = layer.main
    rides = space.block == "basic" and "shortcut" in w  # the projection, with the first convolution
    y, stats, shortcut, shortcut_stats = conv(
        x, w[first.name], stride=stride if first.stage == "at" else 1,
        shortcut_weight=w["shortcut"] if rides else None,
    )  # fmt: skip
    if layer.kind != "stem" and not rides:
        if "shortcut" in w:
            shortcut, shortcut_stats, *_ = conv(x, w["shortcut"], stride=stride)
        else:
            shortcut = x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
    for step in others:
        y, stats, *_ = conv(y, w[step.name], stats=stats, overwrite=True, stride=stride if step.stage == "at" else 1)
    if full is None and pooled is None:
        full = y
    bn_add_relu_pool(
        y, stats, shortcut, shortcut_stats,
        full=full, pooled=pooled, pool="avg" if space.pool == "avg" else "max", backend=backend,
    )  # fmt: skip
    return y
