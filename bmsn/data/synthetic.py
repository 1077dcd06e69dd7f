"""The built-in image set: 32x32 colour images of glyphs that are drawn small or large, so where a CNN pools matters.

There are 4 classes, each a pattern of 5x5 cells, 12 of them light and 13 dark. An image shows the glyph of its class
in one of two sizes, at random places on a noisy, tinted ground:

- fine: a cell is 1 pixel; 4 glyphs. Detail of 1 pixel: lost where maps are halved before it has been read.
- coarse: a cell is 5 pixels; 1 glyph, fainter than the noise of its pixels: needs averaging and a wide view.

`synthetic:fine` has the first kind alone, `synthetic:coarse` the second, the default both in equal parts with the
same classes. Every glyph may be mirrored and has an amplitude of its own, so images range from easy to hopeless;
tint, contrast and a ground of 7x7 pixel blotches differ from image to image. How all architectures of ResNet-14 do
alone: benchmarks/results/.

Bytes are a pure function of (variant, sizes, seed): integers from Philox counters and tables, no floating point per
pixel. The seed changes images, noise and order; glyphs and sizes belong to the set. Training and test part have
streams of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bmsn import rng
from bmsn.data.dataset import ImageDataset
from bmsn.errors import InputError

SIZE = 32
GLYPHS = (
    "...#. #..## ..#.# #.#.# ##..#",
    ".##.. #..#. #..#. ##..# #.#.#",
    "###.# .##.# #...# #.... #...#",
    "....# .##.# ###.# #.##. .#...",
)
_GREY, _TINT = 128, 30  # mean grey; largest tint of a channel
_CONTRAST = (128, 256)  # of glyphs and ground in each channel, in 1/256
_PIXEL_NOISE, _BLOTCH_NOISE, _COLOUR_NOISE = 30, 10, 5  # standard deviations, grey levels
_BLOTCH = 7  # pixels on a side
# Quantiles of the normal distribution in 1/64: a random byte becomes noise by one look-up.
_NORMAL = np.array([round(64 * NormalDist().inv_cdf((byte + 0.5) / 256)) for byte in range(256)], np.int16)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to show a glyph: pixels on a side of a cell, copies in an image, range of amplitudes in grey levels."""

    cell: int
    copies: int
    amplitude: tuple[int, int]


FINE = Kind(cell=1, copies=4, amplitude=(20, 66))
COARSE = Kind(cell=5, copies=1, amplitude=(4, 26))
VARIANTS: dict[str, tuple[Kind, ...]] = {"default": (FINE, COARSE), "fine": (FINE,), "coarse": (COARSE,)}


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
        num_train: training images, at least two a class.
        num_test: test images, at least 0.
        seed: changes images and noise, not the glyphs.
    Raises:
        InputError: an unknown variant or a value out of range.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant {variant!r} is unknown; accepted: {', '.join(VARIANTS)}")
    for field, value, low in (("num_train", num_train, 2 * len(GLYPHS)), ("num_test", num_test, 0)):
        if value < low:
            raise InputError(f"{field} must be at least {low}; got {value}")
    (train_images, train_labels), (test_images, test_labels) = (
        _part(VARIANTS[variant], count, _Draws(seed, f"synthetic/{variant}/{part}"))
        for part, count in (("train", num_train), ("test", num_test))
    )
    return ImageDataset(
        name="synthetic" if variant == "default" else f"synthetic-{variant}",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(f"glyph {number}" for number in range(1, len(GLYPHS) + 1)),
    )


def _part(kinds: tuple[Kind, ...], count: int, draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 and labels; counts of (class, kind) differ by at most one."""
    order = np.argsort(draws.integers(0, 2**32 - 1, count), kind="stable")
    place = np.arange(count)[order]
    labels, kind = place % len(GLYPHS), place // len(GLYPHS) % len(kinds)
    light = _noise(draws, _PIXEL_NOISE, count, SIZE, SIZE)
    blotches = -(-SIZE // _BLOTCH)
    ground = _noise(draws, _BLOTCH_NOISE, count, blotches, blotches)
    light += ground.repeat(_BLOTCH, 1).repeat(_BLOTCH, 2)[:, :SIZE, :SIZE]
    for number, shown in enumerate(kinds):
        _add_glyphs(light, np.flatnonzero(kind == number), labels, shown, draws)
    contrast = draws.integers(*_CONTRAST, 3 * count).astype(np.int16).reshape(count, 1, 1, 3)
    images = (light[..., None] * contrast) >> 8  # at most 127 * 256 in magnitude: _add_glyphs and noise keep to it
    images += _noise(draws, _COLOUR_NOISE, count, SIZE, SIZE, 3)
    images += (_GREY + draws.integers(-_TINT, _TINT, 3 * count)).astype(np.int16).reshape(count, 1, 1, 3)
    return np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64)


def _noise(draws: _Draws, deviation: int, *shape: int) -> np.ndarray:
    return (_NORMAL * deviation >> 6)[draws.bytes(*shape)]


def _add_glyphs(light: np.ndarray, rows: np.ndarray, labels: np.ndarray, kind: Kind, draws: _Draws) -> None:
    """Draws the glyphs of images `rows` into `light` (N, 32, 32) int16."""
    patterns = np.array(
        [[[1 if cell == "#" else -1 for cell in line] for line in glyph.split()] for glyph in GLYPHS], np.int16
    )
    patterns = patterns.repeat(kind.cell, 1).repeat(kind.cell, 2)
    patterns = np.stack([patterns, patterns[:, :, ::-1]])  # (mirrored, class, height, width)
    side, count = patterns.shape[2], len(rows)
    inside = np.arange(side)
    for _ in range(kind.copies):
        glyphs = patterns[draws.integers(0, 1, count), labels[rows]]
        amplitude = draws.integers(*kind.amplitude, count).astype(np.int16)
        y, x = (draws.integers(0, SIZE - side, count)[:, None] + inside for _ in range(2))
        light[rows[:, None, None], y[:, :, None], x[:, None, :]] += glyphs * amplitude[:, None, None]
    np.clip(light, -127, 127, out=light)
