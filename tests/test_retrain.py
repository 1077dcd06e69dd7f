"""Retraining from a search's folder: what is trained, on which images, its table, and folders that cannot be used."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bmsn
from bmsn.retrain import main
from bmsn.standalone import train_alone
from checkpoints import file_size_limit
from searching import run, start, tiny_images, write_tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")
TRAINING = ["--epochs", "2", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_tiny_images(tmp_path_factory.mktemp("data") / "tiny.npz")


def search(spec: str, folder: Path) -> bmsn.SearchResult:
    config = bmsn.SearchConfig(
        space=SPACE.name, data=spec, supernets=1, epochs=1, batch_size=16, device="cpu", fast_eval=True, out=folder
    )
    return bmsn.run_search(config)


@pytest.fixture
def folder(spec, tmp_path) -> Path:
    search(spec, tmp_path / "run")
    return tmp_path / "run"


def table(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "retrain.csv").read_text().splitlines()
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines[1:])]


def ranking(folder: Path) -> list[dict]:
    return json.loads((folder / "result.json").read_text())["ranking"]


def test_the_best_are_trained_on_both_halves_with_the_default_beside_them(folder, capsys):
    assert main([str(folder), "--top", "2", "--seeds", "2", *TRAINING]) == 0
    printed = capsys.readouterr().out
    rows, ranked = table(folder), ranking(folder)
    default = next(row for row in ranked if row["architecture"] == "3-2-2")
    wanted = [row for row in ranked if row["rank"] <= 2 or row is default]
    assert [row["stage_depths"] for row in rows] == [row["architecture"] for row in wanted]
    assert [row["search_rank"] for row in rows] == [str(row["rank"]) for row in wanted]
    assert [row["search_accuracy"] for row in rows] == [f"{100 * row['accuracy']:.3f}" for row in wanted]
    assert [row["is_default"] for row in rows] == [str(int(row is default)) for row in wanted]

    training = bmsn.TrainingSettings(epochs=2, batch_size=16)
    threads = torch.get_num_threads()  # what its one worker had
    architecture = SPACE.find(rows[0]["stage_depths"])
    reached = [
        train_alone(SPACE, architecture, tiny_images(), training, seed=seed, device=torch.device("cpu")).accuracy
        for seed in (0, 1)
    ]
    assert torch.get_num_threads() == threads
    assert rows[0]["accuracy_mean"] == f"{np.mean(reached):.3f}"
    assert rows[0]["accuracy_std"] == f"{np.std(reached, ddof=1):.3f}"
    assert rows[0]["n"] == "2"
    line = next(line for line in printed.splitlines() if line.startswith(str(architecture)))
    assert f"{np.mean(reached):.2f} ± {np.std(reached, ddof=1):.2f}" in line
    difference = np.mean(reached) - float(next(row for row in rows if row["is_default"] == "1")["accuracy_mean"])
    assert f"{difference:+.2f}" in line or architecture == SPACE.default
    assert sum("default" in line for line in printed.splitlines()[1:]) == 1

    # what is trained already serves another choice
    before = {path.name for path in (folder / "retrain").iterdir()}
    assert main([str(folder), "--architecture", rows[0]["stage_depths"], "[3,2,2]", "--seeds", "1", *TRAINING]) == 0
    assert {path.name for path in (folder / "retrain").iterdir()} == before
    assert {row["stage_depths"] for row in table(folder)} == {rows[0]["stage_depths"], "3-2-2"}
    assert {row["accuracy_std"] for row in table(folder)} == {""}


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(folder, tmp_path):
    command = ["faulty_networks.py", "retrain", str(folder), "-", str(folder), "--top", "4", "--seeds", "2", *TRAINING]
    process = start(*command)
    while len(list((folder / "retrain").glob("*.json"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "retrain.csv").exists()
    code, printed, err = run(*command)
    assert code == 0, err
    resumed = table(folder)
    for path in (folder / "retrain").glob("*.json"):
        path.unlink()
    assert run(*command)[:2] == (0, printed)
    assert table(folder) == resumed


def test_a_full_disk_stops_it_with_one_line(folder, capsys):
    """Weights that do not fit: no network is trained again and again only to be lost. Then the table."""
    flags = [str(folder), "--architecture", "3,2,2", "--seeds", "1", *TRAINING]
    with file_size_limit(1000):
        assert main(flags) == 3
    err = capsys.readouterr().err
    assert err.endswith(".npz: File too large; what was finished before is kept\n")
    assert "attempt" not in err
    assert main(flags) == 0
    done = {path: path.stat().st_mtime_ns for path in (folder / "retrain").iterdir()}
    with file_size_limit(100):
        assert main(flags) == 3
    assert capsys.readouterr().err.endswith(
        f"stopped: {folder / 'retrain.csv'}: File too large; what was finished before is kept\n"
    )
    assert {path: path.stat().st_mtime_ns for path in (folder / "retrain").iterdir()} == done


def test_networks_that_fail_are_listed(folder):
    """The loss of every one: exit code 3, and a table that says so."""
    code, printed, err = run(
        "faulty_networks.py", "retrain", str(folder), "nan:3-2-2:0:9",
        str(folder), "--architecture", "3,2,2", "--seeds", "1", *TRAINING,
    )  # fmt: skip
    assert code == 3
    assert "failed: [3,2,2] seed 0: the loss is not finite" in err
    assert table(folder)[0]["accuracy_mean"] == ""
    assert printed.splitlines()[1].split() == [
        "[3,2,2]",
        "-",
        "-",
        "0",
        "1.00x",
        table(folder)[0]["search_rank"],
        "default",
    ]


def test_folders_and_settings_that_cannot_be_used(spec, folder, tmp_path, capsys):
    def refused(folder: str, *flags: str) -> str:
        try:
            code = main([folder, *TRAINING, *flags])
        except SystemExit as stopped:  # found while the flags are read
            code = stopped.code
        captured = capsys.readouterr()
        assert code == 2
        return " ".join((captured.err + captured.out).replace("│", " ").split())

    run_folder = str(folder)
    assert "top must be in [1, 15], the architectures of resnet14-cifar10; got 16" in refused(run_folder, "--top", "16")
    assert "top must be in [1, 15]" in refused(run_folder, "--top", "0")
    assert "architecture (4, 3, 3) is not in resnet14-cifar10" in refused(run_folder, "--architecture", "4,3,3")
    assert "one of top and architecture must be given" in refused(run_folder)
    assert "one of top and architecture must be given" in refused(run_folder, "--top", "1", "--architecture", "3,2,2")
    assert "seeds must be in" in refused(run_folder, "--top", "1", "--seeds", "0")
    assert "batch_size must be in 2..128" in refused(run_folder, "--top", "1", "--batch-size", "1000")
    assert "holds no run of bmsn.search" in refused(str(tmp_path), "--top", "1")

    result = folder / "result.json"
    whole = result.read_text()
    result.write_text(json.dumps(json.loads(whole) | {"schema_version": 99}))
    assert "schema_version must be in 2..4; got 99" in refused(run_folder, "--top", "1")
    result.write_text(whole[:100])
    assert "not a result of bmsn.search" in refused(run_folder, "--top", "1")
    result.unlink()
    assert "the search is not finished" in refused(run_folder, "--top", "1")
    assert f"python -m bmsn.search --resume --out {run_folder}" in refused(run_folder, "--top", "1")
    result.write_text(whole)
    moved = json.loads(whole)
    moved["config"]["data"] = write_tiny_images(tmp_path / "other.npz", seed=5)
    result.write_text(json.dumps(moved))
    assert "it is not the set that was asked for" in refused(run_folder, "--top", "1")
    assert not (folder / "retrain").exists()


def test_a_path_outside_the_space_is_trained_beside_the_default(folder, capsys):
    """As methods over resolutions find them; the path of an architecture is that architecture, in its place."""
    flags = ["--architecture", "0-1-0-2-2-1-1", "0-0-1-1-1-2-2", "--seeds", "1"]
    assert main([str(folder), *flags, *TRAINING]) == 0
    printed = capsys.readouterr().out
    rows = {row["stage_depths"]: row for row in table(folder)}
    assert set(rows) == {"2-3-2", "3-2-2", "0-1-0-2-2-1-1"}
    assert list(rows)[-1] == "0-1-0-2-2-1-1"
    path = rows["0-1-0-2-2-1-1"]
    assert path["search_rank"] == path["search_accuracy"] == ""
    assert float(path["accuracy_mean"]) >= 0
    assert path["n"] == "1"
    line = next(line for line in printed.splitlines() if line.startswith("0-1-0-2-2-1-1"))
    assert f"{int(path['macs']) / int(rows['3-2-2']['macs']):.2f}x" in line
    assert main([str(folder), "--architecture", "0-1-3-2-2-1-1", *TRAINING]) == 2
    assert "expected 7 resolutions in 0..2" in capsys.readouterr().err
