"""Data sets in the Hugging Face parquet layout: encoded images in a struct column, labels in an integer one."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmsn.data.dataset import ImageDataset, numbered_class_names
from bmsn.data.decode import CHUNK, decode_into, size_of_first
from bmsn.errors import InputError
from bmsn.progress import Progress

logger = logging.getLogger(__name__)

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")
_TEST_FILES = ("test*.parquet", "validation*.parquet", "val*.parquet")  # the first that is there is the test set


def read_parquet(folder: Path, image_size: int | None) -> ImageDataset:
    """Reads train*.parquet and test*.parquet (or validation*.parquet); the data set takes the folder's name.

    Columns: `img` or `image`, a struct whose field `bytes` is an encoded image; `label` (or `fine_label`), integers.
    Class names come from the `huggingface` metadata of the schema, else they are "0", "1", ...

    Args:
        folder: holds the files.
        image_size: side of the images, which are resized and cropped to it; None: all must be alike and square.
    Raises:
        InputError: naming the file, and the row where it is about one image.
    """
    train = [_open(path) for path in sorted(folder.glob("train*.parquet"))]
    if not train:
        raise InputError(f"parquet: no train*.parquet in {folder}")
    found = (sorted(folder.glob(pattern)) for pattern in _TEST_FILES)
    test = [_open(path) for path in next((paths for paths in found if paths), [])]
    if image_size is None:
        size, resize = _first_size(train[0]), False
    else:
        size, resize = image_size, True
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        train_images, train_labels = _read_files(train, folder.name, size, resize, pool)
        test_images, test_labels = _read_files(test, folder.name, size, resize, pool)
    return ImageDataset(
        name=folder.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=train[0].class_names or numbered_class_names(train_labels, str(folder)),
    )


class _File:
    """One parquet file, its columns found and checked."""

    def __init__(self, path: Path, file: Any) -> None:
        import pyarrow as pa

        self.path, self.file = path, file
        schema = file.schema_arrow
        self.image = self._find(_IMAGE_COLUMNS, schema.names)
        self.label = self._find(_LABEL_COLUMNS, schema.names)
        image_type, label_type = schema.field(self.image).type, schema.field(self.label).type
        if not pa.types.is_struct(image_type) or image_type.get_field_index("bytes") < 0:
            raise InputError(f"{path}: column {self.image!r} must be a struct with a field 'bytes'; got {image_type}")
        if not pa.types.is_integer(label_type):
            raise InputError(f"{path}: column {self.label!r} must be an integer; got {label_type}")
        self.num_rows: int = file.metadata.num_rows
        self.class_names = self._class_names(schema.metadata or {})

    def _find(self, wanted: tuple[str, ...], names: list[str]) -> str:
        for name in wanted:
            if name in names:
                return name
        raise InputError(f"{self.path}: no column {' or '.join(map(repr, wanted))}; its columns: {', '.join(names)}")

    def _class_names(self, metadata: dict[bytes, bytes]) -> tuple[str, ...]:
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return tuple(str(name) for name in features[self.label]["names"])
        except (KeyError, TypeError, ValueError):  # written by another tool, or labels without names
            return ()

    def batches(self, size: int) -> Any:
        """Iterates over (encoded images, labels) of at most `size` rows; None where a cell is empty."""
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            for batch in self.file.iter_batches(size, columns=[self.image, self.label]):
                images = pc.struct_field(batch.column(self.image), "bytes").to_pylist()
                yield images, batch.column(self.label).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: damaged parquet file ({error})") from error


def _open(path: Path) -> _File:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("parquet: data needs pyarrow: pip install 'bmsn[parquet]'") from error
    try:
        return _File(path, pq.ParquetFile(path))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: no readable parquet file ({error})") from error


def _first_size(file: _File) -> int:
    for images, _ in file.batches(1):
        _check_row(file, 0, images[0], 0)
        return size_of_first(images[0], f"{file.path} row 0")
    raise InputError(f"{file.path}: no rows")


def _check_row(file: _File, row: int, image: bytes | None, label: int | None) -> None:
    """Labels here as well as in `ImageDataset`, which does not know files and rows."""
    if image is None or label is None:
        empty = f"{file.image}.bytes" if image is None else file.label
        raise InputError(f"{file.path} row {row}: {empty} is empty")
    last = len(file.class_names) - 1 if file.class_names else np.iinfo(np.int64).max
    if not 0 <= label <= last:
        raise InputError(f"{file.path} row {row}: label {label}; accepted: 0..{last}")


def _read_files(
    files: list[_File], name: str, size: int, resize: bool, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    total = sum(file.num_rows for file in files)
    images, labels = np.empty((total, size, size, 3), np.uint8), np.empty(total, np.int64)
    start = 0
    with Progress(logger, f"{name}: decoded", total, "images") as progress:
        for file in files:
            row = 0
            for encoded, values in file.batches(CHUNK):
                stop = start + len(encoded)
                for i, (image, label) in enumerate(zip(encoded, values, strict=True), row):
                    _check_row(file, i, image, label)
                names = [f"{file.path} row {row + i}" for i in range(len(encoded))]
                decode_into(images[start:stop], encoded, names, pool, resize, progress)
                labels[start:stop] = values
                start, row = stop, row + len(encoded)
    return images, labels
