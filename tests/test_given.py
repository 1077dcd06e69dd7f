"""Images and spaces that `run_search` is given in a call: what is stored of them, and what can be done with the run."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import bmsn
from bmsn.comparison import _make_searches
from bmsn.correlation import load_truth
from bmsn.exporting_sources import Source, retrained
from bmsn.interference import InterferenceConfig, run_interference
from bmsn.reporting import write_report
from bmsn.reporting_run import read_runs
from bmsn.scheduler import Outcome
from bmsn.search import main
from bmsn.tasks import Images, Place, TaskResult
from html_pages import HtmlPage, do_not_draw
from searching import tiny_images, write_tiny_images, write_truth

QUICK = dict(supernets=2, epochs=2, batch_size=16, device="cpu", fast_eval=True)
SPACE = bmsn.SearchSpace(5, 2, [4, 4, 8, 8, 8], pool="avg", image_size=8, name="mine", default=[1, 2, 2])


def test_given_images_have_the_defaults_of_other_data(tmp_path, monkeypatch):
    stop = iter([True])  # before the first step: settings are all that is looked at
    with pytest.raises(bmsn.Interrupted):
        bmsn.run_search(
            bmsn.SearchConfig(space="resnet14-cifar10", device="cpu", batch_size=16, out=tmp_path / "run"),
            tiny_images(), should_stop=lambda: next(stop),
        )  # fmt: skip
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    found = [stored[name] for name in ("data", "supernets", "epochs", "score")]
    assert found == ["given:tiny", 4, 400, "best"]
    with pytest.raises(bmsn.InputError, match="space must be given for data 'given:tiny'"):
        bmsn.run_search(bmsn.SearchConfig(), tiny_images())


def test_without_images_the_built_in_set_is_searched(monkeypatch):
    for config in (bmsn.SearchConfig(), bmsn.SearchConfig(data="synthetic")):
        filled = config.filled()
        assert (filled.data, filled.space, filled.supernets, filled.epochs) == ("synthetic", "resnet14-cifar10", 2, 36)


def test_data_that_config_names_keep_their_name():
    result = bmsn.run_search(
        bmsn.SearchConfig(data="npz:mine", method="macs", batch_size=16), tiny_images(), space=SPACE
    )
    assert result.config["data"] == "npz:mine"


def test_a_run_of_given_images_goes_on_when_they_are_passed_again(tmp_path, capsys):
    config = bmsn.SearchConfig(space=SPACE.spec, out=tmp_path / "run", **QUICK)
    steps = itertools.count()
    with pytest.raises(bmsn.Interrupted):
        bmsn.run_search(config, tiny_images(), should_stop=lambda: next(steps) == 1)
    assert main(["--resume", "--out", str(config.out)]) == 2
    message = capsys.readouterr().err
    assert "given:tiny stands for images that were passed to run_search" in message
    assert "pass them again" in message
    with pytest.raises(bmsn.InputError, match="has changed since the run was saved"):
        bmsn.run_search(replace(config, resume=True), tiny_images(seed=1))
    result = bmsn.run_search(replace(config, resume=True), tiny_images())
    assert result.ranking == bmsn.run_search(replace(config, out=None), tiny_images()).ranking
    assert main(["--resume", "--out", str(config.out)]) == 0  # finished: shown without them
    assert main(["--config", str(tmp_path / "run" / "config.yaml")]) == 2
    with pytest.raises(bmsn.InputError, match="search with data=npz:FILE"):
        bmsn.run_retraining(bmsn.RetrainConfig(run=tmp_path / "run", top=1))


def test_interference_says_that_images_were_given():
    config = InterferenceConfig(space=SPACE.spec, epochs=1, batch_size=16, device="cpu")
    assert run_interference(config, tiny_images()).config["data"] == "given:tiny"


def own_search(folder: Path) -> bmsn.SearchConfig:
    spec = write_tiny_images(folder / "tiny.npz")
    return bmsn.SearchConfig(data=spec, out=folder / "run", **QUICK)


def test_a_space_of_ones_own_is_searched_and_opened_again(tmp_path, capsys):
    config = own_search(tmp_path)
    steps = itertools.count()
    with pytest.raises(bmsn.Interrupted):
        bmsn.run_search(config, space=SPACE, should_stop=lambda: next(steps) == 1)
    other = bmsn.SearchSpace(5, 2, [4, 4, 8, 8, 16], pool="avg", image_size=8, name="mine")
    with pytest.raises(bmsn.InputError, match="is a run with another configuration: space: "):
        bmsn.run_search(replace(config, resume=True), space=other)
    assert main(["--resume", "--out", str(config.out)]) == 0  # the stored space is enough
    assert "Best: [" in capsys.readouterr().out
    path = tmp_path / "run" / "result.json"
    result = bmsn.SearchResult.from_json(path.read_text(), str(path))
    assert {row.architecture for row in result.ranking} == set(SPACE)
    data = tiny_images()
    macs = {row.architecture: row.macs for row in result.ranking}
    assert macs == {a: SPACE.macs(a, num_classes=data.num_classes) for a in SPACE}
    assert {row.macs_ratio for row in result.ranking if row.architecture == SPACE.find("1,2,2")} == {1.0}
    assert result.ranking == bmsn.run_search(replace(config, out=None), space=SPACE).ranking
    (run,) = read_runs([tmp_path / "run"])
    assert run.space.arguments() == SPACE.arguments()

    with pytest.raises(bmsn.InputError, match=r"\(1, 1, 1\) is not in mine: expected 3 stage depths"):
        bmsn.run_export(bmsn.ExportConfig(run=tmp_path / "run", architecture="1,1,1", from_supernet=True))
    training = bmsn.TrainingSettings(epochs=1, batch_size=16)
    resources = bmsn.Resources(device="cpu")
    bmsn.run_retraining(
        bmsn.RetrainConfig(run=tmp_path / "run", top=1, seeds=1, training=training, resources=resources)
    )
    lines = (tmp_path / "run" / "retrain.csv").read_text().splitlines()
    assert lines[0].startswith("# mine trained alone")
    rows = {row["stage_depths"]: row for row in csv.DictReader(lines[1:])}
    assert rows["1-2-2"]["parameters"] == str(SPACE.num_parameters(num_classes=4))
    images = Images(spec=result.config["data"], generator_seed=None, fingerprint=result.data["fingerprint"])
    source = Source(
        run=tmp_path / "run", result=result, space=SPACE, architecture=SPACE.default, images=images,
        device=torch.device("cpu"),
    )  # fmt: skip
    described = retrained(source, None)[2]  # found by the space's spec
    assert f"{described['accuracy']['percent']:.3f}" == rows["1-2-2"]["accuracy_mean"]


def test_how_a_space_is_given(tmp_path, capsys):
    data = tiny_images()
    quick = bmsn.SearchConfig(method="macs", batch_size=16)  # trains nothing
    scaled = bmsn.SearchSpace.named("resnet14-cifar10", 0.25, pool="stride")
    for config, space, expected in (
        (quick, scaled, scaled),
        (quick, bmsn.SearchSpace.named("resnet14-cifar10", pool="avg"), None),
        (replace(quick, pool="max"), SPACE, bmsn.SearchSpace.named(SPACE.spec, pool="max")),
        (replace(quick, space=SPACE.spec), SPACE, SPACE),
    ):
        result = bmsn.run_search(config, data, space=space)
        stored = bmsn.SearchSpace.named(result.config["space"], pool=result.config["pool"])
        assert stored.arguments() == (expected or space).arguments()
    assert result.config["space"].startswith("{")
    with pytest.raises(bmsn.InputError, match="space is given twice: resnet14-cifar10 in config, and mine"):
        bmsn.run_search(replace(quick, space="resnet14-cifar10"), data, space=SPACE)
    with pytest.raises(bmsn.InputError, match="a whole space is needed; got 2 of its architectures"):
        bmsn.run_search(quick, data, space=SPACE.restricted(SPACE[:2]))
    spec = write_tiny_images(tmp_path / "tiny.npz")
    assert main(["--data", spec, "--space", SPACE.spec, "--method", "macs", "--batch-size", "16"]) == 0
    assert f"Best: {result.best.architecture} " in capsys.readouterr().out


def test_methods_are_compared_in_a_space_of_ones_own(tmp_path):
    config = bmsn.ComparisonConfig(
        methods="macs", space=SPACE.spec, data="npz:mine", budget=1, seeds=1, truth="t.csv", settings="batch_size=16",
        out=tmp_path,
    )  # fmt: skip
    (search,) = _make_searches(config, SPACE, tiny_images()).values()
    assert search.task.config.space == SPACE.spec


def test_a_space_of_ones_own_can_be_made_again_from_what_a_comparison_leaves(tmp_path, monkeypatch):
    """In its JSON file and in its report, where the text has the name."""
    place = Place(torch.device("cpu"), {})

    def perform(tasks, *arguments) -> Outcome:
        return Outcome(results={task.name: task.perform(place, lambda share: None) for task in tasks}, failed={})

    monkeypatch.setattr("bmsn.comparison.run_tasks", perform)
    do_not_draw(monkeypatch)
    write_truth(tmp_path / "truth.csv", SPACE, missing="")
    config = bmsn.ComparisonConfig(
        methods="macs", space=SPACE.spec, data=write_tiny_images(tmp_path / "tiny.npz"), budget=1, seeds=1,
        truth=str(tmp_path / "truth.csv"), settings="batch_size=16", out=tmp_path / "compare",
    )  # fmt: skip
    bmsn.run_comparison(config)
    stored = json.loads((config.out / "comparison.json").read_text())
    assert stored["space"] == config.space
    assert (config.out / "comparison.csv").read_text().startswith(f"# mine on {config.data}")
    page = HtmlPage.read(write_report([config.out], tmp_path / "report.html"))
    assert f"mine on {config.data} against the truth" in page.text
    assert f"space: '{config.space}'" in page.text


def test_a_space_of_ones_own_can_be_made_again_from_its_ground_truth(tmp_path, monkeypatch):
    result = TaskResult(correct=30, total=40, loss=0.5, seconds=0.01, device="a CPU", torch="2.13")
    monkeypatch.setattr(
        "bmsn.truth.run_tasks",
        lambda tasks, *arguments: Outcome(results={task.name: result for task in tasks}, failed={}),
    )
    bmsn.run_ground_truth(bmsn.GroundTruthConfig(
        space=SPACE.spec, data=write_tiny_images(tmp_path / "tiny.npz"), seeds=1, out=tmp_path / "truth",
        training=bmsn.TrainingSettings(epochs=1, batch_size=16),
    ))  # fmt: skip
    file = tmp_path / "truth" / "ground_truth.csv"
    assert file.read_text().startswith(f"# {SPACE.spec} trained alone")
    assert set(load_truth(str(file), SPACE).values()) == {75.0}
