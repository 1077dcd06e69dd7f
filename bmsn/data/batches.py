"""Batches of normalised images: gather, random crop, flip, normalise and cast in one pass, as channels_last tensors.

The pass is `bmsn.ops.batches`, on the device where the images lie. Values come from a table that is made once, in
float64, on the host (no multiply-add that one device contracts and another does not).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from bmsn import rng
from bmsn.backend import resolve
from bmsn.errors import InputError
from bmsn.ops.batches import DTYPES, augment, check_images

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


def as_tensor(array: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The array as a tensor on `device`: on the CPU the same memory, which nobody may write to."""
    if isinstance(array, Tensor):
        return array.to(device)
    with warnings.catch_warnings():  # of torch, about memory maps that are read-only
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array).to(device)


class BatchStream:
    """Batches of some images in random order, each image once an epoch; a pure function of (seed, purpose, step).

    Batch `step` belongs to epoch step // steps_per_epoch; images that don't fill a batch are left out of their epoch.
    The same batches, bit for bit, on every device.

    Args:
        images: (N, H, W, C) uint8, C-contiguous; may be memory-mapped. A tensor on `device` is shared, not copied.
        labels: (N,) int64.
        indices: of the images in this stream, all different.
        table: (256, C) float32, from `normalisation_table`.
        batch_size: in 2..len(indices).
        dtype: float32 or bfloat16.
        seed: of the run.
        purpose: keeps the randomness of this stream apart from that of others.
        augment: crop at random from the image padded by 4 pixels of the mean colour, and flip every other image left to
            right.
        device: where batches are made; images that are not there are copied to it, once.
        backend: see `bmsn.backend.resolve`.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        indices: np.ndarray,
        table: Tensor,
        *,
        batch_size: int,
        dtype: torch.dtype,
        seed: int,
        purpose: str,
        augment: bool,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        device = torch.device(device)
        self.backend = resolve("augment", backend, device=device)
        stored = as_tensor(images)
        self.table = _checked_table(table, stored, dtype).to(device)
        _check_indices(indices, len(stored))
        self.labels = as_tensor(labels, device)
        if self.labels.dtype != torch.int64 or self.labels.shape != stored.shape[:1]:
            raise InputError(f"labels must be int64 ({len(stored)},); got {labels.dtype} {tuple(labels.shape)}")
        if not 2 <= batch_size <= len(indices):
            raise InputError(f"batch_size must be in 2..{len(indices)}, the number of images; got {batch_size}")
        self.images, self.device = stored.to(device), device
        self.indices, self.batch_size, self.dtype, self.augment = indices, batch_size, dtype, augment
        self.seed, self.purpose = seed, purpose
        self._key = rng.philox_key(seed, f"{purpose}/augment")
        self._epoch, self._order = -1, torch.empty(len(indices), dtype=torch.int64, device=device)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.indices) // self.batch_size

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns images (B, C, H, W), channels_last, and labels (B,) int64, both on `device`."""
        self.prepare(step)
        return self.at(torch.full((), step, dtype=torch.int64, device=self._order.device))

    def prepare(self, step: int) -> None:
        """Lays down the order of the images in the epoch of `step`, which `at` reads. Waits for nothing on a GPU."""
        if step < 0:
            raise InputError(f"step must be at least 0; got {step}")
        epoch = step // self.steps_per_epoch
        if epoch == self._epoch:
            return
        order = rng.generator(self.seed, f"{self.purpose}/order", epoch).permutation(self.indices)
        drawn = torch.from_numpy(order)
        if self._order.is_cuda:  # in the order of the stream: batches enqueued before still read the epoch before
            drawn = drawn.pin_memory()
        self._order.copy_(drawn, non_blocking=True)
        self._epoch = epoch

    def at(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """`batch` of a step that lies on the device, () int64, in the epoch that was prepared; waits for nothing."""
        return torch.ops.bmsn.augment(
            self.images, self.labels, self._order, self.table, step, self._key, self.batch_size, self.augment,
            self.backend,
        )  # fmt: skip


def normalise(
    images: np.ndarray | Tensor,
    table: Tensor,
    dtype: torch.dtype,
    indices: np.ndarray | None = None,
    backend: str = "auto",
) -> Tensor:
    """Images without augmentation, for scoring.

    Args:
        images: (N, H, W, C) uint8, C-contiguous; may be memory-mapped, or on a GPU, where the result is then too.
        table: (256, C) float32, from `normalisation_table`.
        dtype: float32 or bfloat16.
        indices: int64, of the images wanted, in the order wanted; None: all.
        backend: see `bmsn.backend.resolve`.
    Returns:
        (N, C, H, W), or one image for each index, channels_last.
    """
    stored = as_tensor(images)
    lookup = _checked_table(table, stored, dtype).to(stored.device)
    chosen = np.arange(len(stored)) if indices is None else indices
    _check_indices(chosen, len(stored))
    if not len(chosen):
        return lookup.new_empty((0, *stored.shape[1:])).permute(0, 3, 1, 2)
    order = torch.from_numpy(np.ascontiguousarray(chosen)).to(stored.device)
    first = torch.zeros((), dtype=torch.int64, device=stored.device)
    return augment(
        stored, None, order, lookup, first, key=0, batch_size=len(chosen), crop=False, backend=backend
    )[0]  # fmt: skip


def _checked_table(table: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The table in the dtype of the batches, rounded once by torch."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype}")
    if table.dtype != torch.float32:
        raise InputError(f"table must be float32; got {table.dtype}")
    check_images(images, table.to(images.device))
    return table.to(dtype)


def _check_indices(indices: np.ndarray, num_images: int) -> None:
    """What gathering relies on: nothing is checked after this."""
    if indices.dtype != np.int64 or indices.ndim != 1:
        raise InputError(f"indices must be int64 of one dimension; got {indices.dtype} {indices.shape}")
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_images:
        raise InputError(f"indices must be in 0..{num_images - 1}; got {indices.min()}..{indices.max()}")
