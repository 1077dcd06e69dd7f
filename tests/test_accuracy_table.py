"""The table of networks trained alone: its Pareto front, in files and in what is printed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import bmsn
from bmsn import ground_truth, retrain
from bmsn.accuracy_table import AccuracyRow, accuracy_rows, describe
from bmsn.correlation import load_truth
from bmsn.retraining import RetrainedRow, Retraining
from bmsn.scheduler import Outcome
from bmsn.space import Architecture
from bmsn.tasks import Images, TaskResult
from bmsn.truth import GroundTruth, GroundTruthConfig, make_task, run_ground_truth
from searching import tiny_images, write_tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")
# By rising MACs, of 40 test images: 1-1-5 is the cheapest, 5-1-1 the dearest.
CORRECT = {"1-1-5": 20, "1-2-4": None, "2-2-3": 30, "3-1-3": 29, "3-2-2": 30, "5-1-1": 31}
FRONT = ["1-1-5", "2-2-3", "5-1-1"]


def task_result(correct: int) -> TaskResult:
    return TaskResult(correct=correct, total=40, loss=0.5, seconds=2.0, device="a CPU", torch="2.13")


@pytest.fixture
def rows() -> list[AccuracyRow[Architecture]]:
    """[1,2,4], of which no network could be trained, is cheap, but on no front."""
    images = Images(spec="npz:a.npz", generator_seed=None, fingerprint="ab" * 32)
    tasks = {slug: make_task(SPACE, SPACE.find(slug), images, 0, bmsn.TrainingSettings()) for slug in CORRECT}
    results = {tasks[slug].name: task_result(correct) for slug, correct in CORRECT.items() if correct is not None}
    architectures = [SPACE.find(slug) for slug in CORRECT]
    return accuracy_rows(SPACE, architectures, tiny_images(), list(tasks.values()), Outcome(results=results, failed={}))


def test_rows_that_no_other_beats_are_on_the_front(rows):
    assert [row.architecture.slug for row in sorted(rows, key=lambda row: row.macs)] == list(CORRECT)
    assert [row.architecture.slug for row in rows if row.pareto] == FRONT


def test_printed_tables_have_stars(rows):
    legend = "*: Pareto front, the 3 that no other is as cheap and more accurate than."
    stars = {str(SPACE.find(slug)) for slug in FRONT}
    truth = GroundTruth(rows=tuple(row for row in rows if row.n), paths=(), failed={})
    table = ground_truth.to_table(truth)
    assert {line.split()[0] for line in table.splitlines() if line.endswith("x*")} == stars
    assert legend in table.splitlines()
    retrained = tuple(
        RetrainedRow(alone=row, searched=None, is_default=row.architecture == SPACE.default) for row in rows
    )
    table = retrain.to_table(Retraining(rows=retrained, failed={}))
    assert {line.split()[0] for line in table.splitlines() if "x* " in line} == stars
    assert legend in table.splitlines()
    ends = {line.index("x") for line in table.splitlines()[1:] if line.startswith("[")}
    assert len(ends) == 1  # columns stand below one another with a star and without


def test_a_table_without_networks_has_no_front(rows):
    row = next(row for row in rows if not row.n)
    table = retrain.to_table(Retraining(rows=(RetrainedRow(alone=row, searched=None, is_default=True),), failed={}))
    assert "*" not in table


def test_the_file_has_the_front_in_its_last_column_and_loads_without_it(tmp_path: Path, monkeypatch):
    def run_tasks(tasks, *arguments):
        found = {
            task.name: task_result(CORRECT[task.architecture] or 0) for task in tasks if task.architecture in CORRECT
        }
        return Outcome(results=found, failed={})

    monkeypatch.setattr("bmsn.truth.run_tasks", run_tasks)
    spec = write_tiny_images(tmp_path / "tiny.npz")
    config = GroundTruthConfig(
        space=SPACE.name, data=spec, seeds=1, out=tmp_path, training=bmsn.TrainingSettings(batch_size=16)
    )
    run_ground_truth(config)
    path = tmp_path / "ground_truth.csv"
    title, *lines = path.read_text().splitlines()
    assert lines[0].split(",")[-1] == "pareto"
    assert [row["stage_depths"] for row in csv.DictReader(lines) if row["pareto"] == "True"] == FRONT
    trained = SPACE.resized(8)  # images of the tiny set
    truth = load_truth(str(path), trained)
    older = tmp_path / "older.csv"
    older.write_text("\n".join([title, *(line.rpartition(",")[0] for line in lines), ""]))
    assert load_truth(str(older), trained) == truth
    assert truth[SPACE.find("5-1-1").index] == 77.5


def test_the_first_line_says_how_the_networks_downsample_and_were_trained():
    space = bmsn.SearchSpace.named("resnet14-cifar10", pool="avg")
    settings = bmsn.TrainingSettings(epochs=7, batch_size=32, milestones=(0.5, 0.75))
    assert describe(space, [4, 5], settings, {"a": task_result(20)}) == (
        "pool avg, seeds 4 to 5, 7 epochs, batch 32, lr 0.1 times 0.1 after 0.5, 0.75 of the training, momentum 0.9, "
        "weight decay 0.001, torch 2.13"
    )
