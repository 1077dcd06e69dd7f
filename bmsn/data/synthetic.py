"""The built-in image set: 32x32 colour images whose classes differ in fine detail or in a coarse arrangement.

- fine, 2 classes: two small patches of upright stripes, each stripe 1 pixel wide, one patch above the other, 2 to 19
  rows apart; either in step (light above light) or out of step. Halving a map forgets which of two neighbouring
  columns was the light one, so both patches must be seen by one neuron before the first pooling: the further apart
  they are, the later that must be.
- coarse, 5 classes: 12 dots of 4x4 pixels all over the image, each light or dark. The class is how far the number of
  light ones is from the nearest multiple of 8: 0, 1, ... or 4. A sum of the whole image that is folded twice asks for
  more than one layer on the smallest maps.

`synthetic:fine` has the first kind alone, `synthetic:coarse` the second. The default has one image of the first kind to
three of the second, with all 7 classes. Amplitudes, tint, contrast and a ground of 7x7 pixel blotches differ from image
to image. How all architectures of ResNet-14 do alone: benchmarks/results/.

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
FOLDS = tuple(f"{away} from a multiple of 8" for away in range(5))  # the number of light dots
KINDS = {"fine": PHASES, "coarse": FOLDS}  # and their classes
VARIANTS = {"default": {"fine": 1, "coarse": 3}, "fine": {"fine": 1}, "coarse": {"coarse": 1}}  # shares of the kinds
_GREY, _TINT = 128, 30  # mean grey; largest tint of a channel
_CONTRAST = (128, 256)  # of what is drawn and of the ground, in each channel, in 1/256
_PIXEL_NOISE, _BLOTCH_NOISE, _COLOUR_NOISE = 20, 8, 5  # standard deviations, grey levels
_BLOTCH = 7  # pixels on a side
# Quantiles of the normal distribution in 1/64: a random byte becomes noise by one look-up.
_NORMAL = np.array([round(64 * NormalDist().inv_cdf((byte + 0.5) / 256)) for byte in range(256)], np.int16)

_STRIPES_AMPLITUDE = (90, 127)
_PATCH_CENTRE = (46, 78)  # column of the strongest stripe, in quarters of a pixel
_COLUMN_STRENGTH = (154, 358)  # of one column against its outline, in 1/256
_OUTLINE = np.array([round(256 * 2.718281828 ** (-((quarters / 14) ** 2) / 2)) for quarters in range(128)], np.int32)
_ROWS = np.array([3, 35, 155, 256, 155, 35, 3], np.int32)  # a patch from top to bottom, in 1/256: Gaussian
# Rows between the centres of two patches, from and to, in so many of 256 images. With near ones learning begins, from
# those in between it goes on to the far ones.
_APART = np.concatenate(
    [low + (high - low + 1) * np.arange(count) // count for low, high, count in ((2, 4, 97), (5, 13, 82), (14, 19, 77))]
)

_NUM_DOTS = 12
_DOT, _CELL = 4, 8  # pixels on a side; each dot lies in a cell of its own
_DOT_AMPLITUDE = (52, 78)
# Light dots in an image of each class: one of four, in equal parts. Half of all images lie below the first fold, so
# that a plain sum tells part of the class: with that learning begins.
_LIGHT = np.array([(away, away, 8 - away, 8 + away) for away in range(len(FOLDS))], np.int64)


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
    Returns:
        images (N, 32, 32, 3) uint8 in grey levels, labels (N,) int64.
    Raises:
        InputError: an unknown variant or a value out of range.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant {variant!r} is unknown; accepted: {', '.join(VARIANTS)}")
    shares = VARIANTS[variant]
    least = sum(shares.values()) * max(-(-2 * len(KINDS[kind]) // share) for kind, share in shares.items())
    for field, value, low in (("num_train", num_train, least), ("num_test", num_test, 0)):
        if value < low:
            raise InputError(f"{field} must be at least {low}; got {value}")
    (train_images, train_labels), (test_images, test_labels) = (
        _part(shares, count, _Draws(seed, f"synthetic/{variant}/{part}"))
        for part, count in (("train", num_train), ("test", num_test))
    )
    return ImageDataset(
        name="synthetic" if variant == "default" else f"synthetic-{variant}",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(name for kind in shares for name in KINDS[kind]),
    )


def _part(shares: dict[str, int], count: int, draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 and labels, shuffled; counts of the classes of a kind differ by at most one."""
    order = np.argsort(draws.integers(0, 2**32 - 1, count), kind="stable")
    place = np.arange(count)[order]
    light = _noise(draws, _PIXEL_NOISE, count, SIZE, SIZE)
    blotches = -(-SIZE // _BLOTCH)
    ground = _noise(draws, _BLOTCH_NOISE, count, blotches, blotches)
    light += ground.repeat(_BLOTCH, 1).repeat(_BLOTCH, 2)[:, :SIZE, :SIZE]
    labels, first = np.empty(count, np.int64), 0
    rounds, turn = np.divmod(place, sum(shares.values()))  # in each round every kind has as many turns as its share
    for kind, share in shares.items():
        shown = np.flatnonzero((turn >= 0) & (turn < share))
        classes = (rounds[shown] * share + turn[shown]) % len(KINDS[kind])
        light[shown] += _DRAWN[kind](classes, draws)
        labels[shown] = first + classes
        first += len(KINDS[kind])
        turn -= share
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
        stripes = amplitude * (outline * strength >> 8)  # (N, 32), at most 127 * 358
        beside = columns - row[:, None] + len(_ROWS) // 2
        height = np.where((beside >= 0) & (beside < len(_ROWS)), _ROWS[np.clip(beside, 0, len(_ROWS) - 1)], 0)
        patch = (height[:, :, None] * stripes[:, None, :] >> 16).astype(np.int16)
        drawn += np.where(is_light[:, None, :], patch, -patch)
    return drawn


def _dots(classes: np.ndarray, draws: _Draws) -> np.ndarray:
    """Twelve dots in each image, light ones as the class says: (N, 32, 32) int16."""
    count, cells_across = len(classes), SIZE // _CELL
    num_light = _LIGHT[classes, draws.integers(0, 3, count)]
    keys = draws.integers(0, 2**32 - 1, count * cells_across**2).reshape(count, cells_across**2)
    cells = keys.argsort(axis=1, kind="stable")[:, :_NUM_DOTS]
    amplitude = draws.integers(*_DOT_AMPLITUDE, count * _NUM_DOTS).astype(np.int16).reshape(count, _NUM_DOTS)
    amplitude = np.where(np.arange(_NUM_DOTS) < num_light[:, None], amplitude, -amplitude)
    inside = draws.integers(0, _CELL - _DOT, 2 * count * _NUM_DOTS).reshape(2, count, _NUM_DOTS)
    y, x = np.stack(np.divmod(cells, cells_across)) * _CELL + inside
    dot = np.arange(_DOT)
    drawn = np.zeros((count, SIZE, SIZE), np.int16)
    rows, columns = y[..., None, None] + dot[:, None], x[..., None, None] + dot
    drawn[np.arange(count)[:, None, None, None], rows, columns] = amplitude[..., None, None]
    return drawn


def _below(draws: _Draws, bounds: np.ndarray) -> np.ndarray:
    """One integer from 0 to below its bound each."""
    return draws.integers(0, 2**32 - 1, len(bounds)) * bounds >> 32


_DRAWN = {"fine": _stripes, "coarse": _dots}
