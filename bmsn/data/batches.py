"""Batches of normalised images: gather, random crop, flip, normalise and cast in one pass, as channels_last tensors.

The reference is numpy and torch; csrc/augment.cpp gives the same bits. Both look values up in one table that is made
once, in float64, on the host (no multiply-add that one device contracts and another does not).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bmsn import rng
from bmsn.backend import extension, resolve
from bmsn.errors import InputError

PADDING = 4  # pixels on each side before the random crop, 0 after normalisation: the channel's mean
DTYPES = (torch.float32, torch.bfloat16)
_CHUNK_PIXELS = 1 << 22  # counted at a time: small enough for the cache, and for images larger than memory


def normalisation(images: np.ndarray, indices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (population) of each channel, from the training half only: the rest is held out.

    Exact: from counts of the 256 values.

    Args:
        images: (N, H, W, C) uint8.
        indices: of the images that count, in any order; None: all.
    Returns:
        mean, std: (C,) float64, of pixels in [0, 1]. A constant channel has std 1, so it is normalised to 0.
    """
    num_images = len(images) if indices is None else len(indices)
    if num_images == 0:
        raise InputError("normalisation needs at least 1 image; got 0")
    channels = images.shape[3]
    counts = np.zeros((256, channels), np.int64)
    step = max(1, _CHUNK_PIXELS // images[0].size)
    for start in range(0, num_images, step):
        stop = min(start + step, num_images)
        chunk = images[start:stop] if indices is None else images[indices[start:stop]]
        for c in range(channels):
            counts[:, c] += np.bincount(chunk[..., c].ravel(), minlength=256)
    values = np.arange(256)[:, None] / 255
    total = counts.sum(0)
    mean = (counts * values).sum(0) / total
    std = np.sqrt((counts * (values - mean) ** 2).sum(0) / total)
    constant = (counts > 0).sum(0) == 1  # by counts: rounding leaves a std of 1e-17
    return mean, np.where(constant, 1.0, std)


def normalisation_table(mean: np.ndarray, std: np.ndarray) -> Tensor:
    """(256, C) float32: what each value of each channel becomes, (value / 255 - mean) / std, rounded once."""
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise InputError(f"normalisation needs finite means and positive deviations; got {mean} and {std}")
    values = np.arange(256)[:, None] / 255
    return torch.from_numpy(((values - mean) / std).astype(np.float32))


class BatchStream:
    """Batches of some images in random order, each image once an epoch; a pure function of (seed, purpose, step).

    Batch `step` belongs to epoch step // steps_per_epoch; images that don't fill a batch are left out of their epoch.

    Args:
        images: (N, H, W, C) uint8, C-contiguous; may be memory-mapped.
        labels: (N,) int64.
        indices: of the images in this stream, all different.
        table: (256, C) float32, from `normalisation_table`.
        batch_size: in 2..len(indices).
        dtype: float32 or bfloat16.
        seed: of the run.
        purpose: keeps the randomness of this stream apart from that of others.
        augment: crop at random from the image padded by 4 pixels of the mean colour, and flip every other image left to
            right.
        backend: see `bmsn.backend.resolve`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        table: Tensor,
        *,
        batch_size: int,
        dtype: torch.dtype,
        seed: int,
        purpose: str,
        augment: bool,
        backend: str = "auto",
    ) -> None:
        _check(images, indices, table, dtype)
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise InputError(f"labels must be int64 ({len(images)},); got {labels.dtype} {labels.shape}")
        if not 2 <= batch_size <= len(indices):
            raise InputError(f"batch_size must be in 2..{len(indices)}, the number of images; got {batch_size}")
        self.images, self.labels, self.indices, self.table = images, labels, indices, table
        self.batch_size, self.dtype, self.augment = batch_size, dtype, augment
        self.seed, self.purpose = seed, purpose
        self.backend = resolve("augment", backend)
        self._epoch, self._order = -1, indices

    @property
    def steps_per_epoch(self) -> int:
        return len(self.indices) // self.batch_size

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns images (B, C, H, W), channels_last, and labels (B,) int64."""
        if step < 0:
            raise InputError(f"step must be at least 0; got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        if self.augment:
            random = rng.generator(self.seed, f"{self.purpose}/augment", step)
            offsets = random.integers(0, 2 * PADDING + 1, size=(self.batch_size, 2))
            flips = random.integers(0, 2, size=self.batch_size)
        else:
            offsets, flips = _centred(self.batch_size)
        images = _transform(self.images, chosen, offsets, flips, self.table, self.dtype, self.backend)
        return images, torch.from_numpy(self.labels[chosen])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = rng.generator(self.seed, f"{self.purpose}/order", epoch).permutation(self.indices)
            self._epoch = epoch
        return self._order


def normalise(
    images: np.ndarray,
    table: Tensor,
    dtype: torch.dtype,
    indices: np.ndarray | None = None,
    backend: str = "auto",
) -> Tensor:
    """Images without augmentation, for scoring.

    Args:
        images: (N, H, W, C) uint8, C-contiguous; may be memory-mapped.
        table: (256, C) float32, from `normalisation_table`.
        dtype: float32 or bfloat16.
        indices: int64, of the images wanted, in the order wanted; None: all.
        backend: see `bmsn.backend.resolve`.
    Returns:
        (N, C, H, W), or one image for each index, channels_last.
    """
    chosen = np.arange(len(images)) if indices is None else indices
    _check(images, chosen, table, dtype)
    return _transform(images, chosen, *_centred(len(chosen)), table, dtype, resolve("augment", backend))


def _check(images: np.ndarray, indices: np.ndarray, table: Tensor, dtype: torch.dtype) -> None:
    """What the C++ loop relies on: nothing is checked after this."""
    if images.dtype != np.uint8 or images.ndim != 4 or not images.flags.c_contiguous:
        raise InputError(f"images must be C-contiguous uint8 (N, H, W, C); got {images.dtype} {images.shape}")
    if indices.dtype != np.int64 or indices.ndim != 1:
        raise InputError(f"indices must be int64 of one dimension; got {indices.dtype} {indices.shape}")
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(images):
        raise InputError(f"indices must be in 0..{len(images) - 1}; got {indices.min()}..{indices.max()}")
    if table.dtype != torch.float32 or table.shape != (256, images.shape[3]) or not table.is_contiguous():
        raise InputError(f"table must be float32 (256, {images.shape[3]}); got {table.dtype} {tuple(table.shape)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype}")


def _centred(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and flips that change nothing."""
    return np.full((num_images, 2), PADDING), np.zeros(num_images, np.int64)


def _transform(
    images: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray,
    flips: np.ndarray,
    table: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Crops at `offsets` (B, 2), (top, left) in the padded image, flips, looks values up; arrays are int64."""
    run = transform_cpp if backend == "cpp" else transform_reference
    return run(images, indices, offsets, flips, table, dtype)


def transform_reference(
    images: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray,
    flips: np.ndarray,
    table: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    _, height, width, channels = images.shape
    rows = np.arange(height) + offsets[:, :1] - PADDING  # (B, H) in the image as it is stored
    columns = np.arange(width)
    columns = np.where(flips[:, None], width - 1 - columns, columns) + offsets[:, 1:] - PADDING  # (B, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    pixels = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    values = table.to(dtype)[torch.from_numpy(pixels).int(), torch.arange(channels)]
    values[torch.from_numpy(~inside)] = 0
    return values.permute(0, 3, 1, 2)  # stored as NHWC: channels_last


def transform_cpp(
    images: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray,
    flips: np.ndarray,
    table: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    module = extension()
    assert module is not None, "resolve chose cpp"
    num_images = len(indices)
    _, height, width, channels = images.shape
    indices, offsets, flips = (np.ascontiguousarray(array) for array in (indices, offsets, flips))
    out = torch.empty((num_images, height, width, channels), dtype=dtype)
    module.augment(
        images.ctypes.data,
        (num_images, height, width, channels),
        indices.ctypes.data,
        offsets.ctypes.data,
        flips.ctypes.data,
        PADDING,
        table.data_ptr(),
        out.data_ptr(),
        dtype == torch.bfloat16,
    )
    return out.permute(0, 3, 1, 2)
