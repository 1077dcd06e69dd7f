"""Interference: training against a loop written out, equal updates, its page; bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bmsn.config import Procedure
from bmsn.data import BatchStream, normalisation, normalisation_table, normalise, split_halves
from bmsn.errors import InputError, RunStopped
from bmsn.figures_interference import _mosaic
from bmsn.interference import InterferenceConfig, run_interference
from bmsn.network import SupernetMixture
from bmsn.report import main
from bmsn.reporting_interference import write_interference
from bmsn.rng import torch_seed
from bmsn.space import SearchSpace
from bmsn.trainer import batch_accuracy, compute_dtype, learning_rate, train_step
from html_pages import HtmlPage
from searching import tiny_images, write_tiny_set

SPACE = SearchSpace.named("resnet14-cifar10")
CONFIG = InterferenceConfig(space=SPACE.name, data="npz:tiny", epochs=2, batch_size=16, device="cpu", seed=3)


def test_training_is_that_of_a_loop_written_out() -> None:
    data = tiny_images()
    result = run_interference(CONFIG, data)
    train, validation = split_halves(data.train_labels, 3)
    table = normalisation_table(*normalisation(data.train_images, train))
    dtype = compute_dtype(torch.device("cpu"))
    stream = BatchStream(data.train_images, data.train_labels, train, table, batch_size=16, dtype=dtype, seed=3,
                         purpose="train", augment=True)  # fmt: skip
    images = normalise(data.train_images, table, dtype, indices=validation)
    labels = torch.from_numpy(data.train_labels[validation])
    early, late = SPACE.find("1,1,5"), SPACE.find("5,1,1")
    orders = ([early] * 8, [late] * 8, [early, late] * 8)  # 2 epochs of 4 batches; twice as many where two take turns
    for net, order in enumerate(orders):
        generator = torch.Generator().manual_seed(torch_seed(3, "weights"))
        nets = SupernetMixture(SPACE, 1, 4, 3, generator=generator)
        velocity = torch.zeros_like(nets.arena.detach())
        for step, architecture in enumerate(order):
            progress = step // (len(order) // 8) / 8
            lr = learning_rate(progress, 0.1, 1e-3, Procedure())
            train_step(nets, velocity, architecture, 0, *stream.batch(step), lr=lr, momentum=0.9, weight_decay=1e-3)
        filters = nets.weights(nets.arena.detach()[0], torch.float32).layers[0]["conv"].numpy()
        np.testing.assert_array_equal(result.filters[1 + net], filters)
        expected = [batch_accuracy(nets, a, 0, images, labels) for a in (early, late)]
        np.testing.assert_allclose(result.accuracy[-1, net], expected, atol=1.01 / 64)  # one image may round
    assert result.steps.tolist() == list(range(9))
    assert (result.accuracy[0] == result.accuracy[0, :1]).all(), "all begin with the same weights"


def test_features_are_those_of_the_first_layer() -> None:
    result = run_interference(replace(CONFIG, epochs=1), tiny_images())
    assert result.features.shape == (4, 16, 8, 8)
    assert result.image.shape == (8, 8, 3)
    assert (result.features >= 0).all()
    assert (result.features.reshape(4, -1).max(1) > 0).all()


def test_filters_in_a_mosaic() -> None:
    tiles = [np.full((2, 3), value) for value in (0.0, 0.2, 0.4)]
    picture = _mosaic(tiles, gap=1)
    assert picture.tolist() == [
        [0.0, 0.0, 0.0, 1.0, 0.2, 0.2, 0.2],
        [0.0, 0.0, 0.0, 1.0, 0.2, 0.2, 0.2],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [0.4, 0.4, 0.4, 1.0, 1.0, 1.0, 1.0],
        [0.4, 0.4, 0.4, 1.0, 1.0, 1.0, 1.0],
    ]


def test_page_and_numbers(tmp_path: Path) -> None:
    result = run_interference(CONFIG, tiny_images())
    path = write_interference(result, tmp_path / "out")
    page = HtmlPage.read(path)
    assert page.headings == ["Interference in resnet14-cifar10 on tiny", "The first layer", "To reproduce"]
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    rows = page.table("supernet")
    assert [row["supernet"] for row in rows] == ["early", "late", "alternating"]
    assert [row["with [5,1,1] %"] for row in rows] == [f"{100 * value:.2f}" for value in result.accuracy[-1, :, 1]]
    cosines = page.table("")
    start, late = (result.filters[i].reshape(16, -1) for i in (0, 2))
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(start, late, strict=True)])
    assert cosines[0]["late"] == cosines[2]["at the start"] == f"{cosine:.3f}"
    stored = json.loads((tmp_path / "out" / "interference.json").read_text())
    assert stored["accuracy"] == result.accuracy.tolist()
    assert stored["architectures"] == ["1-1-5", "5-1-1"]
    command = "python -m bmsn.report --interference --space resnet14-cifar10 --data npz:tiny --early 1-1-5 --late 5-1-1"
    assert f"{command} --epochs 2 --batch-size 16 --device cpu --seed 3" in page.text
    files = {file.name for file in (tmp_path / "out" / "interference-figures").iterdir()}
    assert files == {f"interference-{name}.{kind}" for name in ("accuracy", "filters", "features")
                     for kind in ("png", "svg")}  # fmt: skip


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_tiny_set(tmp_path / "tiny.npz")
    flags = ["--interference", "--data", spec, "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert "space must be given" in capsys.readouterr().err
    flags += ["--space", SPACE.name, "--early", "2,2,3"]
    assert main([*flags, "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert "[2,2,3]" in HtmlPage.read(tmp_path / "page.html").text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"late": "1,1,5"}, r"early and late must be two architectures; both are \[1,1,5\]"),
        ({"early": "9,9"}, "is not in resnet14-cifar10"),
        ({"space": "resnet18-cifar10"}, "images of 8 pixels; resnet18-cifar10 needs a multiple of"),
        ({"batch_size": 65}, r"batch_size must be in 2..64"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    data = tiny_images()
    if "space" in changes:
        data = replace(data, train_images=data.train_images[:, :4, :4].copy(), test_images=data.test_images[:, :4, :4])
        message = message.replace("8 pixels", "4 pixels")
    with pytest.raises(InputError, match=message):
        run_interference(replace(CONFIG, **changes), data)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmsn.interference.train_step", lambda *args, **settings: float("nan"))
    with pytest.raises(RunStopped, match=r"the loss of \[1,1,5\] is not finite"):
        run_interference(CONFIG, tiny_images())


def test_it_stops_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("bmsn.interference.train_step", full)
    with pytest.raises(RunStopped, match=r"^interference: out of memory on cpu at a peak of .* a smaller batch_size"):
        run_interference(CONFIG, tiny_images())
