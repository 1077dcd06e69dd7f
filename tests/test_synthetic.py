"""The built-in set: a pure function of its arguments, balanced, no use to classifiers that know no neighbourhoods."""

from __future__ import annotations

import numpy as np
import pytest

from bmsn.data.synthetic import KINDS, VARIANTS, generate_synthetic
from bmsn.errors import InputError

NUM_TRAIN, NUM_TEST = 4000, 2000
HISTOGRAM_BINS = 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_types(variant):
    data = generate_synthetic(variant, 103, 50, seed=103)
    assert data.train_images.shape == (103, 32, 32, 3)
    assert data.test_images.shape == (50, 32, 32, 3)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64


@pytest.mark.parametrize("variant", VARIANTS)
def test_kinds_and_their_classes_are_balanced_and_shuffled(variant):
    data = generate_synthetic(variant, 103, 50, seed=103)
    shares = VARIANTS[variant]
    ends = np.cumsum([len(KINDS[kind]) for kind in shares])
    assert data.num_classes == ends[-1]
    for labels in (data.train_labels, data.test_labels):
        of_kinds = np.split(np.bincount(labels, minlength=data.num_classes), ends[:-1])
        for counts, share in zip(of_kinds, shares.values(), strict=True):
            assert np.ptp(counts) <= 1
            assert abs(counts.sum() - len(labels) * share / sum(shares.values())) < 1
        assert (np.diff(labels) < 0).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_arguments_give_the_same_bytes(variant):
    one, other = (generate_synthetic(variant, 70, 30, seed=107) for _ in range(2))
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(one, field), getattr(other, field))


def test_seeds_variants_and_halves_differ():
    arguments = [("default", 100), ("default", 101), ("fine", 100)]
    sets = [generate_synthetic(variant, 70, 70, seed=seed) for variant, seed in arguments]
    images = [half for data in sets for half in (data.train_images, data.test_images)]
    for i, one in enumerate(images):
        for other in images[i + 1 :]:
            assert (one == other).mean() < 0.1  # grey levels agree by chance alone


def ridge_accuracy(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, penalty: float
) -> float:
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    gram = train.T @ train + penalty * np.eye(train.shape[1])
    weights = np.linalg.solve(gram, train.T @ np.eye(labels.max() + 1)[labels])
    return float(((test @ weights).argmax(1) == test_labels).mean())


def histograms(images: np.ndarray) -> np.ndarray:
    width = 256 // HISTOGRAM_BINS
    bins = [(images // width == number).mean((1, 2)) for number in range(HISTOGRAM_BINS)]
    return np.concatenate(bins, axis=1)


def grey(images: np.ndarray) -> np.ndarray:
    return images.mean(3).reshape(len(images), -1)


def test_stripes_are_in_step_or_out_of_step_as_the_label_says():
    """Read by a template: in each row the difference of even and odd columns, which is largest in the two patches."""
    data = generate_synthetic("fine", 2000, 0, seed=108)
    light = data.train_images.astype(np.float64).mean(3)
    response = ((light - light.mean(2, keepdims=True)) * (-1.0) ** np.arange(32)).sum(2)
    upper = np.abs(response).argmax(1)
    rows = np.arange(32)
    elsewhere = np.where(np.abs(rows - upper[:, None]) >= 3, response, 0)
    lower = np.abs(elsewhere).argmax(1)
    images = np.arange(len(light))
    out_of_step = response[images, upper] * response[images, lower] < 0
    apart = np.abs(upper - lower)
    assert (out_of_step == data.train_labels)[apart >= 4].mean() > 0.9
    assert np.bincount(apart, minlength=23)[4:21].min() > 0  # patches lie near one another and far apart


def test_dots_are_light_as_the_label_says():
    """Read by a box filter: its strongest response in each cell, and the twelve strongest cells."""
    data = generate_synthetic("coarse", 1000, 0, seed=109)
    light = data.train_images.astype(np.float64).mean(3)
    light -= np.median(light, axis=(1, 2), keepdims=True)
    cells = light.reshape(-1, 4, 8, 4, 8).swapaxes(2, 3)
    boxes = np.lib.stride_tricks.sliding_window_view(cells, (4, 4), axis=(3, 4)).mean((5, 6)).reshape(-1, 16, 25)
    response = np.take_along_axis(boxes, np.abs(boxes).argmax(2)[..., None], axis=2)[..., 0]
    strongest = np.take_along_axis(response, np.abs(response).argsort(axis=1)[:, -12:], axis=1)
    num_light = (strongest > 0).sum(1)
    away = np.abs(num_light[:, None] - [0, 8, 16]).min(1)
    assert (away == data.train_labels).mean() > 0.85
    for label in range(5):  # half of the images of a class below the first fold, and a quarter on either side of 8
        counts = np.bincount(num_light[data.train_labels == label], minlength=13) / 200
        expected = np.bincount([label, label, 8 - label, 8 + label], minlength=13) / 4
        assert np.abs(counts - expected).max() < 0.15


@pytest.mark.parametrize("variant", ["fine", "coarse"])
@pytest.mark.parametrize(("features", "penalty"), [(histograms, 10.0), (grey, 3000.0)])
def test_classes_need_neighbourhoods(features, penalty, variant):
    data = generate_synthetic(variant, NUM_TRAIN, NUM_TEST, seed=105)
    accuracy = ridge_accuracy(
        features(data.train_images), data.train_labels, features(data.test_images), data.test_labels, penalty
    )
    chance = 1 / data.num_classes
    assert accuracy < chance + 4 * (chance * (1 - chance) / NUM_TEST) ** 0.5 + 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "corse"}, "corse.*default, fine, coarse"),
        ({"num_train": 15}, "num_train must be at least 16; got 15"),
        ({"num_test": -1}, "num_test must be at least 0.*got -1"),
    ],
    ids=["variant", "num_train", "num_test"],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        generate_synthetic(**arguments)
