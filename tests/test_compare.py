"""`python -m bmsn.compare` from end to end: its tables, killed and resumed, and bad input."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import bmsn
from bmsn.command import parse_flags
from bmsn.compare import main
from bmsn.comparison import ComparisonConfig
from bmsn.comparison_files import TIMINGS
from checkpoints import file_size_limit
from searching import write_tiny_images, write_truth

SPACE = bmsn.SearchSpace.named("resnet14-cifar10").resized(8)  # images of the tiny sets
METHODS = "mixture:supernets=2,spos,mixture:supernets=2,refresh_every=2,label=refreshed,random"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The images, and a truth that lacks [2,1,4]."""
    folder = tmp_path_factory.mktemp("compare")
    write_tiny_images(folder / "tiny.npz")
    write_truth(folder / "truth.csv", SPACE, missing="2-1-4")
    return folder


def flags(folder: Path, out: str, **changes: object) -> list[str]:
    settings: dict[str, object] = dict(
        methods=METHODS, space=SPACE.name, data=f"npz:{folder}/tiny.npz", truth=folder / "truth.csv", budget=2, seeds=2,
        settings="batch_size=16", device="cpu", out=folder / out,
    )  # fmt: skip
    settings |= changes
    return [
        str(part)
        for name, value in settings.items()
        if value is not None
        for part in ("--" + name.replace("_", "-"), value)
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bmsn.compare", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def tables(out: Path) -> tuple[list[dict[str, str]], str, dict]:
    """All that a comparison writes, without the times."""
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()[1:]))
    content = json.loads((out / "comparison.json").read_text())
    del content["timings"]
    return (
        [{name: cell for name, cell in row.items() if name not in TIMINGS} for row in rows],
        (out / "paired.csv").read_text(),
        content,
    )


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Path, str]:
    process = start(flags(folder, "finished"))
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder / "finished", printed


def test_the_tables_hold_what_searches_reach(finished, folder):
    """Against one search run alone, whose own comparison with the truth the loop computes."""
    out, printed = finished
    rows, _, content = tables(out)
    labels = ["mixture:supernets=2", "spos", "refreshed", "random", "macs"]
    assert [row["method"] for row in rows] == labels
    results = [
        bmsn.run_search(bmsn.SearchConfig(
            space=SPACE.name, data=f"npz:{folder}/tiny.npz", method="mixture", supernets=2, refresh_every=2, epochs=2,
            batch_size=16, device="cpu", fast_eval=True, seed=seed, truth=str(folder / "truth.csv"),
        ))
        for seed in (0, 1)
    ]  # fmt: skip
    runs = [run for run in content["runs"] if run["method"] == "refreshed"]
    for run, result in zip(runs, results, strict=True):
        expected = result.truth["ranking"]
        assert run["pick"] == result.best.architecture.slug
        assert run["n"] == expected["n"] == 14
        for name in ("kendall_tau_b", "spearman", "partial_kendall", "regret_top1", "regret_top3", "regret_top5"):
            assert run["figures"][name] == pytest.approx(expected[name])
        assert run["cost"] == result.cost
    row = rows[2]
    assert float(row["kendall_tau_b"]) == pytest.approx(
        np.mean([result.truth["ranking"]["kendall_tau_b"] for result in results]), abs=1e-4
    )
    assert int(row["training_images"]) == 2 * 4 * 16  # epochs, steps, batch
    assert "without a row in the truth: 2-1-4" in printed
    assert "Figures over 14 of 15 architectures" in printed
    paired = list(csv.DictReader((out / "paired.csv").read_text().splitlines()[1:]))
    assert [(row["baseline"], row["method"]) for row in paired] == [
        *(("spos", label) for label in labels if label != "spos"),
        *(("macs", label) for label in labels if label != "macs"),
    ]


def test_what_is_finished_is_not_run_again(finished, folder, capsys):
    out, printed = finished
    stamps = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/result.json")}
    assert len(stamps) == 10
    assert main(flags(folder, "finished")) == 0
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/result.json")} == stamps


def test_what_reproduces_it_is_kept(finished, folder):
    """The command, as a shell reads it, gives the same settings; versions and machine are those of the searches."""
    content = json.loads((finished[0] / "comparison.json").read_text())
    words = shlex.split(content["command"])
    assert words[:3] == ["python", "-m", "bmsn.compare"]
    given, again = (
        parse_flags(tyro.conf.OmitArgPrefixes[ComparisonConfig], "compare", arguments)
        for arguments in (flags(folder, "finished"), [*words[3:], "--out", str(finished[0])])
    )
    assert (again.resources.device, given) == ("cpu", again)
    assert content["environment"]["torch"] == [torch.__version__]
    assert content["environment"]["threads"] == [1]


@pytest.mark.parametrize("size", [100, 4000], ids=["comparison.csv", "comparison.json"])
def test_a_full_disk_stops_it_with_one_line(size, request, finished, folder, capsys):
    out, printed = finished
    with file_size_limit(size):
        assert main(flags(folder, "finished")) == 3
    name = out / request.node.callspec.id
    assert capsys.readouterr() == (
        "", f"python -m bmsn.compare: stopped: {name}: File too large; what was finished before is kept\n"
    )  # fmt: skip
    assert main(flags(folder, "finished")) == 0
    assert capsys.readouterr().out == printed


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(finished, folder):
    """Killed while a search is under way, which leaves an unfinished run folder; two workers, for once, go on."""
    out = folder / "killed"
    process = start(flags(folder, "killed"))
    while process.poll() is None:
        begun = {path.parent.name for path in out.glob("runs/*/config.yaml")}
        done = {path.parent.name for path in out.glob("runs/*/result.json")}
        if len(done) >= 3 and begun - done:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert 3 <= len(done) < 10
    assert not (out / "comparison.csv").exists()
    process = start(flags(folder, "killed", workers=2))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert tables(out) == tables(finished[0])
    assert not list(out.glob("runs/*.claim"))


