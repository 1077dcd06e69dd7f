"""Encoded images (JPEG, PNG, ...) to square uint8 RGB arrays, by Pillow, in threads."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from PIL import Image

from bmsn.errors import InputError

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26  # of one image, from its header: a few hundred bytes can claim gigabytes ("decompression bomb")
CHUNK = 1024  # images decoded between two writes or log lines
_SLICE = 32  # images a thread takes at a time
_LOG_SECONDS = 5.0


def _open(source: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)  # reads the header only


def _check_pixels(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{name}: {image.width} x {image.height} pixels; accepted: at most {MAX_PIXELS} in one image")


def _decode(source: Path | bytes, name: str, image_size: int, resize: bool) -> np.ndarray:
    """One image as (image_size, image_size, 3) uint8; `name` is for messages."""
    try:
        with _open(source) as image:
            _check_pixels(image, name)
            if not resize and image.size != (image_size, image_size):
                raise InputError(
                    f"{name}: {image.width} x {image.height} pixels, the first image has {image_size} x {image_size}; "
                    "images of several sizes need an image size to be resized to"
                )
            if resize:
                # A JPEG many times too large is scaled down by the decoder, but to no less than twice the size wanted.
                image.draft(None, (2 * image_size, 2 * image_size))
            rgb = image.convert("RGB")
    except InputError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise a dozen kinds for damaged files (struct, zlib, SyntaxError, ...)
        raise InputError(f"{name}: no readable image ({type(error).__name__}: {error})") from error
    if rgb.size != (image_size, image_size):
        shorter = min(rgb.size)
        left, top = (rgb.width - shorter) / 2, (rgb.height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
    return np.asarray(rgb)


def size_of_first(source: Path | bytes, name: str) -> int:
    """Side of a square image, for a data set opened without an image size."""
    try:
        with _open(source) as image:
            _check_pixels(image, name)
            width, height = image.size
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: no readable image ({type(error).__name__}: {error})") from error
    if width != height:
        raise InputError(f"{name}: {width} x {height} pixels, not square; give an image size to crop and resize to")
    return width


def decode_into(
    out: np.ndarray, sources: Sequence[Path | bytes], names: Sequence[str], pool: Executor, resize: bool
) -> None:
    """Decodes images in the threads of `pool`. Threads, not processes: a fork after a parallel region hangs.

    The centred square of each image is resized to S x S (Pillow's bilinear filter, which averages where it shrinks):
    the shorter side becomes S and the longer is cropped. Greyscale and palette images become RGB, transparency is
    dropped, EXIF orientation is ignored.

    Args:
        out: (N, S, S, 3) uint8, overwritten.
        sources: N files, or their contents.
        names: N names for messages.
        pool: of threads.
        resize: False: an image that isn't S x S is an error.
    Raises:
        InputError: naming the first image that is damaged, of the wrong size or larger than `MAX_PIXELS`.
    """

    def decode_slice(start: int) -> None:
        for i in range(start, min(start + _SLICE, len(sources))):
            out[i] = _decode(sources[i], names[i], out.shape[1], resize)

    for _ in pool.map(decode_slice, range(0, len(sources), _SLICE)):
        pass


class Progress:
    """Logs how far decoding has come, every few seconds and at the end."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.start = self.last = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.done == self.total or now - self.last > _LOG_SECONDS:
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            logger.info("%s: decoded %d of %d images (%.0f/s)", self.name, self.done, self.total, rate)
