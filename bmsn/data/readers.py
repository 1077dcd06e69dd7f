"""`open_dataset`: from "scheme:path" to an `ImageDataset`."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bmsn.data.cifar import read_cifar
from bmsn.data.dataset import ImageDataset, numbered_class_names
from bmsn.data.folder import read_folder
from bmsn.data.parquet import read_parquet
from bmsn.errors import InputError, did_you_mean

SCHEMES = ("synthetic", "cifar10", "cifar100", "parquet", "folder", "npz")
_NPZ_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
GIVEN = "given"  # the scheme of images that a library call had in memory: nothing here can open them
SYNTHETIC_VARIANTS = ("default", "fine", "coarse")


def open_dataset(spec: str, *, image_size: int | None = None) -> ImageDataset:
    """Opens images from where `spec` says.

    | spec | what is there |
    |---|---|
    | synthetic, synthetic:fine, synthetic:coarse | nothing: the built-in set is generated |
    | cifar10:DIR, cifar100:DIR | the files as distributed, binary or python version |
    | parquet:DIR | Hugging Face layout: train*.parquet, test*.parquet; needs `bmsn[parquet]` |
    | folder:DIR | a folder for each class, with or without train/ and test/ above; kept decoded in a cache |
    | npz:FILE | arrays train_images (N, H, W, C) uint8, train_labels; test_images, test_labels, class_names if wanted |

    Args:
        spec: scheme:path; `~` is expanded.
        image_size: height and width wanted. `parquet:` and `folder:` resize the shorter side to it and crop the centre;
            of other schemes, images of another size are an error. None: as they are.
    Raises:
        InputError: naming what is wrong: the scheme, the file, the row.
    """
    check_spec(spec)
    scheme, rest = split_spec(spec)
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size must be at least 1; got {image_size}")
    if scheme == GIVEN:
        raise InputError(
            f"data: {spec} stands for images that were passed to run_search and are stored nowhere: pass them again to "
            "resume; for anything else search with data=npz:FILE"
        )
    data = _generate(rest or "default") if scheme == "synthetic" else _read(scheme, rest, image_size)
    if image_size is not None and data.image_size != image_size:
        raise InputError(
            f"data: the images of {spec} are {data.image_size} x {data.image_size}, asked for {image_size} x "
            f"{image_size}; only parquet: and folder: resize"
        )
    return data


def split_spec(spec: str) -> tuple[str, str]:
    """Scheme (also `GIVEN`) and the rest of scheme:path. Raises InputError for an unknown one, naming the nearest."""
    scheme, _, rest = spec.partition(":")
    if scheme not in (*SCHEMES, GIVEN):
        raise InputError(
            f"data: unknown scheme {scheme!r}{did_you_mean(scheme, SCHEMES)}; accepted: {', '.join(SCHEMES)}"
        )
    return scheme, rest


def check_spec(spec: str) -> None:
    """Raises the InputError of `open_dataset` for what can be seen without opening anything: an unknown scheme or
    variant, naming the nearest, or a path that is not given.
    """
    scheme, rest = split_spec(spec)
    if scheme != "synthetic":
        if not rest:
            raise InputError(f"data: {scheme} needs a path, as {scheme}:{'FILE' if scheme == 'npz' else 'DIR'}")
    elif rest and rest not in SYNTHETIC_VARIANTS:
        hint = did_you_mean(rest, SYNTHETIC_VARIANTS)
        raise InputError(f"data: unknown variant synthetic:{rest}{hint}; accepted: {', '.join(SYNTHETIC_VARIANTS)}")


def _generate(variant: str) -> ImageDataset:
    from bmsn.data.synthetic import generate_synthetic

    return generate_synthetic(variant)


def _read(scheme: str, rest: str, image_size: int | None) -> ImageDataset:
    try:
        path = Path(os.path.expanduser(rest)).absolute()  # absolute: "folder:." has a name too
        if not path.exists():
            raise InputError(f"data: {scheme}: {path} does not exist")
        if path.is_dir() == (scheme == "npz"):
            raise InputError(f"data: {scheme}: {path} is {'a folder' if path.is_dir() else 'no folder'}")
        match scheme:
            case "parquet":
                return read_parquet(path, image_size)
            case "folder":
                return read_folder(path, image_size)
            case "npz":
                return read_npz(path)
            case _:
                return read_cifar(scheme, path)
    except OSError as error:  # a folder that may not be read, a name too long
        raise InputError(f"data: {scheme}: {error}") from error


def read_npz(path: Path) -> ImageDataset:
    """Reads train_images, train_labels and, where they are there, test_images, test_labels and class_names.

    Images: uint8 (N, H, W, C), or (N, H, W) for one channel. Labels: any integer type. No pickles.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            present = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {name: _npz_array(archive, name) for name in _NPZ_ARRAYS if f"{name}.npy" in archive.namelist()}
    except Exception as error:  # damaged archives raise nearly anything, as do encrypted ones and pickles inside
        raise InputError(f"{path}: no readable .npz file ({type(error).__name__}: {error})") from error
    for part in ("train", "test"):
        images, labels = f"{part}_images", f"{part}_labels"
        if (images in arrays) != (labels in arrays) or (part == "train" and images not in arrays):
            raise InputError(f"{path}: needs {images} and {labels}; its arrays: {', '.join(present)}")
    train_images, train_labels = _npz_images(path, "train", arrays), _npz_labels(path, "train", arrays)
    if "test_images" in arrays:
        test_images, test_labels = _npz_images(path, "test", arrays), _npz_labels(path, "test", arrays)
    else:
        test_images, test_labels = train_images[:0], train_labels[:0]
    if "class_names" in arrays:
        class_names = tuple(str(name) for name in arrays["class_names"].ravel())
    else:
        class_names = numbered_class_names(train_labels, str(path))
    return ImageDataset(
        name=path.stem,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=class_names,
    )


def _npz_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array. Its header is held against the file's size first: numpy takes the memory that a header claims."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        claimed = file.tell() + math.prod(shape) * dtype.itemsize
    if claimed != member.file_size and not dtype.hasobject:
        raise ValueError(f"{name} is {member.file_size} bytes long, its header claims {claimed}: {dtype} {shape}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _npz_images(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    images = np.ascontiguousarray(arrays[f"{part}_images"])
    if images.dtype != np.uint8:
        raise InputError(f"{path}: {part}_images must be uint8; got {images.dtype}")
    return images[..., None] if images.ndim == 3 else images


def _npz_labels(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    labels = arrays[f"{part}_labels"]
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path}: {part}_labels must be integers; got {labels.dtype}")
    if labels.dtype.kind == "u" and labels.max(initial=0) > np.iinfo(np.int64).max:
        raise InputError(f"{path}: {part}_labels must be below 2**63; got {labels.max()}")
    return labels.astype(np.int64)
