"""The built-in image set: 32x32 colour images whose classes differ in fine detail or in a coarse arrangement.

- fine, 2 classes: two small patches of upright stripes, each stripe 1 pixel wide, one patch above the other, 2 to 22
  rows apart; either in step (light above light) or out of step. Halving a map forgets which of two neighbouring
  columns was the light one, so both patches must be seen by one neuron before the first pooling: the further apart
  they are, the later that must be.
- coarse, 8 classes: two light squares of 5x5 pixels, 6 to 8 pixels apart, or 9 to 11, ... or 27 to 29. What tells
  these apart spans the image, and is learnt soonest by more than one layer that works on the smallest maps.

`synthetic:fine` has the first kind alone, `synthetic:coarse` the second, the default both in equal parts, with all 10
classes. Amplitudes, tint, contrast and a ground of 7x7 pixel blotches differ from image to image. How all
architectures of ResNet-14 do alone: benchmarks/results/.

What must not tell the classes apart is random: where a patch lies, which columns are light in the upper one, and,
each for itself, where the light columns of a patch are strongest, where the dark ones are, and how strong every single
column is. Without that, the outline of a patch would tell its phase to those who have pooled it away.

Bytes are a pure function of (variant, sizes, seed): integers from Philox counters and tables, no floating point per
pixel. The seed changes images, noise and order. Training and test part have streams of their own.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from bmsn import rng
from bmsn.data.dataset import ImageDataset
from bmsn.errors import InputError

SIZE = 32
PHASES = ("in step", "out of step")
DISTANCES = tuple((low, low + 2) for low in range(6, 30, 3))  # of two squares' centres, in pixels
KINDS = {"fine": PHASES, "coarse": tuple(f"{low} to {high} apart" for low, high in DISTANCES)}  # and their classes
VARIANTS: dict[str, tuple[str, ...]] = {"default": ("fine", "coarse"), "fine": ("fine",), "coarse": ("coarse",)}
_GREY, _TINT = 128, 30  # mean grey; largest tint of a channel
_CONTRAST = (128, 256)  # of what is drawn and of the ground, in each channel, in 1/256
_PIXEL_NOISE, _BLOTCH_NOISE, _COLOUR_NOISE = 20, 8, 5  # standard deviations, grey levels
_BLOTCH = 7  # pixels on a side
# Quantiles of the normal distribution in 1/64: a random byte becomes noise by one look-up.
_NORMAL = np.array([round(64 * NormalDist().inv_cdf((byte + 0.5) / 256)) for byte in range(256)], np.int16)

_STRIPES_AMPLITUDE = (60, 120)
_PATCH_CENTRE = (46, 78)  # column of the strongest stripe, in quarters of a pixel
_COLUMN_STRENGTH = (154, 358)  # of one column against its outline, in 1/256
_OUTLINE = np.array([round(256 * 2.718281828 ** (-((quarters / 14) ** 2) / 2)) for quarters in range(128)], np.int32)
_ROWS = np.array([3, 35, 155, 256, 155, 35, 3], np.int32)  # a patch from top to bottom, in 1/256: Gaussian
# Rows between the centres of two patches, by a random byte; near ones are more frequent: with them learning begins.
_APART = np.array([2 + round(20 * ((byte + 0.5) / 256) ** 2) for byte in range(256)], np.int64)

_SQUARE = 5  # pixels on a side
_SQUARE_AMPLITUDE = (50, 110)


class _Draws:
    """Integers from one Philox stream. Raw words only: numpy promises their values for all versions."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._bits = rng.generator(seed, purpose).bit_generator

    def bytes(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        return self._bits.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        """`count` of low..high, both included."""
        words = self._bits.random_raw(count) >> np.uint64(32)
        return low + (words * np.uint64(high - low + 1) >> np.uint64(32)).astype(np.int64)


def generate_synthetic(
    variant: str = "default", num_train: int = 10_000, num_test: int = 10_000, seed: int = 0
) -> ImageDataset:
    """The built-in set.

    Args:
        variant: "default", "fine" or "coarse".
        num_train: training images, at least two of every class.
        num_test: test images, at least 0.
        seed: changes images and noise.
    Raises:
        InputError: an unknown variant or a value out of range.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant {variant!r} is unknown; accepted: {', '.join(VARIANTS)}")
    kinds = VARIANTS[variant]
    least = 2 * len(kinds) * max(len(KINDS[kind]) for kind in kinds)
    for field, value, low in (("num_train", num_train, least), ("num_test", num_test, 0)):
        if value < low:
            raise InputError(f"{field} must be at least {low}; got {value}")
    (train_images, train_labels), (test_images, test_labels) = (
        _part(kinds, count, _Draws(seed, f"synthetic/{variant}/{part}"))
        for part, count in (("train", num_train), ("test", num_test))
    )
    return ImageDataset(
        name="synthetic" if variant == "default" else f"synthetic-{variant}",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(name for kind in kinds for name in KINDS[kind]),
    )


def _part(kinds: tuple[str, ...], count: int, draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 and labels; counts of kinds, and of classes in a kind, differ by at most one."""
    order = np.argsort(draws.integers(0, 2**32 - 1, count), kind="stable")
    place = np.arange(count)[order]
    light = _noise(draws, _PIXEL_NOISE, count, SIZE, SIZE)
    blotches = -(-SIZE // _BLOTCH)
    ground = _noise(draws, _BLOTCH_NOISE, count, blotches, blotches)
    light += ground.repeat(_BLOTCH, 1).repeat(_BLOTCH, 2)[:, :SIZE, :SIZE]
    labels, first = np.empty(count, np.int64), 0
    for number, kind in enumerate(kinds):
        shown = np.flatnonzero(place % len(kinds) == number)
        classes = place[shown] // len(kinds) % len(KINDS[kind])
        light[shown] += _DRAWN[kind](classes, draws)
        labels[shown] = first + classes
        first += len(KINDS[kind])
    np.clip(light, -127, 127, out=light)
    contrast = draws.integers(*_CONTRAST, 3 * count).astype(np.int16).reshape(count, 1, 1, 3)
    images = (light[..., None] * contrast) >> 8  # at most 127 * 256 in magnitude
    images += _noise(draws, _COLOUR_NOISE, count, SIZE, SIZE, 3)
    images += (_GREY + draws.integers(-_TINT, _TINT, 3 * count)).astype(np.int16).reshape(count, 1, 1, 3)
    return np.clip(images, 0, 255).astype(np.uint8), labels


def _noise(draws: _Draws, deviation: int, *shape: int) -> np.ndarray:
    return (_NORMAL * deviation >> 6)[draws.bytes(*shape)]


def _stripes(phases: np.ndarray, draws: _Draws) -> np.ndarray:
    """Two patches in each image, in step (phase 0) or out of step (1): (N, 32, 32) int16."""
    count = len(phases)
    columns = np.arange(SIZE)
    apart = _APART[draws.bytes(count)]
    upper = 2 + _below(draws, SIZE - 4 - apart)
    first_light = draws.integers(0, 1, count)
    drawn = np.zeros((count, SIZE, SIZE), np.int16)
    for row, light_column in ((upper, first_light), (upper + apart, first_light ^ phases)):
        amplitude = draws.integers(*_STRIPES_AMPLITUDE, count).astype(np.int32)[:, None]
        is_light = (columns + light_column[:, None]) % 2 == 0
        centre = draws.integers(*_PATCH_CENTRE, 2 * count).reshape(2, count, 1)
        outline = _OUTLINE[np.abs(4 * columns - np.where(is_light, *centre))]
        strength = draws.integers(*_COLUMN_STRENGTH, count * SIZE).reshape(count, SIZE).astype(np.int32)
        stripes = amplitude * (outline * strength >> 8)  # (N, 32), at most 120 * 358
        beside = columns - row[:, None] + len(_ROWS) // 2
        height = np.where((beside >= 0) & (beside < len(_ROWS)), _ROWS[np.clip(beside, 0, len(_ROWS) - 1)], 0)
        patch = (height[:, :, None] * stripes[:, None, :] >> 16).astype(np.int16)
        drawn += np.where(is_light[:, None, :], patch, -patch)
    return drawn


def _squares(distances: np.ndarray, draws: _Draws) -> np.ndarray:
    """Two squares in each image, as far apart as DISTANCES[distances] says: (N, 32, 32) int16."""
    count, reach = len(distances), SIZE - _SQUARE
    down, right = np.mgrid[: reach + 1, -reach : reach + 1].reshape(2, -1)
    offsets = np.stack([down, right], axis=1)[(down > 0) | (right > 0)]  # one of each pair of opposite ones
    squared = (offsets**2).sum(1)
    order = squared.argsort(kind="stable")
    low, high = np.square(DISTANCES).T
    starts, ends = squared[order].searchsorted(low, "left"), squared[order].searchsorted(high, "right")
    offset = offsets[order][starts[distances] + _below(draws, (ends - starts)[distances])]
    corner = np.stack([_below(draws, reach + 1 - np.abs(offset[:, axis])) for axis in (0, 1)], axis=1)
    corner[:, 1] += np.maximum(-offset[:, 1], 0)
    inside = np.arange(_SQUARE)
    drawn = np.zeros((count, SIZE, SIZE), np.int16)
    for y, x in (corner.T, (corner + offset).T):
        amplitude = draws.integers(*_SQUARE_AMPLITUDE, count).astype(np.int16)
        rows, columns = y[:, None, None] + inside[:, None], x[:, None, None] + inside
        drawn[np.arange(count)[:, None, None], rows, columns] = amplitude[:, None, None]
    return drawn


def _below(draws: _Draws, bounds: np.ndarray) -> np.ndarray:
    """One integer from 0 to below its bound each."""
    return draws.integers(0, 2**32 - 1, len(bounds)) * bounds >> 32


_DRAWN = {"fine": _stripes, "coarse": _squares}
