"""`ImageDataset`, the one in-memory form of all data, and its split into a training and a validation half."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from bmsn import rng
from bmsn.errors import InputError

MIN_IMAGES_PER_CLASS = 2  # one for each half
_HASH_CHUNK = 1 << 22  # bytes hashed by one thread at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """Images with labels. The arrays may be memory-mapped; nobody writes to them.

    Attributes:
        name: for reports and file names, as "synthetic" or "cifar10-jpeg75".
        train_images: (N, H, W, C) uint8, H = W. Searches split it into a training and a validation half.
        train_labels: (N,) int64 in 0..num_classes-1, every class at least twice.
        test_images: (T, H, W, C) uint8; T may be 0.
        test_labels: (T,) int64.
        class_names: one for each class.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            field = f"{self.name}: {part}_images"
            if images.dtype != np.uint8 or images.ndim != 4:
                raise InputError(f"{field} must be uint8 (N, H, W, C); got {images.dtype} {images.shape}")
            if images.shape[1] != images.shape[2] or 0 in images.shape[1:]:
                raise InputError(f"{field} must be square; got (N, H, W, C) = {images.shape}")
            if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
                raise InputError(
                    f"{self.name}: {part}_labels must be int64 ({len(images)},), one for each image; "
                    f"got {labels.dtype} {labels.shape}"
                )
            self._check_labels(part, labels)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise InputError(
                f"{self.name}: test_images must have the training images' size (H, W, C) = "
                f"{self.train_images.shape[1:]}; got {self.test_images.shape[1:]}"
            )
        counts = np.bincount(self.train_labels, minlength=self.num_classes)
        rare = np.flatnonzero(counts < MIN_IMAGES_PER_CLASS)
        if len(rare):
            raise InputError(
                f"{self.name}: class {self.class_names[rare[0]]!r} has {counts[rare[0]]} training image(s); "
                f"each class needs at least {MIN_IMAGES_PER_CLASS}, one for each half of the split"
            )

    def _check_labels(self, part: str, labels: np.ndarray) -> None:
        if self.num_classes < 2:
            raise InputError(f"{self.name}: class_names must name at least 2 classes; got {list(self.class_names)}")
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            raise InputError(
                f"{self.name}: {part}_labels[{wrong[0]}] is {labels[wrong[0]]}; accepted: 0..{self.num_classes - 1}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height and width, in pixels."""
        return self.train_images.shape[1]

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[3]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of images, labels and class names; the name does not count. Reads everything once."""
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        parts = [list(self.class_names), *(_digest(array) for array in arrays)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def numbered_class_names(labels: np.ndarray, where: str) -> tuple[str, ...]:
    """ "0", "1", ... for labels that came without names; `where` is for the message."""
    last = int(labels.max(initial=-1))
    if last >= len(labels):  # a stray number would make a million names
        raise InputError(f"{where}: label {last} among {len(labels)} images; every class from 0 up needs images")
    return tuple(str(label) for label in range(last + 1))


def _digest(array: np.ndarray) -> str:
    """sha256 over dtype, shape and the sha256 of each chunk: they are hashed in parallel (hashlib frees the GIL)."""
    rows = max(1, _HASH_CHUNK // max(1, array[:1].nbytes))
    chunks = (array[start : start + rows] for start in range(0, len(array), rows))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(lambda chunk: hashlib.sha256(np.ascontiguousarray(chunk).data).digest(), chunks)
        head = f"{array.dtype.str} {array.shape}".encode()
        return hashlib.sha256(head + b"".join(digests)).hexdigest()


def split_halves(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits images into a training and a validation half, stratified by class.

    Of a class of odd size the spare image goes to the training half and to the validation half in turn, so that the
    halves differ by at most one image. A pure function of its arguments.

    Args:
        labels: (N,) int64.
        seed: of the run.
    Returns:
        Two disjoint, sorted int64 arrays of indices that together are 0..N-1.
    """
    order = rng.generator(seed, "split").permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # shuffled inside each class, classes one after the other
    counts = np.unique(labels, return_counts=True)[1]
    odd = counts % 2
    num_training = counts // 2 + odd * (np.cumsum(odd) % 2)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # place inside the own class
    training = rank < np.repeat(num_training, counts)
    return np.sort(order[training]), np.sort(order[~training])
