"""`--race` in a search: files, table, ranking, truth, resume, bad settings."""

from __future__ import annotations

import csv
import json
import signal

import numpy as np
import pytest
import torch

import bmsn
from bmsn.evaluator import Scores, calibrate
from bmsn.loop import SearchLoop
from bmsn.search import main
from searching import run, tiny_flags, write_tiny_set


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """32 validation batches of 8; three steps an architecture, so that some stay near chance."""
    folder = tmp_path_factory.mktemp("data")
    truth = folder / "truth.csv"
    rows = [f"{a.slug},{80 + a.index / 10}" for a in bmsn.SearchSpace.named("resnet14-cifar10")]
    truth.write_text("stage_depths,accuracy_mean\n" + "\n".join(rows) + "\n")
    spec = write_tiny_set(folder / "tiny.npz", num_images=512)
    return tiny_flags(spec, epochs=1, batch_size=8, fast_eval=True, truth=truth, checkpoint_every=16)


@pytest.fixture(scope="module")
def raced(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("raced") / "run"
    code, printed, err = run(*flags, "--race", "3", "--confidence", "0.6", "--out", str(out))
    assert code == 0, err
    return out, printed


def test_a_raced_search_ends_with_the_same_best(flags, raced, tmp_path):
    out, printed = raced
    code, _, err = run(*flags, "--out", str(tmp_path / "plain"))
    assert code == 0, err
    race, plain = (json.loads((f / "result.json").read_text()) for f in (out, tmp_path / "plain"))
    rows = list(csv.DictReader((out / "ranking.csv").read_text().splitlines()))
    for row, line, whole in zip(race["ranking"][:3], rows, plain["ranking"], strict=False):
        assert row == whole
        assert row["images_seen"] == 256 == int(line["images_seen"])
    assert [row["images_seen"] for row in plain["ranking"]] == [256] * 15
    dropped = [row for row in race["ranking"] if row["images_seen"] < 256]
    assert dropped  # the case does race
    assert dropped == race["ranking"][-len(dropped) :]
    accuracies = [row["accuracy"] for row in dropped]
    assert accuracies == sorted(accuracies, reverse=True)
    columns = (race["scores"][name] for name in ("architecture", "correct", "images_seen"))
    by_architecture = {a: (correct, seen) for a, correct, seen in zip(*columns, strict=True)}
    for row, line, shown in zip(race["ranking"], rows, printed.splitlines()[1:], strict=False):
        correct, seen = by_architecture[row["architecture"]]
        assert (row["accuracy"], row["images_seen"]) == (correct / seen, seen)
        assert (float(line["accuracy"]), int(line["images_seen"])) == (correct / seen, seen)
        assert shown.split()[-1] == str(seen)
    assert race["truth"]["ranking"]["n"] == 15 - len(dropped)
    assert race["truth"]["ema"]["n"] == 15
    assert f"n = {15 - len(dropped)})" in printed
    assert "Race for the top 3 at confidence 0.6" in printed


def test_calibrated_statistics_are_measured_once_for_a_race(flags, tmp_path, monkeypatch, capsys):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return calibrate(*arguments)

    monkeypatch.setattr("bmsn.methods.supernet.calibrate", counted)
    ends = []
    for name, more in (("raced", ["--race", "3", "--confidence", "0.6"]), ("plain", [])):
        calls.clear()
        assert main([*flags, "--norm", "calibrated", *more, "--out", str(tmp_path / name)]) == 0
        assert len(calls) == 1
        ends.append(json.loads((tmp_path / name / "result.json").read_text())["ranking"])
    assert ends[0][:3] == ends[1][:3]
    assert any(row["images_seen"] < 256 for row in ends[0])


def test_killed_in_the_race_and_resumed_it_ends_the_same(flags, raced, tmp_path):
    out = tmp_path / "run"
    race = ["--race", "3", "--confidence", "0.6", "--out", str(out)]
    code, _, err = run("killed_search.py", "score", "1", *flags, *race)
    assert code == -signal.SIGKILL, err
    assert not (out / "result.json").exists()
    code, printed, err = run("--resume", "--out", str(out))
    assert code == 0, err
    assert (out / "ranking.csv").read_text() == (raced[0] / "ranking.csv").read_text()
    assert (
        json.loads((out / "result.json").read_text())["scores"]
        == json.loads((raced[0] / "result.json").read_text())["scores"]
    )
    again = bmsn.SearchResult.from_json((out / "result.json").read_text(), "here").to_table()
    assert again == printed.rstrip("\n")


@pytest.fixture
def loop(flags):
    """A search at its end, untrained; a[c,m] falls with the architecture's index, except that the last is the best."""
    spec = flags[flags.index("--data") + 1]
    config = bmsn.SearchConfig(space="resnet14-cifar10", data=spec, supernets=1, epochs=1, batch_size=8, race=2)
    loop = SearchLoop(config, bmsn.open_dataset(spec))
    loop.step = loop.num_steps
    loop.method.sampler.mixture.refresh(np.r_[0.8 - 0.02 * np.arange(14), 0.9][:, None], ema=False)
    return loop


def test_those_dropped_rank_below_those_that_saw_everything(loop):
    pairs = tuple((loop.space[index], 0) for index in range(5))
    seen = torch.tensor([256, 8, 256, 16, 256])
    race = bmsn.Race(pairs, torch.tensor([128, 7, 130, 15, 100]), seen, 256, top=(2, 0), decided_after=256)
    ranked = loop.rank(race)
    assert [row.architecture.index for row in ranked] == [2, 0, 4, 3, 1, 14, *range(5, 14)]
    assert [row.images_seen for row in ranked] == [256, 256, 256, 16, 8] + [0] * 10
    assert [row.accuracy for row in ranked[:6]] == [130 / 256, 0.5, 100 / 256, 15 / 16, 7 / 8, None]
    assert ranked[3].standard_error == pytest.approx((15 / 16 * (1 / 16) / 16) ** 0.5)


def test_of_equal_counts_the_larger_moving_average_wins(loop, monkeypatch):
    def equal(mixture, images, labels, pairs, batch_size, after_batch):
        return Scores(tuple(pairs), torch.full((len(pairs),), 3), len(images))

    monkeypatch.setattr("bmsn.methods.supernet.score_one_by_one", equal)
    race = loop.score()
    assert [a.index for a, _ in race.ranking] == [14, 0]
    assert [row.architecture.index for row in loop.rank(race)[:2]] == [14, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--race", "16"], ["race", "15", "16"]),
        (["--race", "-1"], ["race", "[0,", "-1"]),
        (["--race", "5", "--evaluate-top", "4"], ["race", "4", "5"]),
        (["--race", "2", "--confidence", "1"], ["confidence", "(0, 1)", "1"]),
        (["--race", "2", "--score", "pairs"], ["race", "score must be best", "pairs"]),
    ],
)
def test_bad_settings_are_named(flags, given, words, capsys):
    assert main(flags + given) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
