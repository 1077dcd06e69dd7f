"""`ImageDataset`, the split, the specs that `open_dataset` takes, and .npz files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmsn.data import ImageDataset, check_spec, open_dataset, split_halves
from bmsn.errors import InputError
from images import make_images


def make_dataset(**changes) -> ImageDataset:
    values = {
        "name": "mine",
        "train_images": make_images(6, 4),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": make_images(2, 4, 1),
        "test_labels": np.array([0, 2]),
        "class_names": ("ant", "bee", "cow"),
    }
    return ImageDataset(**(values | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": np.array([0, 1, 2, 0, 3, 2])}, r"train_labels\[4\] is 3; accepted: 0\.\.2"),
        ({"test_labels": np.array([-1, 2])}, r"test_labels\[0\] is -1; accepted: 0\.\.2"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 1])}, "class 'cow' has 1 training image"),
        ({"class_names": ("ant", "bee", "cow", "dog")}, "class 'dog' has 0 training image"),
        ({"class_names": ("ant",)}, r"at least 2 classes; got \['ant'\]"),
        ({"train_labels": np.zeros(5, np.int64)}, r"int64 \(6,\).*got int64 \(5,\)"),
        ({"train_labels": np.zeros(6)}, "got float64"),
        ({"train_images": make_images(6, 4) / 255}, "train_images must be uint8.*got float64"),
        ({"train_images": make_images(6, 4)[..., 0]}, r"got uint8 \(6, 4, 4\)"),
        ({"train_images": make_images(6, 4)[:, :3]}, "must be square"),
        ({"test_images": make_images(2, 8)}, r"\(4, 4, 3\); got \(8, 8, 3\)"),
    ],
)
def test_a_wrong_array_is_named(change, message):
    with pytest.raises(InputError, match=message):
        make_dataset(**change)


def test_properties_and_an_empty_test_set():
    data = make_dataset(test_images=make_images(0, 4), test_labels=np.zeros(0, np.int64))
    assert (data.num_classes, data.image_size, data.in_channels) == (3, 4, 3)


def test_fingerprint_depends_on_content_alone(tmp_path: Path):
    data = make_dataset()
    same = np.asfortranarray(data.train_images)
    assert make_dataset(name="other", train_images=same).fingerprint == data.fingerprint
    np.save(tmp_path / "images.npy", data.train_images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert make_dataset(train_images=mapped).fingerprint == data.fingerprint
    pixel, test_pixel = data.train_images.copy(), data.test_images.copy()
    pixel[5, 3, 3, 2] ^= 1
    test_pixel[0, 0, 0, 0] ^= 1
    others = [
        make_dataset(train_images=pixel),
        make_dataset(test_images=test_pixel),
        make_dataset(train_images=data.train_images[::-1]),
        make_dataset(train_labels=np.array([0, 1, 2, 0, 2, 1])),
        make_dataset(test_labels=np.array([0, 1])),
        make_dataset(class_names=("ant", "bee", "cat")),
    ]
    assert len({other.fingerprint for other in [data, *others]}) == 7


def test_fingerprint_sees_every_chunk():
    images = make_images(3000, 32)  # 9 MB: several chunks
    labels = np.arange(3000) % 3
    seen = {make_dataset(train_images=images, train_labels=labels, test_images=images[:2]).fingerprint}
    for i in (0, 1500, 2999):
        other = images.copy()
        other[i, 0, 0, 0] ^= 1
        seen.add(make_dataset(train_images=other, train_labels=labels, test_images=images[:2]).fingerprint)
    assert len(seen) == 4


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 2**63 - 1))
def test_halves_are_disjoint_complete_and_stratified(labels, seed):
    labels = np.array(labels)
    halves = split_halves(labels, seed)
    assert sorted(np.concatenate(halves).tolist()) == list(range(len(labels)))
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    for half in halves:
        assert half.dtype == np.int64
        assert (np.diff(half) > 0).all()
    for label in set(labels.tolist()):
        assert abs(np.sum(labels[halves[0]] == label) - np.sum(labels[halves[1]] == label)) <= 1


def test_the_split_is_random_and_seeded():
    labels = np.arange(1000) % 10
    first = split_halves(labels, 3)[0]
    np.testing.assert_array_equal(split_halves(labels, 3)[0], first)
    common = len(np.intersect1d(first, split_halves(labels, 4)[0]))
    assert 200 < common < 300  # 250 expected of 500
    assert 200 < np.sum(first < 500) < 300


SPECS = pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parqet:x", "unknown scheme 'parqet' .did you mean 'parquet'.*accepted: synthetic, cifar10"),
        ("/data/images", "unknown scheme '/data/images'; accepted"),
        ("synthetic:corse", "did you mean 'coarse'"),
        ("cifar10", "needs a path, as cifar10:DIR"),
        ("synthetic:foo", "unknown variant synthetic:foo; accepted: default, fine, coarse"),
        ("npz:", "needs a path, as npz:FILE"),
    ],
)


@SPECS
@pytest.mark.parametrize("check", [check_spec, open_dataset])
def test_a_wrong_spec_is_named(check, spec, message):
    with pytest.raises(InputError, match=message):
        check(spec)


@pytest.mark.parametrize("spec", ["synthetic", "synthetic:", "synthetic:fine", "cifar10:/no/such/folder", "npz:a:b"])
def test_specs_that_may_name_something(spec):
    check_spec(spec)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("~no-such-user/images", "~no-such-user/images does not exist"),
        ("/" + "x" * 300, "File name too long"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(InputError, match=message):
        open_dataset(f"folder:{path}")


def test_a_file_for_a_folder_and_the_reverse(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no folder"):
        open_dataset(f"cifar10:{tmp_path / 'file'}")
    with pytest.raises(InputError, match="is a folder"):
        open_dataset(f"npz:{tmp_path}")


def write_npz(path: Path, **changes) -> str:
    data = make_dataset()
    names = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    arrays = {name: getattr(data, name) for name in names} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return f"npz:{path}"


def test_npz(tmp_path: Path):
    data = open_dataset(write_npz(tmp_path / "mine.npz"), image_size=4)
    assert (data.name, data.class_names) == ("mine", ("ant", "bee", "cow"))
    assert data.fingerprint == make_dataset().fingerprint


def test_npz_with_the_least(tmp_path: Path):
    grey = np.asfortranarray(make_images(6, 4)[..., 0])
    labels = np.array([0, 1, 0, 1, 2, 2], dtype=np.uint8)
    absent = dict.fromkeys(("test_images", "test_labels", "class_names"))
    data = open_dataset(write_npz(tmp_path / "a.npz", train_images=grey, train_labels=labels, **absent))
    np.testing.assert_array_equal(data.train_images, grey[..., None])
    assert data.train_images.flags.c_contiguous
    assert data.train_labels.tolist() == [0, 1, 0, 1, 2, 2]
    assert data.test_images.shape == (0, 4, 4, 1)
    assert data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": None}, "needs train_images and train_labels; its arrays: train_images"),
        ({"test_labels": None}, "needs test_images and test_labels"),
        ({"train_images": np.zeros((6, 4, 4, 3))}, "train_images must be uint8; got float64"),
        ({"train_labels": np.zeros(6)}, "train_labels must be integers; got float64"),
        (
            {"train_labels": np.array([0, 1, 2, 0, 1, 10**12]), "class_names": None},
            "label 1000000000000 among 6 images",
        ),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 2**63], np.uint64)}, "below 2..63; got 9223372036854775808"),
        ({"class_names": np.array(["a", None], dtype=object)}, "no readable .npz file .*pickle"),
    ],
    ids=str,
)
def test_a_wrong_npz_is_named(change, message, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        open_dataset(write_npz(tmp_path / "a.npz", **change))


def test_a_damaged_npz_is_named(tmp_path: Path):
    np.savez_compressed(tmp_path / "a.npz", train_images=make_images(6, 4), train_labels=np.zeros(6, np.int64))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[200] ^= 255
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(InputError, match=r"a.npz"):
        open_dataset(f"npz:{tmp_path / 'a.npz'}")
    np.save(tmp_path / "b.npy", make_images(6, 4))
    with pytest.raises(InputError, match=r"b.npy: no readable .npz file .*not a zip file"):
        open_dataset(f"npz:{tmp_path / 'b.npy'}")


@pytest.mark.parametrize("name", ["train_images", "test_labels"])
def test_an_npz_that_claims_terabytes_is_named(name, tmp_path: Path):
    spec = write_npz(tmp_path / "a.npz", **{name: None})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + bytes(6))
    message = (
        rf"a.npz: no readable .npz file .*{name} is 134 bytes long, its header claims 3072000000128: uint8 \(10+, 32"
    )
    with pytest.raises(InputError, match=message):
        open_dataset(spec)


@pytest.mark.parametrize(
    ("field", "value", "message"), [(0, 1, "is encrypted"), (2, 99, "compression .*not supported")]
)
def test_an_npz_that_cannot_be_unpacked_is_named(field, value, message, tmp_path: Path):
    spec = write_npz(tmp_path / "a.npz")
    content = bytearray((tmp_path / "a.npz").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # at a file's start, and in the list of files
        content[content.index(signature) + flags + field] = value  # flags, method of compression
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=rf"a.npz: no readable .npz file .*{message}"):
        open_dataset(spec)


def test_other_schemes_do_not_resize(tmp_path: Path):
    with pytest.raises(InputError, match="are 4 x 4, asked for 32 x 32"):
        open_dataset(write_npz(tmp_path / "a.npz"), image_size=32)
