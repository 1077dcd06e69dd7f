"""Folders of images, one for each class, decoded once into a memory-mapped cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bmsn.data.dataset import ImageDataset
from bmsn.data.decode import CHUNK, decode_into, size_of_first
from bmsn.data.hashes import content_digest, remembered_digest, stamp
from bmsn.errors import InputError
from bmsn.progress import Progress

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_TEST_FOLDERS = ("test", "val", "validation")  # the first that is there is the test set
_CACHE_VERSION = 1  # counts up whenever the same files would decode to other pixels


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """The image files of one part of a data set, in order."""

    files: list[Path]
    labels: np.ndarray  # (N,) int64


def read_folder(folder: Path, image_size: int | None) -> ImageDataset:
    """Reads class folders: `folder`/<class>/, or `folder`/train/<class>/ with a test set in test/, val/ or validation/.

    All images below a class folder are of that class. What is hidden counts nowhere: files and folders whose names
    begin with a dot, such as .git, or .ipynb_checkpoints with its copies.

    Images are decoded once into .npy files under $BMSN_CACHE (else ~/.cache/bmsn) and memory-mapped from there, so a
    data set may be larger than memory. The cache is known by what the files hold, their classes and `image_size`,
    wherever the folder lies; its content is checked by sha256 whenever it is opened, and made anew where it is damaged.

    Args:
        folder: the data set takes its name.
        image_size: side of the images, which are resized and cropped to it; None: all must be alike and square.
    Raises:
        InputError: naming the file or folder.
    """
    train, test, classes = _scan_parts(folder)
    class_names = tuple(path.name for path in classes)
    rare = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) < 2)
    if len(rare):  # before hours of decoding, not after
        raise InputError(f"folder: only one image in {classes[rare[0]]}; each class needs at least 2")

    def dataset(entry: Path) -> ImageDataset:
        return ImageDataset(
            name=folder.name,
            train_images=np.load(entry / "train.npy", mmap_mode="r"),
            train_labels=train.labels,
            test_images=np.load(entry / "test.npy", mmap_mode="r"),
            test_labels=test.labels,
            class_names=class_names,
        )

    files, cache = train.files + test.files, _cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        memory = cache / f"content-{hashlib.sha256(os.fsencode(folder)).hexdigest()}"
        with _locked(memory):
            content, before = remembered_digest(files, folder.name, memory)
        known_by = [_CACHE_VERSION, image_size, class_names, train.labels.tolist(), test.labels.tolist(), content]
        entry = cache / f"folder-{hashlib.sha256(json.dumps(known_by).encode()).hexdigest()}"

        def check_unchanged() -> None:
            if stamp(files).digest != before.digest and content_digest(files, folder.name) != content:
                raise InputError(f"folder: {folder} has changed while it was decoded")

        with _locked(entry):
            found = _verified(entry, dataset)
            return found or _build(entry, folder.name, train, test, image_size, dataset, check_unchanged)
    except OSError as error:  # a full disk, a folder that may not be written to
        raise InputError(f"folder: the cache of decoded images ({cache}, from $BMSN_CACHE) failed: {error}") from error


def _cache() -> Path:
    try:
        return Path(os.environ.get("BMSN_CACHE") or "~/.cache/bmsn").expanduser()
    except RuntimeError as error:
        raise InputError("folder: no home folder to keep decoded images in; set BMSN_CACHE to a folder") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process is inside at a time, the others wait; the lock dies with its holder."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _scan_parts(folder: Path) -> tuple[_Scan, _Scan, list[Path]]:
    """Training part, test part (maybe empty) and the training part's class folders."""
    top = folder / "train"
    split = top.is_dir() and bool(_subfolders(top))
    classes = _subfolders(top if split else folder)
    if len(classes) < 2:
        raise InputError(
            f"folder: {top if split else folder} has {len(classes)} class folder(s); at least 2 are needed"
        )
    class_names = tuple(path.name for path in classes)
    tests = (folder / name for name in _TEST_FOLDERS) if split else iter(())
    test_folder = next((path for path in tests if path.is_dir()), None)
    return _scan(classes, class_names), _scan(_subfolders(test_folder) if test_folder else [], class_names), classes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _scan(classes: list[Path], class_names: tuple[str, ...]) -> _Scan:
    files: list[Path] = []
    labels: list[int] = []
    for path in classes:
        if path.name not in class_names:
            raise InputError(f"folder: {path} is a class that the training images don't have")
        images = sorted(file for file in _walk(path) if file.suffix.lower() in EXTENSIONS)
        if not images:
            raise InputError(f"folder: no image in {path}; accepted: {', '.join(sorted(EXTENSIONS))}")
        files += images
        labels += [class_names.index(path.name)] * len(images)
    return _Scan(files=files, labels=np.array(labels, dtype=np.int64))


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # by itself os.walk leaves out what it may not read
        raise error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # it goes into these
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _verified(entry: Path, dataset: Callable[[Path], ImageDataset]) -> ImageDataset | None:
    """The cached data set, or None where there is none or it is damaged (a flipped bit, a truncated file)."""
    if not entry.is_dir():
        return None
    try:
        found = dataset(entry)
        if found.fingerprint == (entry / "fingerprint").read_text():
            return found
        problem = "its content has changed"
    except (OSError, ValueError) as error:  # InputError is a ValueError
        problem = str(error)
    logger.warning("the cache %s is damaged (%s): decoding anew", entry, problem)
    shutil.rmtree(entry)
    return None


def _build(
    entry: Path,
    name: str,
    train: _Scan,
    test: _Scan,
    image_size: int | None,
    dataset: Callable[[Path], ImageDataset],
    check_unchanged: Callable[[], None],
) -> ImageDataset:
    """Decodes into a folder of another name, then renames it: what has the right name is complete."""
    size = image_size or size_of_first(train.files[0], str(train.files[0]))
    partial = entry.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that died
    partial.mkdir()
    try:
        with Progress(logger, f"{name}: decoded", len(train.files) + len(test.files), "images") as progress:
            for part, scan in (("train", train), ("test", test)):
                _write_images(partial / f"{part}.npy", scan.files, size, image_size is not None, progress)
        check_unchanged()
        (partial / "fingerprint").write_text(dataset(partial).fingerprint)
        partial.rename(entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dataset(entry)


def _write_images(path: Path, files: list[Path], size: int, resize: bool, progress: Progress) -> None:
    """Writes chunk after chunk: a full disk is an error here, and would be a SIGBUS in a memory-mapped file."""
    buffer = np.empty((min(CHUNK, len(files)), size, size, 3), np.uint8)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
    with open(path, "wb") as out, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            decoded = buffer[: len(chunk)]
            decode_into(decoded, chunk, [str(file) for file in chunk], pool, resize, progress)
            out.write(decoded.data)
