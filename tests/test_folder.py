"""Class folders, their cache, and how images are decoded, resized and cropped."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bmsn.data import folder, open_dataset
from bmsn.errors import InputError
from images import bomb, encode, make_images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    where = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BMSN_CACHE", str(where))
    return where


def write_classes(where: Path, names: list[str], per_class: int, seed: int = 0, size: int = 32) -> np.ndarray:
    images = make_images(len(names) * per_class, size, seed)
    for i, image in enumerate(images):
        path = where / names[i // per_class] / f"{i % per_class}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    return images


def refuse_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder, "decode_into", decode)


def test_class_folders(tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
    images = write_classes(tmp_path / "pets", ["cat", "dog"], 3)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / ".git").mkdir()
    with caplog.at_level(logging.INFO, "bmsn"):
        data = open_dataset(f"folder:{tmp_path / 'pets'}")
    assert "pets: decoded 6 of 6 images" in caplog.text
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(data.train_images, images)
    assert isinstance(data.train_images, np.memmap)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_images.shape == (0, 32, 32, 3)
    assert (data.name, data.class_names) == ("pets", ("cat", "dog"))


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_train_and_test_folders(test_name, tmp_path: Path):
    train = write_classes(tmp_path / "train", ["a", "b", "c"], 2)
    test = write_classes(tmp_path / test_name, ["a", "c"], 1, seed=1)
    data = open_dataset(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.train_images, train)
    np.testing.assert_array_equal(data.test_images, test)
    assert data.test_labels.tolist() == [0, 2]


def test_a_folder_is_decoded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_classes(tmp_path, ["a", "b"], 2)
    first = open_dataset(f"folder:{tmp_path}", image_size=16)
    with monkeypatch.context() as patch:
        refuse_decoding(patch)
        again = open_dataset(f"folder:{tmp_path}", image_size=16)
        assert again.fingerprint == first.fingerprint
        with pytest.raises(AssertionError, match="decoded again"):
            open_dataset(f"folder:{tmp_path}", image_size=8)
    (tmp_path / "a" / "0.png").write_bytes(encode(make_images(1, 32, seed=5)[0]))
    assert open_dataset(f"folder:{tmp_path}", image_size=16).fingerprint != first.fingerprint
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "wrong fingerprint"])
def test_a_damaged_cache_is_made_anew(damage, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture):
    write_classes(tmp_path, ["a", "b"], 2)
    sound = open_dataset(f"folder:{tmp_path}").fingerprint
    (file,) = cache.glob("*/train.npy")
    content = bytearray(file.read_bytes())
    match damage:
        case "flipped bit":
            content[-7] ^= 4
            file.write_bytes(content)
        case "truncated":
            file.write_bytes(content[:-7])
        case "missing":
            file.unlink()
        case "wrong fingerprint":
            file.with_name("fingerprint").write_text("0")
    data = open_dataset(f"folder:{tmp_path}")
    assert "is damaged" in caplog.text
    assert data.fingerprint == sound
    caplog.clear()
    open_dataset(f"folder:{tmp_path}")
    assert not caplog.text


def test_what_a_dead_process_left_does_not_matter(tmp_path: Path, cache: Path):
    images = write_classes(tmp_path, ["a", "b"], 2)
    open_dataset(f"folder:{tmp_path}")
    (file,) = cache.glob("*/train.npy")
    file.write_bytes(file.read_bytes()[:-7])
    file.parent.rename(file.parent.with_suffix(".partial"))  # as after a kill in the middle of decoding
    np.testing.assert_array_equal(open_dataset(f"folder:{tmp_path}").train_images, images)
    assert not list(cache.glob("*.partial"))


def test_images_are_resized_by_the_shorter_side_and_cropped(tmp_path: Path):
    wide = np.asarray(Image.fromarray(make_images(1, 12)[0]).resize((150, 90), Image.Resampling.BICUBIC))  # smooth
    exact = make_images(1, 40, seed=2)[0][:32]  # 40 wide, 32 high: only cropped
    for name, image in (
        ("a/0", wide),
        ("a/1", exact),
        ("b/0", wide.transpose(1, 0, 2)),
        ("b/1", exact.transpose(1, 0, 2)),
    ):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(np.ascontiguousarray(image)))
    data = open_dataset(f"folder:{tmp_path}", image_size=32)
    np.testing.assert_array_equal(data.train_images[1], exact[:, 4:36])
    tensor = torch.from_numpy(wide[:, 30:120].copy()).permute(2, 0, 1)[None].double()  # the centred square
    expected = F.interpolate(tensor, (32, 32), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    inner = np.s_[:, 2:-2]  # at the edges of the square the filter sees the image beyond
    assert np.abs(data.train_images[0].astype(float) - expected)[inner].max() <= 1.5
    np.testing.assert_array_equal(data.train_images[2], data.train_images[0].transpose(1, 0, 2))


def test_large_jpegs_are_scaled_while_decoding_without_visible_change(tmp_path: Path):
    fine = Image.fromarray(make_images(1, 128)[0]).resize((512, 512), Image.Resampling.BICUBIC)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        fine.save(tmp_path / f"{name}.jpg", quality=95)
    data = open_dataset(f"folder:{tmp_path}", image_size=100)
    tensor = torch.from_numpy(np.array(fine)).permute(2, 0, 1)[None].double()
    expected = F.interpolate(tensor, (100, 100), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(data.train_images[0] - expected).mean() < 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode, tmp_path: Path):
    write_classes(tmp_path, ["a", "b"], 2)
    image = Image.fromarray(make_images(1)[0]).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    (tmp_path / "a" / f"0.{kind.lower()}").write_bytes(encode(image, kind))
    data = open_dataset(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.train_images[1 if kind == "TIFF" else 0], np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a/1.png: no readable image"),
        (encode(make_images(1)[0])[:-2000], r"a/1.png: no readable image"),
        (bomb(), r"a/1.png: 9000 x 9000 pixels; accepted: at most 67108864"),
        (encode(make_images(1)[0][:16]), r"a/1.png: 32 x 16 pixels, the first image has 32 x 32"),
    ],
    ids=["empty", "truncated", "bomb", "other size"],
)
def test_a_damaged_image_is_named(content, message, tmp_path: Path, cache: Path):
    write_classes(tmp_path, ["a", "b"], 2)
    (tmp_path / "a" / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_dataset(f"folder:{tmp_path}")
    assert not [path for path in cache.iterdir() if path.is_dir()]  # nothing half done is left


def test_a_folder_of_another_form_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="has 0 class folder"):
        open_dataset(f"folder:{tmp_path}")
    write_classes(tmp_path / "train", ["a", "b"], 2)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(InputError, match=r"no image in .*c; accepted: .bmp"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "train" / "c" / "0.png").write_bytes(encode(make_images(1)[0]))
    with pytest.raises(InputError, match=r"only one image in .*c; each class needs at least 2"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "train" / "c" / "1.png").write_bytes(encode(make_images(1)[0]))
    write_classes(tmp_path / "test", ["z"], 1)
    with pytest.raises(InputError, match="z is a class that the training images don't have"):
        open_dataset(f"folder:{tmp_path}")


def test_images_that_are_not_square_need_a_size(tmp_path: Path):
    write_classes(tmp_path, ["a", "b"], 2)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(encode(make_images(1)[0][:20]))
    with pytest.raises(InputError, match=r"a/0.png: 32 x 20 pixels, not square; give an image size"):
        open_dataset(f"folder:{tmp_path}")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_classes(tmp_path / "set", ["a", "b"], 2)
    (tmp_path / "file").touch()
    monkeypatch.setenv("BMSN_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cache of decoded images .*BMSN_CACHE"):
        open_dataset(f"folder:{tmp_path / 'set'}")
