"""Scores of all (architecture, supernet) pairs: `score_architectures` in one pass, `score_one_by_one` as its oracle.

A score is the number of images that a pair classifies correctly. BatchNorm takes its statistics from each scoring batch
of each architecture (a *statistics group*), in fixed order and of fixed size, so a score depends on weights,
architecture, images and batch size only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.execution import Memory, Norm, run_batches
from bmsn.network import SupernetMixture, check_images
from bmsn.ops.checks import MAX_GROUP_PIXELS
from bmsn.plan import CHUNK_BYTES, EvaluationPlan, Pair
from bmsn.space import Architecture

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 2**30
NormKind = Literal["batch", "calibrated"]

_named: ContextVar[set[int] | None] = ContextVar("_named", default=None)  # supernets that `one_scoring` has warned of


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
    norm: NormKind | Norm = "batch",
    backend: str = "auto",
    max_bytes: int | None = None,
    calibration_images: Tensor | None = None,
    after_batch: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Counts the correctly classified images of every pair in one pass that computes each shared prefix once.

    Source: the scoring of Javan et al. 2023, section 2.3 (architecture after architecture there).

        >>> scores = bmsn.score_architectures(nets, images, labels)
        >>> len(scores.pairs) == len(nets.space) * nets.num_supernets
        True
        >>> architecture, supernet = scores.pairs[int(scores.correct.argmax())]
        >>> scores.total == len(images)
        True

    Args:
        mixture: the supernets; images go to the device of its weights.
        images: (N, C, H, W) float32, bfloat16 or float64, normalised, in any memory format: their dtype is that of the
            computation. Or uint8 (N, H, W, C): normalised by `mixture.pixel_table`, computed in float32 (float64 if the
            weights are). H and W are multiples of `space.total_stride`.
        labels: (N,) integers (not bool) in [0, num_classes).
        pairs: (architecture, supernet index), each once; None: `all_pairs`.
        batch_size: images in a statistics group; the last, smaller batch is a group of its own.
        norm: where BatchNorm's statistics come from. "batch": each scoring batch of each pair. "calibrated": measured
            once on all of `calibration_images` together and then frozen, so that an image's result depends on no other.
            What `calibrate` returned: frozen before this call, for several calls with the same weights.
        backend: "auto", "reference", "cpp" or "triton": of the ops, see `bmsn.backend.resolve`.
        max_bytes: bound on the activations alive at one time; images, weights and the convolution library's own
            workspace do not count. None: 1 GiB on a CPU, a quarter of what is free on a GPU, or one state's need if
            that is more.
        calibration_images: like `images`, for norm="calibrated" alone; usually from the training half.
        after_batch: called after each batch that the plan takes, with the images that went through all pairs, each
            counted once for each pair; on a GPU they may be under way still. What it raises ends the scoring.
    Returns:
        Scores, equal to `score_one_by_one`'s in float64, and but for rounding ties in float32 and bfloat16. A supernet
        with weights that are not finite is scored by its NaN logits, and a warning is logged that names it.
    Raises:
        InputError: any of these out of range, or `max_bytes` too small for one state (says how much is needed).
    """
    if not isinstance(norm, Norm) and norm not in ("batch", "calibrated"):
        raise InputError(f"norm must be 'batch', 'calibrated' or what calibrate returned; got {norm!r}")
    if (norm == "calibrated") != (calibration_images is not None):
        raise InputError(f"calibration_images are needed for norm='calibrated' and for nothing else; norm is {norm!r}")
    pairs = all_pairs(mixture) if pairs is None else tuple(pairs)
    images, labels = _checked(mixture, images, labels, pairs, batch_size)
    _warn_of_nan(mixture, pairs)
    if calibration_images is not None:
        norm = calibrate(mixture, calibration_images, pairs, images.dtype, backend, max_bytes)
    elif not isinstance(norm, Norm):
        norm = Norm()
    correct = _run_plan(
        mixture, images, labels, batch_size, norm,
        pairs=pairs, backend=backend, max_bytes=max_bytes, after_batch=after_batch,
    )  # fmt: skip
    return Scores(pairs, correct.cpu(), len(images))


@torch.no_grad()
def calibrate(
    mixture: SupernetMixture,
    images: Tensor,
    pairs: Sequence[Pair],
    dtype: torch.dtype,
    backend: str = "auto",
    max_bytes: int | None = None,
) -> Norm:
    """BatchNorm's statistics of all of `images` together, frozen for `score_architectures`.

    Args:
        mixture, images, pairs, backend, max_bytes: as for `score_architectures`; no other pairs can be scored.
        dtype: of the images that will be scored, and of the computation.
    Raises:
        InputError: as `score_architectures`, of `calibration_images`.
    """
    try:
        nothing = torch.zeros(len(images), dtype=torch.int64)
        images, nothing = _checked(mixture, images, nothing, pairs, max(2, len(nothing)))
        measured = Norm(kept={})
        _run_plan(
            mixture, images.to(dtype), nothing, len(nothing), measured,
            pairs=pairs, backend=backend, max_bytes=max_bytes,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"calibration_images: {error}") from error
    return Norm(frozen=measured.kept)


