"""Scores of all (architecture, supernet) pairs: `score_architectures` in one pass, `score_one_by_one` as its oracle.

A score is the number of images that a pair classifies correctly. BatchNorm takes its statistics from each scoring batch
of each architecture (a *statistics group*), in fixed order and of fixed size, so a score depends on weights,
architecture, images and batch size only.
"""

from __future__ import annotations

import logging
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
from bmsn.ops.conv_bn import ConvBn, batch_statistics, conv_bn
from bmsn.ops.head import head
from bmsn.plan import EvaluationPlan, Pair, PlannedState, Wave
from bmsn.space import SearchSpace

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 2**30
NormKind = Literal["batch", "calibrated"]
_Key = tuple[int, tuple[int, ...], int, str]  # supernet, pool positions so far, layer, convolution


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
    norm: NormKind = "batch",
    backend: str = "auto",
    max_bytes: int | None = None,
    calibration_images: Tensor | None = None,
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
        norm: where BatchNorm's statistics come from. "batch": each scoring batch of each pair. "calibrated": measured
            once on all of `calibration_images` together and then frozen, so that an image's result depends on no other.
        backend: "auto", "reference", "cpp" or "triton": of the ops, see `bmsn.backend.resolve`.
        max_bytes: bound on the activations alive at one time; images, weights and the convolution library's own
            workspace do not count. None: what is fastest, about 1 GiB or one state's need if that is more.
        calibration_images: like `images`, for norm="calibrated" alone; usually from the training half.
    Returns:
        Scores, equal to `score_one_by_one`'s in float64, and but for rounding ties in float32 and bfloat16. A supernet
        with weights that are not finite is scored by its NaN logits, and a warning is logged that names it.
    Raises:
        InputError: any of these out of range, or `max_bytes` too small for one state (says how much is needed).
    """
    if norm not in ("batch", "calibrated"):
        raise InputError(f"norm must be 'batch' or 'calibrated'; got {norm!r}")
    if (norm == "calibrated") != (calibration_images is not None):
        raise InputError(f"calibration_images are needed for norm='calibrated' and for nothing else; norm is {norm!r}")
    pairs = all_pairs(mixture) if pairs is None else tuple(pairs)
    images, labels = _checked(mixture, images, labels, pairs, batch_size)
    _warn_of_nan(mixture, pairs)
    run = partial(_run_plan, mixture, pairs=pairs, backend=backend, max_bytes=max_bytes)
    if calibration_images is None:
        correct = run(images, labels, batch_size, _Norm())
    else:
        nothing = torch.zeros(len(calibration_images), dtype=torch.int64)
        calibration_images, nothing = _checked(mixture, calibration_images, nothing, pairs, max(2, len(nothing)))
        measured = _Norm(kept={})
        run(calibration_images.to(images.dtype), nothing, len(nothing), measured)
        correct = run(images, labels, batch_size, _Norm(frozen=measured.kept))
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


def _warn_of_nan(mixture: SupernetMixture, pairs: Sequence[Pair]) -> None:
    """Every architecture uses all layers, so one weight that is not finite spoils all scores of its supernet."""
    spoilt = set((~mixture.arena.isfinite().all(1)).nonzero().flatten().tolist())
    supernets = [supernet for _, supernet in pairs if supernet in spoilt]
    if supernets:
        logger.warning(
            "supernets %s have weights that are not finite: the scores of their %d architectures count NaN logits",
            *(sorted(set(supernets)), len(supernets)),
        )


# Running a plan on one batch. -----------------------------------------------------------------------------------------


def _run_plan(
    mixture: SupernetMixture,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    norm: _Norm,
    *,
    pairs: Sequence[Pair],
    backend: str,
    max_bytes: int | None,
) -> Tensor:
    """Each pair's correct classifications, (len(pairs),) int64 on the images' device."""
    plan = make_plan(mixture, images, pairs, batch_size=batch_size, max_bytes=max_bytes)
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=images.device)
    weights = mixture.weights(mixture.arena, images.dtype)
    correct = torch.zeros(len(pairs), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].contiguous(memory_format=torch.channels_last)
        _run(plan, weights, arena, batch, labels[start : start + batch_size], correct, norm, backend)
    return correct


class _Norm:
    """Where statistics come from: every batch, which `kept` may remember state by state, or what was remembered."""

    def __init__(self, kept: dict[_Key, Tensor] | None = None, frozen: dict[_Key, Tensor] | None = None) -> None:
        self.kept, self._frozen = kept, frozen

    @property
    def is_frozen(self) -> bool:
        return self._frozen is not None

    def convolve(
        self,
        run: Sequence[PlannedState],
        layer: int,
        name: str,
        x: Tensor,
        weight: Tensor,
        *,
        stats: Tensor | None = None,
        weight_index: Tensor | None,
        stride: int = 1,
        shortcut_weight: Tensor | None = None,
        backend: str,
    ) -> ConvBn:
        """`conv_bn` with the run's statistics; x, where it has statistics, may be overwritten."""
        if self._frozen is None:
            found = conv_bn(
                x, weight, len(run), stats=stats, overwrite=stats is not None, weight_index=weight_index,
                stride=stride, shortcut_weight=shortcut_weight, backend=backend,
            )  # fmt: skip
            self._keep(run, layer, name, found.stats)
            if found.shortcut_stats is not None:
                self._keep(run, layer, "shortcut", found.shortcut_stats)
            return found
        if stats is not None:
            bn_add_relu_pool(x, stats, full=x, backend=backend)
        y = F.conv2d(x, weight[0], stride=stride, padding=weight.shape[-1] // 2)
        if shortcut_weight is None:
            return ConvBn(y, self._known(run, layer, name), None, None)
        shortcut = F.conv2d(x, shortcut_weight[0], stride=stride)
        return ConvBn(y, self._known(run, layer, name), shortcut, self._known(run, layer, "shortcut"))

    def statistics(self, run: Sequence[PlannedState], layer: int, name: str, x: Tensor, backend: str) -> Tensor:
        """Those of a map that was convolved elsewhere."""
        if self._frozen is not None:
            return self._known(run, layer, name)
        stats = batch_statistics(x, len(run), backend=backend)
        self._keep(run, layer, name, stats)
        return stats

    def _keep(self, run: Sequence[PlannedState], layer: int, name: str, stats: Tensor) -> None:
        if self.kept is not None:
            for state, own in zip(run, stats.unbind(1), strict=True):
                self.kept[state.supernet, state.pool_positions, layer, name] = own

    def _known(self, run: Sequence[PlannedState], layer: int, name: str) -> Tensor:
        assert self._frozen is not None
        return torch.stack([self._frozen[state.supernet, state.pool_positions, layer, name] for state in run], 1)


def _run(
    plan: EvaluationPlan,
    weights: Weights,
    arena: Tensor,
    batch: Tensor,
    labels: Tensor,
    correct: Tensor,
    norm: _Norm,
    backend: str,
) -> None:
    """Adds each pair's correct classifications of one batch (channels_last) to `correct`."""
    for wave in plan.waves:
        source_shape = plan.map_shape(wave.layer - 1, wave.num_pools - wave.strides) if wave.layer else batch.shape[1:]
        shape = channels, height, width = plan.map_shape(wave.layer, wave.num_pools)
        for run in _runs(wave, mixed=_mixes(batch, backend) and not norm.is_frozen):
            state, groups = run[0], len(run)
            supernets = [state.supernet for state in run]
            rows = _Rows(weights, supernets, batch.device)

            def stacked(offset: int | None, shape: tuple[int, ...], groups: int = groups) -> Tensor | None:
                return None if offset is None else _maps(plan, arena, offset, groups, shape, batch)

            source = batch if state.source is None else stacked(state.source, source_shape)
            assert source is not None
            full, pooled = stacked(state.full, shape), stacked(state.pooled, (channels, height // 2, width // 2))
            ends = _layer(plan.space, wave, run, rows, norm, source, full, pooled, backend)
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
    """Whether states of several supernets go together: our kernels take all weight sets, a library's conv one."""
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
    run: Sequence[PlannedState],
    rows: _Rows,
    norm: _Norm,
    x: Tensor,
    full: Tensor | None,
    pooled: Tensor | None,
    backend: str,
) -> Tensor:
    """One layer on the stacked states of `run`, each a statistics group; writes their maps, and returns them where no
    child wants them."""
    layer, stride = space.layers[wave.layer], 1 + wave.strides
    w = {name: rows(weight) for name, weight in rows.weights.layers[wave.layer].items()}
    conv = partial(norm.convolve, run, wave.layer, weight_index=rows.index, backend=backend)
    if wave.layer == 0 and rows.weights.stem is not None:
        x = F.conv2d(x, rows(rows.weights.stem)[0], stride=2, padding=3)  # the images: a run of one state
        stats = norm.statistics(run, wave.layer, "stem", x, backend)
        bn_add_relu_pool(x, stats, full=x, backend=backend)
        x = F.max_pool2d(x, 3, 2, 1)
    first, *others = layer.main
    rides = space.block == "basic" and "shortcut" in w  # the projection, with the first convolution
    y, stats, shortcut, shortcut_stats = conv(
        first.name, x, w[first.name], stride=stride if first.stage == "at" else 1,
        shortcut_weight=w["shortcut"] if rides else None,
    )  # fmt: skip
    if layer.kind != "stem" and not rides:
        if "shortcut" in w:
            shortcut, shortcut_stats, *_ = conv("shortcut", x, w["shortcut"], stride=stride)
        else:
            shortcut = x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
    for step in others:
        y, stats, *_ = conv(step.name, y, w[step.name], stats=stats, stride=stride if step.stage == "at" else 1)
    if full is None and pooled is None:
        full = y
    bn_add_relu_pool(
        y, stats, shortcut, shortcut_stats,
        full=full, pooled=pooled, pool="avg" if space.pool == "avg" else "max", backend=backend,
    )  # fmt: skip
    return y
