"""Batches: each image's own plain transform, with draws by a Philox written out here, is the oracle; all backends agree
with it bit for bit.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bmsn import rng
from bmsn.backend import extension
from bmsn.data import BatchStream, batches, normalisation, normalisation_table, normalise
from bmsn.errors import InputError
from bmsn.ops import batches as ops
from bmsn.ops.batches import augment
from stacked import ON_GPU, assert_guards_hold, device_for, guarded, needs_triton

SHAPES = [  # (N, H, W, C)
    (3, 2, 2, 1),  # smaller than the padding: some crops are nothing else
    (5, 9, 9, 3),  # a ragged row
    (4, 8, 12, 5),  # a number of channels without a loop of its own, and not square
    (40, 64, 64, 3),  # enough to be run in parallel
]
DTYPES = [torch.float32, torch.bfloat16]
needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C is not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
WITH_TRITON = [*BACKENDS, pytest.param("triton", marks=needs_triton)]


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


def philox(key: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 as the paper has it, in Python's integers."""
    a, b, c, d = counter
    for i in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        low, high = ((key >> shift) + i * odd & 0xFFFFFFFF for shift, odd in ((0, 0x9E3779B9), (32, 0xBB67AE85)))
        a, b, c, d = second >> 32 ^ b ^ low, second & 0xFFFFFFFF, first >> 32 ^ d ^ high, first & 0xFFFFFFFF
    return a, b, c, d


def draw_plainly(key: int, step: int, image: int) -> tuple[int, int, int]:
    words = philox(key, (image, step & 0xFFFFFFFF, step >> 32, 0))
    return words[0] * 9 >> 32, words[1] * 9 >> 32, words[2] >> 31


KNOWN_ANSWERS = [  # (key, counter, words), from the files that belong to the paper
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_gives_the_known_answers():
    for key, counter, words in KNOWN_ANSWERS:
        assert philox(key, counter) == words
        assert tuple(rng.philox(key, torch.tensor(counter)).tolist()) == words
    counters = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, (50, 4)))
    key = rng.philox_key(3, "train/augment")
    assert 0 <= key < 2**63
    assert rng.philox(key, counters).tolist() == [list(philox(key, tuple(c))) for c in counters.tolist()]


def guarded_op(backend: str, images: np.ndarray, order: np.ndarray, table: Tensor, step: int, key: int) -> Tensor:
    """A batch of the op, whole epoch, with labels that must be those of the images; on the device of the backend."""
    device = device_for(backend)
    labels = torch.arange(len(images), device=device) * 7
    pixels, chosen = augment(
        torch.from_numpy(images).to(device), labels, torch.from_numpy(order).to(device), table.to(device),
        torch.tensor(step, device=device), key=key, batch_size=len(order), crop=True, backend=backend,
    )  # fmt: skip
    assert torch.equal(chosen.cpu(), torch.from_numpy(order) * 7)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    return pixels.cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", WITH_TRITON)
def test_every_crop_and_flip_is_that_of_the_plain_transform(shape, dtype, backend):
    images, key, step = make_images(shape), rng.philox_key(0, "a"), 2**35 + 3  # both words of the step count
    num_images = 16 if backend == "triton" and not ON_GPU else 2000
    order = np.arange(num_images)[::-1].copy() % len(images)
    table = normalisation_table(*make_statistics(shape[3]))
    batch = guarded_op(backend, images, order, table.to(dtype), step, key)
    normalised = normalise_plainly(images, torch.float32).permute(0, 2, 3, 1).numpy()
    drawn = [draw_plainly(key, step, i) for i in range(num_images)]
    assert num_images < 2000 or len(set(drawn)) == 162  # all crops and flips
    plain = np.stack([transform_one(normalised[i], *draw) for i, draw in zip(order, drawn, strict=True)])
    assert torch.equal(batch, torch.from_numpy(plain).to(dtype).permute(0, 3, 1, 2))
    assert batch.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("backend", WITH_TRITON[1:])
def test_streams_of_all_backends_are_equal(dtype, augment, backend):
    images, device = make_images((50, 12, 12, 3)), device_for(backend)
    ours = stream(images, batch_size=16, dtype=dtype, augment=augment, backend=backend, device=device)
    reference = stream(images, batch_size=16, dtype=dtype, augment=augment, backend="reference")
    for step in (0, 2, 3, 1000):  # across epochs
        for a, b in zip(ours.batch(step), reference.batch(step), strict=True):
            assert a.device.type == device.type
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_around_the_batch(backend, dtype, monkeypatch):
    if backend == "cpp" and extension() is None:
        pytest.skip("bmsn._C is not built")
    if backend == "triton" and needs_triton.args[0]:
        pytest.skip(needs_triton.kwargs["reason"])
    device = device_for(backend)
    shape = (7, 5, 5, 3)  # 75 values an image: a ragged end
    out = guarded(torch.empty(shape, dtype=dtype, device=device), poison=True)
    chosen = guarded(torch.empty(7, dtype=torch.int64, device=device), poison=True)
    images, order = torch.from_numpy(make_images((3, 5, 5, 3))).to(device), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    table = normalisation_table(*make_statistics(3)).to(device, dtype)
    monkeypatch.setattr(ops, "_empty_pixels", lambda *_: out.permute(0, 3, 1, 2))
    monkeypatch.setattr(ops, "_empty_labels", lambda *_: chosen)
    arguments = images, torch.arange(3, device=device), order.to(device), table, torch.zeros((), dtype=int).to(device)
    augment(*arguments, key=1, batch_size=7, crop=True, backend=backend)
    assert_guards_hold(pixels=out, labels=chosen)
    assert out.isfinite().all()


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
    warnings.simplefilter("error")  # torch warns about memory that is read-only
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
        ({"table": torch.zeros(256, 3).double()}, "table must be float32; got torch.float64"),
        ({"batch_size": 1}, r"batch_size must be in 2\.\.6.*got 1"),
        ({"batch_size": 7}, r"batch_size must be in 2\.\.6.*got 7"),
        ({"dtype": torch.float16}, "dtype.*got torch.float16"),
        ({"indices": np.array([0, 6])}, r"indices must be in 0\.\.5; got 0\.\.6"),
        ({"indices": np.array([-1, 3])}, r"got -1\.\.3"),
        ({"indices": np.array([0, 1], dtype=np.int32)}, "int64.*got int32"),
        ({"labels": np.zeros(5, np.int64)}, r"labels must be int64 \(6,\); got int64 \(5,\)"),
        ({"table": torch.zeros(256, 1)}, r"table must be float32 or bfloat16 \(256, 3\)"),
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