@torch.no_grad()
def score_one_by_one(
    mixture: SupernetMixture,
    images: Tensor,
    labels: Tensor,
    pairs: Sequence[Pair] | None = None,
    batch_size: int = 256,
    after_batch: Callable[[int], None] = lambda images: None,
) -> Scores:
    """The oracle of `score_architectures`, same arguments: every pair alone, by the mixture's `forward`."""
    pairs = all_pairs(mixture) if pairs is None else tuple(pairs)
    images, labels = _checked(mixture, images, labels, pairs, batch_size)
    correct = torch.zeros(len(pairs), dtype=torch.int64)
    for index, (architecture, supernet) in enumerate(pairs):
        for start in range(0, len(images), batch_size):
            logits = mixture(images[start : start + batch_size], architecture, supernet)
            correct[index] += (logits.argmax(1) == labels[start : start + batch_size]).sum().cpu()
            after_batch(len(logits))
    return Scores(pairs, correct, len(images))


def make_plan(
    mixture: SupernetMixture,
    images: Tensor,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 256,
    max_bytes: int | None = None,
) -> EvaluationPlan:
    """The plan that `score_architectures` runs for (N, C, H, W) `images`; on a GPU, for several batches at once."""
    size = (images.shape[2], images.shape[3])
    plan = partial(
        EvaluationPlan,
        mixture.space,
        pairs,
        image_size=size,
        itemsize=images.element_size(),
        # bfloat16 may be computed in float32 on the way: twice the bytes a map.
        workspace_maps=5 if images.element_size() > 2 else 9,
        chunk_bytes=_chunk_bytes(images.device),
    )
    one = min(batch_size, len(images))
    if max_bytes is None:
        try:
            found = plan(batch_size=one, max_bytes=_default_max_bytes(images.device))
        except InputError:  # not even one state fits
            found = plan(batch_size=one, max_bytes=plan(batch_size=one).least_bytes)
    else:
        found = plan(batch_size=one, max_bytes=max_bytes)
    if not _is_gpu(images.device):
        return found
    assert found.max_bytes is not None
    stem = size[0] * size[1] // 4 * mixture.space.stem_width if mixture.space.stem == "large" else 0
    batches = min(
        found.max_bytes // plan(batch_size=one).peak_bytes,
        len(images) // batch_size,
        MAX_GROUP_PIXELS // max(size[0] * size[1], stem) // one,  # what torch's pooling behind a stem can number, too
    )
    return plan(batch_size=batches * one, max_bytes=found.max_bytes) if batches > 1 else found


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _chunk_bytes(device: torch.device) -> int:
    """What stays in a CPU's cache; a GPU takes all states in one launch."""
    return sys.maxsize if _is_gpu(device) else CHUNK_BYTES


def _default_max_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 4 if _is_gpu(device) else DEFAULT_MAX_BYTES


def _checked(
    mixture: SupernetMixture, images: Tensor, labels: Tensor, pairs: Sequence[Pair], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Images as (N, C, H, W) of the dtype of the computation and labels, both on the mixture's device."""
    if not isinstance(batch_size, int) or batch_size < 2:
        raise InputError(f"batch_size must be an integer of at least 2; got {batch_size}")
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor.device.type not in ("cpu", "cuda"):
            raise InputError(f"{name} must lie on the CPU or on a CUDA device; got device {tensor.device}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Architecture):
            raise InputError(f"pairs[{index}] must be (Architecture, supernet index); got {pair!r}")
        supernet = pair[1]
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
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels must be {len(images)} integers; got {tuple(labels.shape)} of {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < mixture.num_classes:
        bad = int(((labels < 0) | (labels >= mixture.num_classes)).nonzero()[0])
        raise InputError(f"labels[{bad}] must be in 0..{mixture.num_classes - 1}; got {int(labels[bad])}")
    return images.to(device), labels.to(device, torch.int64)


@contextmanager
def one_scoring() -> Iterator[None]:
    """Within it `score_architectures` warns of a supernet once, in however many calls its images come."""
    token = _named.set(set())
    try:
        yield
    finally:
        _named.reset(token)


def _warn_of_nan(mixture: SupernetMixture, pairs: Sequence[Pair]) -> None:
    """Every architecture uses all layers, so one weight that is not finite spoils all scores of its supernet."""
    spoilt = set((~mixture.arena.isfinite().all(1)).nonzero().flatten().tolist())
    named = _named.get()
    spoilt -= named or set()
    supernets = [supernet for _, supernet in pairs if supernet in spoilt]
    if named is not None:
        named.update(supernets)
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
    norm: Norm,
    *,
    pairs: Sequence[Pair],
    backend: str,
    max_bytes: int | None,
    after_batch: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Each pair's correct classifications, (len(pairs),) int64 on the images' device."""
    plan = make_plan(mixture, images, pairs, batch_size=batch_size, max_bytes=max_bytes)
    memory = Memory(plan, images.device)
    weights = mixture.weights(mixture.arena, images.dtype)
    correct = torch.zeros(len(pairs), dtype=torch.int64, device=images.device)
    start = 0
    while start < len(images):
        left = len(images) - start
        batches = min(left, plan.batch_size) // batch_size  # 0: the last one is smaller
        size = batches * batch_size or left
        batch = images[start : start + size].contiguous(memory_format=torch.channels_last)
        groups = 1 if norm.is_frozen else max(1, batches)
        run_batches(plan, weights, memory, batch, groups, labels[start : start + size], correct, norm, backend)
        start += size
        after_batch(size * len(pairs))
    return correct
