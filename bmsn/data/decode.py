"""Encoded images (JPEG, PNG, ...) to square uint8 RGB arrays, by Pillow, in threads."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from bmsn.errors import InputError
from bmsn.progress import Progress

MAX_PIXELS = 1 << 26  # of one image, from its header: a few hundred bytes can claim gigabytes ("decompression bomb")
CHUNK = 1024  # images decoded between two writes
_SLICE = 32  # images a thread takes at a time


@contextmanager
def _open(source: Path | bytes) -> Iterator[Image.Image]:
    """What `Image.open` does, except for its warning about large images, which are refused here: filters of warnings
    are the process's, not a thread's. Reads the header only.
    """
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file, _identify(file) as image:
        yield image


def _identify(file: BinaryIO) -> Image.Image:
    prefix = file.read(16)
    for load_plugins in (Image.preinit, Image.init):  # the frequent formats, then all
        load_plugins()
        for factory, accept in list(Image.OPEN.values()):
            accepted = accept is None or accept(prefix)
            if isinstance(accepted, str) or not accepted:  # a string says which library is missing
                continue
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                pass  # how a plugin says that it is another format
    raise UnidentifiedImageError("of no known format")


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
    out: np.ndarray,
    sources: Sequence[Path | bytes],
    names: Sequence[str],
    pool: Executor,
    resize: bool,
    progress: Progress,
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
        progress: counts them.
    Raises:
        InputError: naming the first image that is damaged, of the wrong size or larger than `MAX_PIXELS`.
    """

    def decode_slice(start: int) -> int:
        stop = min(start + _SLICE, len(sources))
        for i in range(start, stop):
            out[i] = _decode(sources[i], names[i], out.shape[1], resize)
        return stop - start

    for count in pool.map(decode_slice, range(0, len(sources), _SLICE)):
        progress.add(count)
