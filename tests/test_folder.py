"""Class folders, their cache, and how images are decoded, resized and cropped."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bmsn.data import folder, hashes, open_dataset
from bmsn.errors import InputError
from images import bomb, encode, make_images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    where = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BMSN_CACHE", str(where))
    return where


@pytest.fixture(autouse=True)
def asked_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Commands that other tests of this process have run ask the library to talk."""
    caplog.set_level(logging.WARNING, "bmsn")


def write_classes(where: Path, names: list[str], per_class: int, seed: int = 0, size: int = 32) -> np.ndarray:
    images = make_images(len(names) * per_class, size, seed)
    for i, image in enumerate(images):
        path = where / names[i // per_class] / f"{i % per_class}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    return images


def refuse(monkeypatch: pytest.MonkeyPatch, *, reading: bool = False) -> None:
    """From now on decoding fails, and `reading` of files for their hashes, too."""

    def fail(*_):
        raise AssertionError("done again")

    monkeypatch.setattr(folder, "decode_into", fail)
    if reading:
        monkeypatch.setattr(hashes, "_hash", fail)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written just now are remembered at once, as those of a few seconds ago are."""
    monkeypatch.setattr(hashes, "_SETTLED_NS", 0)


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


def test_what_is_hidden_does_not_count(tmp_path: Path):
    """Files and folders, at the top, in the parts and deep inside a class; folders that are not hidden do count."""
    for part in ("train", "test"):
        write_classes(tmp_path / part, ["a/deep", "b"], 2)
    before = open_dataset(f"folder:{tmp_path}")
    assert before.train_labels.tolist() == [0, 0, 1, 1]
    hidden = (".git", "train/.c", "test/.c", "train/a/.thumbnails", "train/a/deep/.x/y", "test/b/.ipynb_checkpoints")
    write_classes(tmp_path, list(hidden), 1, seed=1)
    (tmp_path / "train" / "b" / "._0.png").write_bytes(b"not an image")
    after = open_dataset(f"folder:{tmp_path}")
    assert after.fingerprint == before.fingerprint
    assert (after.class_names, after.test_labels.tolist()) == (("a", "b"), [0, 0, 1, 1])


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
        refuse(patch)
        again = open_dataset(f"folder:{tmp_path}", image_size=16)
        assert again.fingerprint == first.fingerprint
        with pytest.raises(AssertionError, match="done again"):
            open_dataset(f"folder:{tmp_path}", image_size=8)
    (tmp_path / "a" / "0.png").write_bytes(encode(make_images(1, 32, seed=5)[0]))
    assert open_dataset(f"folder:{tmp_path}", image_size=16).fingerprint != first.fingerprint
    assert not list(cache.glob("*.partial"))


def write_uncompressed(where: Path, seed: int) -> np.ndarray:
    """Files whose names, sizes and times of modification are those of any other seed."""
    images = make_images(4, 16, seed)
    for i, image in enumerate(images):
        path = where / "ab"[i // 2] / f"{i % 2}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "BMP"))
        os.utime(path, ns=(10**18, 10**18))
    return images


@pytest.mark.usefixtures("settled")
def test_only_what_the_files_hold_counts(tmp_path: Path):
    seen = set()
    for where, seed in (("one", 1), ("two", 2), ("one", 3)):  # another folder; the same folder with other bytes
        images = write_uncompressed(tmp_path / where, seed)
        data = open_dataset(f"folder:{tmp_path / where}")
        np.testing.assert_array_equal(data.train_images, images)
        seen.add(data.fingerprint)
    assert len(seen) == 3


@pytest.mark.usefixtures("settled")
def test_an_unchanged_folder_is_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_classes(tmp_path / "pets", ["cat", "dog"], 2)
    first = open_dataset(f"folder:{tmp_path / 'pets'}").fingerprint
    with monkeypatch.context() as patch:
        refuse(patch, reading=True)
        assert open_dataset(f"folder:{tmp_path / 'pets'}").fingerprint == first
        (memory,) = (path for path in cache.glob("content-*") if not path.suffix)
        memory.write_bytes(b"\xff damaged")
        with pytest.raises(AssertionError, match="done again"):
            open_dataset(f"folder:{tmp_path / 'pets'}")
    refuse(monkeypatch)
    assert open_dataset(f"folder:{tmp_path / 'pets'}").fingerprint == first


def test_files_that_may_change_within_a_tick_of_the_clock_are_not_remembered(tmp_path: Path, cache: Path):
    write_classes(tmp_path, ["a", "b"], 2)
    open_dataset(f"folder:{tmp_path}")
    assert not [path for path in cache.glob("content-*") if not path.suffix]


@pytest.mark.parametrize("move", [Path.rename, shutil.copytree])
def test_a_folder_elsewhere_is_not_decoded_again(move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = write_classes(tmp_path / "pets", ["cat", "dog"], 2)
    first = open_dataset(f"folder:{tmp_path / 'pets'}")
    move(tmp_path / "pets", tmp_path / "animals")
    (tmp_path / "animals" / "cat" / "0.png").touch()
    refuse(monkeypatch)
    data = open_dataset(f"folder:{tmp_path / 'animals'}")
    np.testing.assert_array_equal(data.train_images, images)
    assert (data.name, data.fingerprint) == ("animals", first.fingerprint)


def test_other_classes_of_the_same_files_are_another_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_classes(tmp_path, ["a", "b"], 3)
    first = open_dataset(f"folder:{tmp_path}").fingerprint
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = open_dataset(f"folder:{tmp_path}")
    assert renamed.class_names == ("a", "c")
    (tmp_path / "c" / "0.png").rename(tmp_path / "a" / "3.png")
    moved = open_dataset(f"folder:{tmp_path}")  # all files in the same order
    assert moved.train_labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert len({first, renamed.fingerprint, moved.fingerprint}) == 3
    assert not caplog.text


def test_files_that_change_while_they_are_decoded(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_uncompressed(tmp_path, seed=1)
    decode = folder.decode_into

    def decode_and_change(*arguments):
        write_uncompressed(tmp_path, seed)
        decode(*arguments)

    monkeypatch.setattr(folder, "decode_into", decode_and_change)
    seed = 2
    with pytest.raises(InputError, match=f"{tmp_path} has changed while it was decoded"):
        open_dataset(f"folder:{tmp_path}")
    assert not [path for path in cache.iterdir() if path.is_dir()]
    np.testing.assert_array_equal(open_dataset(f"folder:{tmp_path}").train_images, write_uncompressed(tmp_path, 2))


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


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_format(kind, tmp_path: Path):
    content = encode(make_images(1)[0], kind)
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):  # the content says what it is, not the name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(open_dataset(f"folder:{tmp_path}").train_images[3], expected)


@pytest.mark.parametrize("place", ["a/0.png", "b/1.png"])
@pytest.mark.parametrize("side", [11000, 14000])
def test_pillow_does_not_warn_of_an_image_that_is_refused(side, place, tmp_path: Path):
    write_classes(tmp_path, ["a", "b"], 2)
    (tmp_path / place).write_bytes(bomb(side))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match=rf"{place}: {side} x {side} pixels; accepted: at most 67108864"):
            open_dataset(f"folder:{tmp_path}")
        assert warnings.filters[0][0] == "always"
    assert not caught


def test_what_is_no_file_is_named(tmp_path: Path):
    write_classes(tmp_path, ["a", "b"], 2)
    (tmp_path / "b" / "2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"b/2.png: a broken symlink"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "b" / "2.png").unlink()
    os.mkfifo(tmp_path / "b" / "2.png")
    with pytest.raises(InputError, match=r"b/2.png: no regular file"):
        open_dataset(f"folder:{tmp_path}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    write_classes(tmp_path / "pets", ["cat", "dog"], 48, size=4)
    monkeypatch.setattr("bmsn.progress._TERMINAL_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO, "bmsn"):
        open_dataset(f"folder:{tmp_path / 'pets'}")
    *_, last = sys.stderr.getvalue().split("\r\x1b[K")
    assert "pets: decoded [########................] 32 of 96 images (" in sys.stderr.getvalue()
    assert "/s), left 0:00:0" in sys.stderr.getvalue()
    assert last == ""  # the bar is gone
    assert [line.split(" (")[0] for line in caplog.messages] == [
        "pets: read 96 of 96 files",
        "pets: decoded 96 of 96 images",
    ]
    (tmp_path / "pets" / "dog" / "9.png").write_bytes(b"no image")
    with caplog.at_level(logging.INFO, "bmsn"), pytest.raises(InputError):
        open_dataset(f"folder:{tmp_path / 'pets'}")
    assert sys.stderr.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(InputError):  # a library that was not asked to talk
        open_dataset(f"folder:{tmp_path / 'pets'}")
    assert sys.stderr.getvalue() == ""


def test_elsewhere_lines_say_how_much_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
):
    write_classes(tmp_path / "pets", ["cat", "dog"], 32, size=4)
    monkeypatch.setattr("bmsn.progress._LINE_SECONDS", 0)
    with caplog.at_level(logging.INFO, "bmsn"):
        open_dataset(f"folder:{tmp_path / 'pets'}")
    assert caplog.messages[2].startswith("pets: decoded 32 of 64 images (")
    assert "/s), left 0:00:0" in caplog.messages[2]
    assert capfd.readouterr() == ("", "")


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