def test_budgets_are_drawn(folder, capsys):
    code = main(flags(folder, "budgets", methods="random,random:label=again", budget=None, budgets="1,3"))
    assert code == 0
    out = folder / "budgets"
    rows, _, _ = tables(out)
    assert [(row["budget"], row["method"]) for row in rows] == [
        (budget, label) for budget in ("1", "3") for label in ("random", "again", "macs")
    ]
    assert len(list((out / "runs").glob("*/result.json"))) == 8  # two labels of the same settings are one search
    assert (out / "budgets.svg").exists()
    assert (out / "budgets.png").exists()
    assert "Budget: 3 epochs" in capsys.readouterr().out


def test_a_number_of_supernets_is_for_those_that_take_one(folder):
    settings = "batch_size=16,supernets=3"
    assert main(flags(folder, "three", methods="mixture,spos,few-shot", seeds=1, settings=settings)) == 0
    configs = [json.loads(path.read_text())["config"] for path in (folder / "three" / "runs").glob("*/result.json")]
    assert {config["method"]: config["supernets"] for config in configs} == {
        "mixture": 3, "spos": 1, "few-shot": 5, "macs": 1,
    }  # fmt: skip


def test_a_limit_on_macs_holds_for_all_methods(folder):
    """Also where the default itself is above it: then what is within the limit is within its MACs."""
    assert main(flags(folder, "limit", methods="random,few-shot", seeds=1, settings="batch_size=16,max_macs=0.9x")) == 0
    _, _, content = tables(folder / "limit")
    allowed = sum(SPACE.macs(a, num_classes=4) <= 0.9 * SPACE.macs(SPACE.default, num_classes=4) for a in SPACE)
    for run in content["runs"]:
        assert run["n"] == allowed - 1  # the truth lacks [2,1,4]
        assert run["figures"]["macs_ratio"] <= 0.9
        assert run["pick_within_macs"] == run["pick"]


def test_a_run_of_another_schema_or_damaged_is_named(folder, capsys):
    assert main(flags(folder, "newer", methods="random", seeds=1)) == 0
    capsys.readouterr()
    (path,) = (folder / "newer" / "runs").glob("random-*/result.json")
    content = json.loads(path.read_text())
    for text, message in [
        (json.dumps(content | {"schema_version": 99}), "got 99"),
        (path.read_text()[:50], "not a result of bmsn.search"),
    ]:
        path.write_text(text)
        assert main(flags(folder, "newer", methods="random", seeds=1)) == 2
        err = capsys.readouterr().err
        assert f"{path}: " in err
        assert message in err


def test_bad_input(folder, capsys, monkeypatch):
    other = folder / "other.csv"
    other.write_text("stage_depths,accuracy_mean\n4-3-3,90\n")
    for changes, message in [
        (dict(methods="mixture,magic"), "method 'magic' is unknown"),
        (dict(methods="spos:supernets=2"), "method spos:supernets=2: supernets must be 1 for method spos"),
        (dict(methods="random:refresh_every=5"), "refresh_every does not fit method random"),
        (
            dict(methods="random,gaea", settings="batch_size=16,max_macs=1x"),
            "method gaea: settings max_macs does not fit it",
        ),
        (dict(methods="mixture:race=40"), "method mixture:race=40: race must be at most 15"),
        (dict(methods="mixture:supernets=0"), "supernets must be in [1, 4096]; got 0"),
        (dict(settings="batch_size"), "settings must be name=value,name=value; got 'batch_size'"),
        (dict(settings="batch_size=500"), "batch_size"),
        (dict(budget=None), "budget or budgets must be given"),
        (dict(budget=0), "budget must be in [1, 1000000] epochs; got 0"),
        (dict(budgets="1,x"), "budgets must be whole numbers of epochs"),
        (dict(seeds=0), "seeds must be in [1, 10000]; got 0"),
        (dict(baseline="darts2"), "baseline must be among mixture:supernets=2, spos, refreshed, random, macs; got 'da"),
        (dict(truth=other), "architecture (4, 3, 3) is not in resnet14-cifar10"),
        (dict(truth="paper"), "truth 'paper' is published for resnet20-cifar10 only"),
        (dict(data=f"npz:{folder}/none.npz"), "does not exist"),
    ]:
        try:
            code = main(flags(folder, "bad", **changes))
        except SystemExit as stopped:  # found while the flags are read
            code = stopped.code
        captured = capsys.readouterr()
        assert code == 2, changes
        assert message in " ".join((captured.err + captured.out).replace("│", " ").split()), changes
    assert not (folder / "bad").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(flags(folder, "bad", methods="random", budgets="1,2")) == 2
    assert "budgets needs the matplotlib package: pip install 'bmsn[report]'" in capsys.readouterr().err


def test_a_search_that_fails_is_listed_and_the_rest_kept(folder, monkeypatch):
    """A loss that is not finite 20 times in a row stops that search alone."""
    config = bmsn.ComparisonConfig(
        methods="spos:lr=100,min_lr=100,momentum=1.0,label=wild,random", space=SPACE.name,
        data=f"npz:{folder}/tiny.npz", truth=str(folder / "truth.csv"), budget=12, seeds=1,
        settings="batch_size=16,weight_decay=1", out=folder / "wild", resources=bmsn.Resources(device="cpu"),
    )  # fmt: skip
    comparison = bmsn.run_comparison(config)
    assert [row.label for row in comparison.rows] == ["random", "macs"]
    assert list(comparison.failed) == ["wild, 12 epochs, seed 0"]
    assert "not finite" in comparison.failed["wild, 12 epochs, seed 0"]
