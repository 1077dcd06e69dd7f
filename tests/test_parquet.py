"""Parquet files in the Hugging Face layout, written by pyarrow, and CIFAR-10 where BMSN_CIFAR10 names it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmsn.data import open_dataset
from bmsn.errors import InputError
from images import bomb, encode, make_images

IMAGES, LABELS = make_images(16), np.arange(16) % 3
NAMES = ["ant", "bee", "cow"]


def write_parquet(
    path: Path,
    images: list,
    labels: list,
    names: list[str] | None = None,
    image: str = "img",
    label_type: str = "int64",
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = pa.array(
        [{"bytes": cell, "path": None} for cell in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({image: cells, "label": pa.array(labels, getattr(pa, label_type)())})
    if names:
        features = {image: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    where = tmp_path / "my-set"
    where.mkdir()
    cells = [encode(image) for image in IMAGES]
    labels = LABELS.tolist()
    write_parquet(where / "train-00000-of-00002.parquet", cells[:7], labels[:7], NAMES)
    write_parquet(where / "train-00001-of-00002.parquet", cells[7:12], labels[7:12], NAMES)
    write_parquet(where / "test-00000-of-00001.parquet", cells[12:16], labels[12:16], NAMES)
    return where


def test_parquet(parquet: Path):
    data = open_dataset(f"parquet:{parquet}")
    np.testing.assert_array_equal(data.train_images, IMAGES[:12])
    np.testing.assert_array_equal(data.test_images, IMAGES[12:16])
    assert data.train_labels.tolist() == LABELS[:12].tolist()
    assert data.test_labels.tolist() == LABELS[12:16].tolist()
    assert (data.name, data.class_names) == ("my-set", tuple(NAMES))
    assert open_dataset(f"parquet:{parquet}", image_size=32).fingerprint == data.fingerprint
    assert open_dataset(f"parquet:{parquet}", image_size=8).train_images.shape == (12, 8, 8, 3)


def test_parquet_with_a_validation_file_and_no_names(tmp_path: Path):
    cells = [encode(image) for image in IMAGES]
    write_parquet(tmp_path / "train.parquet", cells[:6], [0, 1, 0, 1, 2, 2], image="image")
    write_parquet(tmp_path / "validation.parquet", cells[6:8], [2, 1], image="image")
    data = open_dataset(f"parquet:{tmp_path}")
    assert data.class_names == ("0", "1", "2")
    assert data.test_labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("row", "cell", "label", "message"),
    [
        (4, b"no image", 0, r"train-00001-of-00002.parquet row 4: no readable image"),
        (4, encode(IMAGES[0])[:500], 0, r"row 4: no readable image"),
        (0, encode(IMAGES[0], "JPEG")[:700], 0, r"row 0: no readable image"),
        (2, bomb(), 0, r"row 2: 9000 x 9000 pixels; accepted: at most 67108864"),
        (1, encode(IMAGES[0][:20]), 0, r"row 1: 32 x 20 pixels, the first image has 32 x 32.*need an image size"),
        (1, None, 0, r"row 1: img.bytes is empty"),
        (3, encode(IMAGES[0]), None, r"row 3: label is empty"),
        (3, encode(IMAGES[0]), 3, r"row 3: label 3; accepted: 0\.\.2"),
        (3, encode(IMAGES[0]), -1, r"row 3: label -1; accepted"),
    ],
)
def test_a_wrong_row_is_named(row, cell, label, message, parquet: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bmsn.data.parquet.CHUNK", 2)  # the row is in a later chunk
    cells, labels = [encode(image) for image in IMAGES[:5]], [0, 1, 2, 0, 1]
    cells[row], labels[row] = cell, label
    write_parquet(parquet / "train-00001-of-00002.parquet", cells, labels, NAMES)
    with pytest.raises(InputError, match=message):
        open_dataset(f"parquet:{parquet}")


@pytest.mark.parametrize("names", [None, NAMES])
def test_a_label_beyond_int64_is_named(names, tmp_path: Path):
    cells = [encode(image) for image in IMAGES[:4]]
    write_parquet(tmp_path / "train.parquet", cells, [0, 1, 2**63, 0], names, label_type="uint64")
    last = 2 if names else 2**63 - 1
    with pytest.raises(InputError, match=rf"train.parquet row 2: label 9223372036854775808; accepted: 0\.\.{last}$"):
        open_dataset(f"parquet:{tmp_path}")


def test_parquet_without_the_columns(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = pa.array([{"bytes": b""}] * 4)
    wrong = {
        "no column 'img' or 'image'; its columns: photo, label": {"photo": cells, "label": [0, 1, 0, 1]},
        "no column 'label' or 'fine_label'; its columns: img": {"img": cells},
        "column 'img' must be a struct with a field 'bytes'; got string": {"img": ["a"] * 4, "label": [0, 1, 0, 1]},
        "column 'label' must be an integer; got double": {"img": cells, "label": [0.0, 1.0, 0.0, 1.0]},
    }
    for message, columns in wrong.items():
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
        with pytest.raises(InputError, match=f"train.parquet: {message}"):
            open_dataset(f"parquet:{tmp_path}")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"train.parquet: no readable parquet file"):
        open_dataset(f"parquet:{tmp_path}")
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(InputError, match=r"no train\*.parquet in"):
        open_dataset(f"parquet:{tmp_path}")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'bmsn\[parquet\]'"):
        open_dataset(f"parquet:{tmp_path}")


def test_real_cifar10(cifar10_folder: Path):
    pq = pytest.importorskip("pyarrow.parquet")
    data = open_dataset(f"parquet:{cifar10_folder}", image_size=32)
    assert data.name == cifar10_folder.name
    assert data.train_images.shape == (50000, 32, 32, 3)
    assert data.test_images.shape == (10000, 32, 32, 3)
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    rows = pq.read_table(next(cifar10_folder.glob("train*.parquet"))).slice(49990, 10).to_pylist()
    for i, row in enumerate(rows, 49990):
        np.testing.assert_array_equal(data.train_images[i], np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))))
        assert data.train_labels[i] == row["label"]
