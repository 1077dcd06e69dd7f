"""CIFAR files written here byte by byte, and pickles that want more than to be data."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from bmsn.data import open_dataset
from bmsn.errors import InputError
from images import make_images


def planes(images: np.ndarray) -> np.ndarray:
    """(N, 3072), the order of bytes in all CIFAR files: red, green, blue, each row by row."""
    return np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in images])


def records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    return b"".join(
        bytes([*map(int, label)]) + row.tobytes() for row, *label in zip(planes(images), *labels, strict=True)
    )


def python2_pickle(images: np.ndarray, labels: np.ndarray, labels_key: bytes) -> bytes:
    """What Python 2's cPickle wrote, opcode for opcode as in the files as distributed (protocol 2, old strings)."""
    raw = planes(images).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        + b"(K\x01"  # version
        + b"K" + bytes([len(images)]) + b"M\x00\x0c\x86"  # (N, 3072)
        + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip
    values = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    key = b"U" + bytes([len(labels_key)]) + labels_key
    return b"\x80\x02}(U\x04data" + array + key + values + b"u."


def python3_pickle(images: np.ndarray, labels: np.ndarray, labels_key: bytes) -> bytes:
    content = {"data": planes(images), labels_key.decode(): labels.tolist()}
    return pickle.dumps(content, protocol=2)


IMAGES, LABELS = make_images(24), np.arange(24) % 10
NAMES = [f"class{i}" for i in range(10)]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def write_cifar10(folder: Path, layout: str) -> Path:
    """20 training images, 4 in each file, and 4 of test."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*BATCHES, "test_batch"]):
        images, labels = IMAGES[4 * i : 4 * i + 4], LABELS[4 * i : 4 * i + 4]
        if layout == "binary":
            (folder / f"{name}.bin").write_bytes(records(images, labels))
        else:
            write = python2_pickle if layout == "python2" else python3_pickle
            (folder / name).write_bytes(write(images, labels, b"labels"))
    if layout == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES, "num_vis": 3072}, protocol=2))
    return folder


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-{}"])
@pytest.mark.parametrize("layout", ["binary", "python2", "python3"])
def test_cifar10(layout, subfolder, tmp_path: Path):
    write_cifar10(tmp_path / subfolder.format("bin" if layout == "binary" else "py"), layout)
    data = open_dataset(f"cifar10:{tmp_path}", image_size=32)
    np.testing.assert_array_equal(data.train_images, IMAGES[:20])
    np.testing.assert_array_equal(data.test_images, IMAGES[20:])
    assert data.train_labels.tolist() == LABELS[:20].tolist()
    assert data.test_labels.tolist() == LABELS[20:].tolist()
    assert (data.name, data.class_names) == ("cifar10", tuple(NAMES))
    assert data.train_images.flags.c_contiguous


def test_the_handwritten_pickle_is_one_that_numpy_reads():
    content = pickle.loads(python2_pickle(IMAGES[:4], LABELS[:4], b"labels"), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], planes(IMAGES[:4]))
    assert content[b"labels"] == [0, 1, 2, 3]


@pytest.mark.parametrize("layout", ["binary", "python2"])
def test_cifar100_takes_the_fine_labels(layout, tmp_path: Path):
    fine, coarse = np.arange(24) // 2 % 10, np.full(24, 7)
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        if layout == "binary":
            (tmp_path / f"{name}.bin").write_bytes(records(IMAGES[part], coarse[part], fine[part]))
        else:
            (tmp_path / name).write_bytes(python2_pickle(IMAGES[part], fine[part], b"fine_labels"))
    (tmp_path / "fine_label_names.txt").write_text("\n".join(NAMES))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES, "coarse_label_names": ["x"]}, protocol=2))
    data = open_dataset(f"cifar100:{tmp_path}")
    assert data.name == "cifar100"
    assert data.train_labels.tolist() == fine[:20].tolist()
    np.testing.assert_array_equal(data.test_images, IMAGES[20:])


class Attack:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["data_batch_3", "batches.meta"])
def test_a_malicious_pickle_runs_nothing(where, protocol, tmp_path: Path):
    mark = tmp_path / "mark"
    write_cifar10(tmp_path, "python3")
    for attack in (Attack(os.mkdir, str(mark)), Attack(eval, f"open({str(mark)!r}, 'w')"), Attack(np.save, mark, [1])):
        (tmp_path / where).write_bytes(pickle.dumps({"data": attack, "labels": [0]}, protocol=protocol))
        with pytest.raises(InputError, match=rf"{where}: refused as a pickle of plain data: it asks for"):
            open_dataset(f"cifar10:{tmp_path}")
        assert not mark.exists()


def test_a_pickle_of_other_data_is_named(tmp_path: Path):
    write_cifar10(tmp_path, "python3")
    pixels = planes(IMAGES[:4])
    wrong = {
        r"no field 'data'": {"labels": [0]},
        r"no field 'labels'": {"data": pixels},
        r"'data' must be \(N, 3072\) with N labels; got \(4, 3072\) and 3 labels": {"data": pixels, "labels": [0] * 3},
        r"no array of uint8": {"data": pixels.astype(np.float32), "labels": [0] * 4},
        r"must be an array": {"data": "text", "labels": [0] * 4},
        r"must be small integers": {"data": pixels, "labels": ["0"] * 4},
        r"got \(4, 4\)": {"data": pixels[:, :4], "labels": [0] * 4},
    }
    for message, content in wrong.items():
        (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(InputError, match=f"data_batch_2: .*{message}"):
            open_dataset(f"cifar10:{tmp_path}")
    whole = python3_pickle(IMAGES[:4], LABELS[:4], b"labels")
    (tmp_path / "data_batch_2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="data_batch_2"):
        open_dataset(f"cifar10:{tmp_path}")


def test_a_wrong_binary_file_is_named(tmp_path: Path):
    write_cifar10(tmp_path, "binary")
    file = tmp_path / "data_batch_4.bin"
    whole = file.read_bytes()
    for wrong in (whole[:-1], b""):
        file.write_bytes(wrong)
        with pytest.raises(InputError, match=rf"data_batch_4.bin: {len(wrong)} bytes; .*3073 bytes"):
            open_dataset(f"cifar10:{tmp_path}")
    file.write_bytes(bytes([99]) + whole[1:])
    with pytest.raises(InputError, match=r"train_labels\[12\] is 99; accepted: 0\.\.9"):
        open_dataset(f"cifar10:{tmp_path}")
    file.unlink()
    with pytest.raises(InputError, match=r"data_batch_4.bin: No such file"):
        open_dataset(f"cifar10:{tmp_path}")
    with pytest.raises(InputError, match=r"neither train.bin nor train in"):
        open_dataset(f"cifar100:{tmp_path}")
