"""CIFAR-10 and CIFAR-100 as distributed: the binary layout, or pickles, of which only plain data is read.

Source: A. Krizhevsky 2009, "Learning multiple layers of features from tiny images";
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bmsn.data.dataset import ImageDataset
from bmsn.errors import InputError

_PIXELS = 3 * 32 * 32  # of one image: a plane of 32 x 32 for each colour


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Names of files and fields; in both sets the label that counts is the last one of a binary record."""

    subfolders: tuple[str, str]  # where the archives unpack to: binary, python
    train: tuple[str, ...]  # plus ".bin" in the binary layout
    test: tuple[str, ...]
    label_bytes: int
    names_text: str
    names_pickle: str
    names_key: str
    labels_key: str


_LAYOUTS = {
    "cifar10": _Layout(
        subfolders=("cifar-10-batches-bin", "cifar-10-batches-py"),
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        label_bytes=1,
        names_text="batches.meta.txt",
        names_pickle="batches.meta",
        names_key="label_names",
        labels_key="labels",
    ),
    "cifar100": _Layout(
        subfolders=("cifar-100-binary", "cifar-100-python"),
        train=("train",),
        test=("test",),
        label_bytes=2,  # coarse, fine
        names_text="fine_label_names.txt",
        names_pickle="meta",
        names_key="fine_label_names",
        labels_key="fine_labels",
    ),
}


def read_cifar(scheme: str, folder: Path) -> ImageDataset:
    """Reads CIFAR-10 or CIFAR-100, binary layout or python layout, from `folder` or from where its archive unpacks to.

    Args:
        scheme: "cifar10" or "cifar100".
        folder: holds the files themselves, or the folder that they come in.
    Raises:
        InputError: naming the file that is missing, of a wrong size, or holds anything but plain data.
    """
    layout = _LAYOUTS[scheme]
    for where in (folder, *(folder / name for name in layout.subfolders)):
        if (where / f"{layout.train[0]}.bin").is_file():
            class_names = _read_lines(where / layout.names_text)
            train = _read_all(where, [f"{name}.bin" for name in layout.train], layout, _read_binary)
            test = _read_all(where, [f"{name}.bin" for name in layout.test], layout, _read_binary)
            break
        if (where / layout.train[0]).is_file():
            class_names = _read_names(where / layout.names_pickle, layout.names_key)
            train = _read_all(where, layout.train, layout, _read_pickle)
            test = _read_all(where, layout.test, layout, _read_pickle)
            break
    else:
        raise InputError(f"{scheme}: neither {layout.train[0]}.bin nor {layout.train[0]} in {folder}")
    return ImageDataset(
        name=scheme,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        class_names=class_names,
    )


_Reader = Callable[[Path, _Layout], tuple[np.ndarray, np.ndarray]]


def _read_all(folder: Path, names: list[str] | tuple[str, ...], layout: _Layout, read: _Reader) -> tuple:
    """(N, 32, 32, 3) uint8 images and (N,) int64 labels of several files."""
    parts = [read(folder / name, layout) for name in names]
    planes = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate([labels for _, labels in parts])


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _read_lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _read_bytes(path).decode("utf-8", "replace").splitlines() if line.strip())


def _read_binary(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    data = _read_bytes(path)
    record = layout.label_bytes + _PIXELS
    if not data or len(data) % record:
        raise InputError(f"{path}: {len(data)} bytes; accepted: a multiple of the record size, {record} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)


def _read_pickle(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(path)
    data, labels = _field(content, "data", path), _field(content, layout.labels_key, path)
    if not isinstance(data, _PickledArray) or not isinstance(labels, list):
        raise InputError(f"{path}: 'data' must be an array and {layout.labels_key!r} a list")
    pixels = data.to_uint8(path)
    if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or len(labels) != len(pixels):
        raise InputError(
            f"{path}: 'data' must be (N, {_PIXELS}) with N labels; got {pixels.shape} and {len(labels)} labels"
        )
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise InputError(f"{path}: {layout.labels_key!r} must be small integers")
    return pixels, np.array(labels, dtype=np.int64)


def _read_names(path: Path, key: str) -> tuple[str, ...]:
    names = _field(_unpickle(path), key, path)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise InputError(f"{path}: {key!r} must be a list of names")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _field(content: Any, key: str, path: Path) -> Any:
    """A field of a pickled dict, whose keys are bytes where Python 2 wrote it."""
    if isinstance(content, dict):
        for spelling in (key, key.encode()):
            if spelling in content:
                return content[spelling]
    raise InputError(f"{path}: no field {key!r}; is it the python layout of this data set?")


class _PickledArray:
    """Takes the place of a pickled array: keeps its bytes, runs none of numpy's own unpickling."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_uint8(self, path: Path) -> np.ndarray:
        try:
            _, shape, dtype, fortran, data = self.state
            if dtype.name not in ("u1", b"u1") or not isinstance(data, bytes):
                raise ValueError(f"an array of {dtype.name!r}, not of bytes")
            return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: 'data' is no array of uint8 ({error})") from error


class _PickledDType:
    """Takes the place of a pickled dtype: its name, as "u1"."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment: of no account for bytes


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 3 spells bytes in an old pickle."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


class _DataUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and the arrays above; any other global is refused, so nothing can run."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Callable]] = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDType,
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None


def _unpickle(path: Path) -> Any:
    data = _read_bytes(path)
    try:
        return _DataUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise InputError(f"{path}: refused as a pickle of plain data: {error}") from error
