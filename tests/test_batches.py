"""Batches: each image's own plain transform is the oracle; C++ and reference agree bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from bmsn.backend import extension
from bmsn.data import BatchStream, batches, normalisation, normalisation_table, normalise
from bmsn.errors import InputError

SHAPES = [  # (N, H, W, C)
    (3, 2, 2, 1),  # smaller than the padding: some crops are nothing else
    (5, 9, 9, 3),  # a ragged row
    (4, 8, 12, 5),  # a number of channels without a loop of its own, and not square
    (40, 64, 64, 3),  # enough to be run in parallel
]
DTYPES = [torch.float32, torch.bfloat16]
needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C is not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]


def make_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_statistics(channels: int) -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(0.3, 0.6, channels), np.linspace(0.2, 0.3, channels)


def stream(images: np.ndarray, **changes) -> BatchStream:
    labels = np.arange(len(images))  # a label tells which image it is
    values = {
        "labels": labels,
        "indices": labels,
        "table": normalisation_table(*make_statistics(images.shape[3])),
        "batch_size": 2,
        "dtype": torch.float32,
        "seed": 0,
        "purpose": "train",
        "augment": True,
    } | changes
    return BatchStream(images, **values)


def transform_one(image: np.ndarray, top: int, left: int, flip: int) -> np.ndarray:
    """Pads, cuts and flips one normalised image; (H, W, C)."""
    height, width = image.shape[:2]
    crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top : top + height, left : left + width]
    return crop[:, ::-1] if flip else crop


def normalise_plainly(images: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    mean, std = make_statistics(images.shape[-1])
    values = (images.astype(np.float64) / 255 - mean) / std
    return torch.from_numpy(values.astype(np.float32)).to(dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_crop_and_flip_is_that_of_the_plain_transform(shape, dtype, backend):
    images = make_images(shape)
    cases = np.array(list(product(range(9), range(9), range(2))))
    offsets, flips = cases[:, :2], cases[:, 2]  # strided views, as indices may be
    indices = np.arange(len(flips))[::-1].copy() % len(images)
    table = normalisation_table(*make_statistics(shape[3]))
    transform = {"cpp": batches.transform_cpp, "reference": batches.transform_reference}[backend]
    batch = transform(images, indices, offsets, flips, table, dtype)
    normalised = normalise_plainly(images, torch.float32).permute(0, 2, 3, 1).numpy()
    plain = np.stack([transform_one(normalised[i], *o, f) for i, o, f in zip(indices, offsets, flips, strict=True)])
    assert torch.equal(batch, torch.from_numpy(plain).to(dtype).permute(0, 3, 1, 2))
    assert batch.dtype == dtype
    assert batch.is_contiguous(memory_format=torch.channels_last)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("augment", [True, False])
def test_streams_of_both_backends_are_equal(dtype, augment):
    images = make_images((50, 32, 32, 3))
    ours, reference = (
        stream(images, batch_size=16, dtype=dtype, augment=augment, backend=backend) for backend in ("cpp", "reference")
    )
    for step in (0, 2, 3, 1000):  # across epochs
        for a, b in zip(ours.batch(step), reference.batch(step), strict=True):
            assert torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize("bfloat16", [False, True])
def test_cpp_writes_its_output_only(bfloat16):
    images, guard = make_images((3, 5, 5, 3)), 64
    size = images.size
    out = torch.full((size + 2 * guard,), torch.nan, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    table = normalisation_table(*make_statistics(3))
    indices, offsets, flips = np.arange(3), np.array([[0, 8], [8, 0], [4, 4]]), np.array([1, 0, 1])
    arrays = [array.ctypes.data for array in (images, indices, offsets, flips)]
    start = out[guard:].data_ptr()
    extension().augment(arrays[0], (3, 5, 5, 3), *arrays[1:], 4, table.data_ptr(), start, bfloat16)
    assert out[:guard].isnan().all()
    assert out[guard + size :].isnan().all()
    assert out[guard : guard + size].isfinite().all()


@needs_cpp
def test_cpp_rounds_to_bfloat16_as_torch_does():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.0e38, 1e-40, 0.0, -0.0])  # even below, even above, ...
    table = torch.cat([ties, torch.randn(249, generator=torch.Generator().manual_seed(0))])[:, None]
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    batch = normalise(images, table, torch.bfloat16, backend="cpp")
    assert torch.equal(batch.reshape(256).view(torch.int16), table[:, 0].bfloat16().view(torch.int16))


def test_an_epoch_has_each_image_once_and_drops_the_last():
    indices = np.array([3, 5, 7, 11, 13, 17, 19])
    batch_stream = stream(make_images((20, 4, 4, 3)), indices=indices, batch_size=2)
    assert batch_stream.steps_per_epoch == 3
    epochs = [torch.cat([batch_stream.batch(3 * e + i)[1] for i in range(3)]).tolist() for e in range(30)]
    for seen in epochs:
        assert len(set(seen)) == 6
        assert set(seen) <= set(indices.tolist())
    assert len(set(map(tuple, epochs))) == 30
    assert {i for seen in epochs for i in seen} == set(indices.tolist())  # another image is left out each time


def test_labels_belong_to_their_images():
    images = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 9, 9, 1), np.uint8)
    table = normalisation_table(np.zeros(1), np.full(1, 1 / 255))  # a value becomes itself
    pixels, labels = stream(images, table=table, batch_size=20).batch(1)
    assert torch.equal(pixels[:, 0, 4, 4].round().long(), labels)  # the middle is never in the padding


def test_a_batch_depends_on_seed_purpose_and_step_alone():
    images = make_images((30, 8, 8, 3))
    first = [stream(images, batch_size=4).batch(step)[0] for step in range(20)]  # a fresh stream for each
    one = stream(images, batch_size=4)
    for step in (13, 2, 19, 0, 13):  # out of order
        assert torch.equal(one.batch(step)[0], first[step])
    for change in ({"seed": 1}, {"purpose": "validation"}):
        other_pixels, other_labels = stream(images, batch_size=4, **change).batch(5)
        assert not torch.equal(other_labels, one.batch(5)[1])
        assert not torch.equal(other_pixels, first[5])


def test_crops_and_flips_are_uniform():
    size = 15
    image = np.arange(1, size * size + 1, dtype=np.uint8).reshape(1, size, size, 1)  # a value tells its place
    images = np.repeat(image, 2000, 0)
    table = normalisation_table(np.zeros(1), np.full(1, 1 / 255))
    places = stream(images, table=table, batch_size=2000).batch(0)[0][:, 0].round().long() - 1
    middle, right = places[:, 7, 7], places[:, 7, 8]
    flipped = (right < middle).numpy()
    top, left = (middle // size - 7 + 4).numpy(), (middle % size - 7 + 4).numpy()
    for offsets in (top, left):
        counts = np.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert np.abs(counts - 2000 / 9).max() < 5 * np.sqrt(2000 / 9)
    assert abs(flipped.mean() - 0.5) < 0.05
    for a, b in ((top, left), (top, flipped), (left, flipped)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_augmentation_images_are_only_normalised(backend):
    images = make_images((12, 8, 8, 3))
    pixels, labels = stream(images, batch_size=6, augment=False, backend=backend).batch(1)
    assert torch.equal(pixels, normalise_plainly(images[labels.numpy()], torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalise_takes_the_images_asked_for_from_a_memory_map(backend, tmp_path: Path):
    images = make_images((10, 6, 6, 3))
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    table = normalisation_table(*make_statistics(3))
    indices = np.array([9, 0, 4, 4])
    some = normalise(mapped, table, torch.float32, indices, backend=backend)
    assert torch.equal(some, normalise_plainly(images[indices], torch.float32))
    assert torch.equal(normalise(mapped, table, torch.float32, backend=backend)[indices], some)
    assert normalise(mapped, table, torch.float32, indices[:0], backend=backend).shape == (0, 3, 6, 6)


def test_normalisation_is_that_of_the_images_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batches, "_CHUNK_PIXELS", 500)  # several chunks, the last one smaller
    images, indices = make_images((23, 8, 8, 3)), np.array([20, 1, 2, 7, 11])
    images[3:6] = 255  # held out
    mean, std = normalisation(images, indices)
    pixels = images[indices].astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-13)
    np.testing.assert_array_equal(normalisation(images[indices]), (mean, std))


def test_a_constant_channel_is_normalised_to_zero():
    images = make_images((4, 8, 8, 3))
    images[..., 1] = 77
    mean, std = normalisation(images)
    assert std[1] == 1
    assert (std[[0, 2]] < 0.5).all()
    table = normalisation_table(mean, std)
    assert abs(table[77, 1]) < 1e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, r"batch_size must be in 2\.\.6.*got 1"),
        ({"batch_size": 7}, r"batch_size must be in 2\.\.6.*got 7"),
        ({"dtype": torch.float16}, "dtype.*got torch.float16"),
        ({"indices": np.array([0, 6])}, r"indices must be in 0\.\.5; got 0\.\.6"),
        ({"indices": np.array([-1, 3])}, r"got -1\.\.3"),
        ({"indices": np.array([0, 1], dtype=np.int32)}, "int64.*got int32"),
        ({"labels": np.zeros(5, np.int64)}, r"labels must be int64 \(6,\); got int64 \(5,\)"),
        ({"table": torch.zeros(256, 1)}, r"table must be float32 \(256, 3\)"),
        ({"table": torch.zeros(3, 256).T}, "table"),
        ({"images": make_images((6, 4, 4, 3)).transpose(0, 2, 1, 3)}, "C-contiguous"),
        ({"images": np.zeros((6, 4, 4, 3), np.float32)}, "uint8.*got float32"),
        ({"backend": "cp"}, "did you mean 'cpp'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change, message):
    images = change.pop("images", make_images((6, 4, 4, 3)))
    with pytest.raises(InputError, match=message):
        stream(images, **change)


def test_a_negative_step_and_bad_statistics_are_named():
    with pytest.raises(InputError, match="step must be at least 0; got -1"):
        stream(make_images((6, 4, 4, 3))).batch(-1)
    with pytest.raises(InputError, match="positive deviations"):
        normalisation_table(np.zeros(1), np.zeros(1))
    with pytest.raises(InputError, match="at least 1 image"):
        normalisation(make_images((6, 4, 4, 3)), np.zeros(0, np.int64))
