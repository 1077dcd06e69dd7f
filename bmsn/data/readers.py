"""`open_dataset`: from "scheme:path" to an `ImageDataset`."""

from __future__ import annotations

import difflib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bmsn.data.cifar import read_cifar
from bmsn.data.dataset import ImageDataset, numbered_class_names
from bmsn.data.folder import read_folder
from bmsn.data.parquet import read_parquet
from bmsn.errors import InputError

SCHEMES = ("synthetic", "cifar10", "cifar100", "parquet", "folder", "npz")
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
        raise InputError(f"data: unknown scheme {scheme!r}{_nearest(scheme, SCHEMES)}; accepted: {', '.join(SCHEMES)}")
    return scheme, rest


def _generate(variant: str) -> ImageDataset:
    if variant not in SYNTHETIC_VARIANTS:
        hint = _nearest(variant, SYNTHETIC_VARIANTS)
        raise InputError(f"data: unknown variant synthetic:{variant}{hint}; accepted: {', '.join(SYNTHETIC_VARIANTS)}")
    from bmsn.data.synthetic import generate_synthetic

    return generate_synthetic(variant)


def _read(scheme: str, rest: str, image_size: int | None) -> ImageDataset:
    if not rest:
        raise InputError(f"data: {scheme} needs a path, as {scheme}:{'FILE' if scheme == 'npz' else 'DIR'}")
    path = Path(rest).expanduser().absolute()  # absolute: "folder:." has a name too
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


def _nearest(name: str, accepted: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, accepted, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def read_npz(path: Path) -> ImageDataset:
    """Reads train_images, train_labels and, where they are there, test_images, test_labels and class_names.

    Images: uint8 (N, H, W, C), or (N, H, W) for one channel. Labels: any integer type. No pickles.
    """
    arrays: dict[str, np.ndarray] = {}
    if not zipfile.is_zipfile(path):  # a .npy file, for which np.load returns something else, or no numpy file
        raise InputError(f"{path}: not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ("train_images", "train_labels", "test_images", "test_labels", "class_names"):
                if name in file:
                    arrays[name] = file[name]
            present = list(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # ValueError: a pickle inside
        raise InputError(f"{path}: no readable .npz file ({error})") from error
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


def _npz_images(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    images = np.ascontiguousarray(arrays[f"{part}_images"])
    if images.dtype != np.uint8:
        raise InputError(f"{path}: {part}_images must be uint8; got {images.dtype}")
    return images[..., None] if images.ndim == 3 else images


def _npz_labels(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    labels = arrays[f"{part}_labels"]
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path}: {part}_labels must be integers; got {labels.dtype}")
    return labels.astype(np.int64)
