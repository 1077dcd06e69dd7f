"""Ground truth: its table, and that nothing which dies, hangs or is shared changes it."""

from __future__ import annotations

import csv
import functools
import os
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import bmsn
import bmsn.executors
import bmsn.tasks
import bmsn.truth
from bmsn.correlation import load_truth, load_truth_of_paths
from bmsn.data.synthetic import generate_synthetic
from bmsn.ground_truth import main
from bmsn.scheduler import Outcome
from bmsn.standalone import train_alone
from checkpoints import file_size_limit
from searching import run, start, tiny_images, write_tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10").resized(8)  # images of the tiny sets
TRAINING = bmsn.TrainingSettings(epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_tiny_images(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def flags(spec) -> list[str]:
    return [
        "--space",
        SPACE.name,
        "--data",
        spec,
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--batch-size",
        "16",
        "--device",
        "cpu",
    ]


def command(folder: Path, flags: list[str], *more: str, faults: str = "-") -> list[str]:
    folder.mkdir(exist_ok=True)
    return ["faulty_networks.py", "ground_truth", str(folder), faults, *flags, "--out", str(folder), *more]


def table(folder: Path) -> list[dict[str, str]]:
    """Rows of the CSV file without the time, which no two runs share."""
    lines = (folder / "ground_truth.csv").read_text().splitlines()
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines[1:])]


def trained(folder: Path) -> list[str]:
    """The networks that were begun, as 1-1-5:0, in order."""
    return [line.split()[1] for line in (folder / "trained.log").read_text().splitlines()]


def claims(folder: Path) -> list[Path]:
    return list((folder / "tasks").glob("*.claim"))


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished") / "truth"
    code, printed, err = run(*command(folder, flags))
    assert code == 0, err
    return folder, printed


def test_the_table_holds_what_the_networks_reach(finished):
    folder, printed = finished
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [
            train_alone(SPACE, SPACE[3], tiny_images(), TRAINING, seed=seed, device=torch.device("cpu")).accuracy
            for seed in (0, 1)
        ]
    finally:
        torch.set_num_threads(threads)
    rows = table(folder)
    assert [row["stage_depths"] for row in rows] == [a.slug for a in SPACE]
    accuracy, macs = (np.array([float(row[name]) for row in rows]) for name in ("accuracy_mean", "macs"))
    beaten = [
        np.any((accuracy >= a) & (macs <= m) & ((accuracy > a) | (macs < m)))
        for a, m in zip(accuracy, macs, strict=True)
    ]
    assert rows[3] == {
        "stage_depths": "1-4-2",
        "accuracy_mean": f"{np.mean(alone):.3f}",
        "accuracy_std": f"{np.std(alone, ddof=1):.3f}",
        "n": "2",
        "macs": str(SPACE.macs(SPACE[3], num_classes=4)),
        "macs_ratio": f"{SPACE.macs(SPACE[3], num_classes=4) / SPACE.macs(SPACE.default, num_classes=4):.3f}",
        "parameters": str(sum(p.numel() for p in bmsn.build_network(SPACE, SPACE[3], 4).parameters())),
        "pareto": str(not beaten[3]),
    }
    assert [row["pareto"] for row in rows] == [str(not each) for each in beaten]
    truth = load_truth(str(folder / "ground_truth.csv"), SPACE)
    assert len(truth) == 15
    line = next(line for line in printed.splitlines() if line.startswith("[1,4,2]"))
    assert line.split()[1:] == [
        f"{np.mean(alone):.2f}",
        "±",
        f"{np.std(alone, ddof=1):.2f}",
        "2",
        "0.73x" if beaten[3] else "0.73x*",
    ]
    assert truth[3] == pytest.approx(np.mean(alone), abs=1e-3)
    assert "tau-b of a ranking by MACs alone" in printed
    assert "pool max, seeds 0 to 1, 2 epochs, batch 16" in (folder / "ground_truth.csv").read_text().splitlines()[0]
    assert sorted(trained(folder)) == sorted(f"{a.slug}:{seed}" for a in SPACE for seed in (0, 1))
    assert not claims(folder)


def test_what_is_finished_is_not_done_again(finished, flags):
    folder, printed = finished
    begun = len(trained(folder))
    assert run(*command(folder, flags)) == (0, printed, "")
    assert len(trained(folder)) == begun
    assert len(list((folder / "tasks").glob("*.json"))) == 30


def test_a_full_disk_stops_it_with_one_line_and_nothing_is_lost(finished, flags, tmp_path, capsys):
    """The table does not fit, and in a folder of its own not even the first claim."""
    folder = tmp_path / "truth"
    shutil.copytree(finished[0], folder)
    (folder / "ground_truth.csv").unlink()
    kept = "File too large; what was finished before is kept\n"
    with file_size_limit(100):
        assert main([*flags, "--out", str(folder)]) == 3
    assert capsys.readouterr().err.endswith(f"stopped: {folder / 'ground_truth.csv'}: {kept}")
    assert main([*flags, "--out", str(folder)]) == 0
    assert table(folder) == table(finished[0])
    with file_size_limit(10):
        assert main([*flags, "--out", str(tmp_path / "other")]) == 3
    assert capsys.readouterr().err.endswith(f".claim: {kept}")
    assert not claims(tmp_path / "other")


def test_the_table_is_over_the_seeds_that_the_command_names(finished, flags, tmp_path, monkeypatch):
    """Two machines with a seed each, whose results are copied into one folder: no network is trained again."""

    def copy_tasks(pattern: str, source: Path, to: Path) -> None:
        (to / "tasks").mkdir(parents=True, exist_ok=True)
        for path in (source / "tasks").glob(pattern):
            shutil.copy(path, to / "tasks")

    def ground_truth(folder: Path, *seeds: str) -> str:
        assert main([*flags, "--out", str(folder), *seeds]) == 0
        return (folder / "ground_truth.csv").read_text()

    whole = (finished[0] / "ground_truth.csv").read_text()
    monkeypatch.setattr("bmsn.worker.Worker.begin", lambda worker, task: pytest.fail(f"{task.label} is trained"))
    one, other = tmp_path / "one", tmp_path / "other"
    copy_tasks("*-seed0-*.json", finished[0], one)
    copy_tasks("*-seed1-*.json", finished[0], other)
    ground_truth(one, "--seeds", "1")
    second = ground_truth(other, "--first-seed", "1", "--seeds", "1")
    assert {row["n"] for row in table(one)} == {row["n"] for row in table(other)} == {"1"}
    for a, b, both in zip(table(one), table(other), table(finished[0]), strict=True):
        mean = (float(a["accuracy_mean"]) + float(b["accuracy_mean"])) / 2
        assert float(both["accuracy_mean"]) == pytest.approx(mean, abs=1e-3)
    assert "seeds 1 to 1, " in second.splitlines()[0]
    copy_tasks("*.json", one, other)
    assert ground_truth(other, "--first-seed", "1", "--seeds", "1") == second
    assert ground_truth(other, "--seeds", "2") == whole


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(finished, flags, tmp_path):
    folder = tmp_path / "truth"
    process = start(*command(folder, flags))
    while len(list((folder / "tasks").glob("*.json"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "tasks").glob("*.json")}
    assert 4 <= len(done) < 30
    code, _, err = run(*command(folder, flags))
    assert code == 0, err
    assert {name: (folder / "tasks" / name).stat().st_mtime_ns for name in done} == done
    assert table(folder) == table(finished[0])
    assert 30 <= len(trained(folder)) <= 31  # the one that was under way began twice
    assert not claims(folder)


def test_what_crashes_or_hangs_is_tried_again_and_listed_if_in_vain(finished, flags, tmp_path):
    folder = tmp_path / "truth"
    faults = "crash:5-1-1:0:1,hang:4-2-1:0:1,raise:1-2-4:1:9,nan:1-3-3:0:9"
    code, _, err = run(*command(folder, flags, "--workers", "2", "--timeout", "10", faults=faults))
    assert code == 3, err
    counts = {network: trained(folder).count(network) for network in trained(folder)}
    several = {network: count for network, count in counts.items() if count > 1}
    assert several == {"5-1-1:0": 2, "4-2-1:0": 2, "1-2-4:1": 3}  # a loss that is NaN would be NaN again
    listed = [line.split("failed: ", 1)[1] for line in err.splitlines() if ": failed: " in line]
    assert listed == ["[1,3,3] seed 0: the loss is not finite", "[1,2,4] seed 1: RuntimeError: out of luck"]
    assert "[5,1,1] seed 0: attempt 1 of 3 failed: the process ended with exit code -9" in err
    assert "[4,2,1] seed 0: attempt 1 of 3 failed: hung: no result after 10 s" in err
    rows, whole = table(folder), table(finished[0])
    assert [row["n"] for row in rows[:4]] == ["2", "1", "1", "2"]
    assert [rows[0], *rows[3:]] == [whole[0], *whole[3:]]
    assert not claims(folder)
    code, _, err = run(*command(folder, flags))
    assert code == 0, err
    assert table(folder) == whole


def test_two_processes_share_a_folder(finished, flags, tmp_path):
    folder = tmp_path / "truth"
    processes = [start(*command(folder, flags)) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert table(folder) == table(finished[0])
    lines = [line.split() for line in (folder / "trained.log").read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 2
    assert sorted(network for _, network in lines) == sorted(f"{a.slug}:{seed}" for a in SPACE for seed in (0, 1))


def test_a_signal_ends_it_with_its_processes(flags, tmp_path):
    folder = tmp_path / "truth"
    process = start(*command(folder, flags, faults="hang:5-1-1:0:9"))
    while not (folder / "trained.log").exists() and process.poll() is None:
        time.sleep(0.01)
    worker = int((folder / "trained.log").read_text().split()[0])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "interrupted with 0 of 30 networks trained; the same command goes on" in err
    assert not Path(f"/proc/{worker}").exists()
    assert not claims(folder)


def test_paths_have_rows_of_their_own(finished, flags, tmp_path, capsys):
    """Trained beside what is there; a search's truth are the architectures, as before."""
    path = "0-0-0-2-2-2-2"
    shutil.copytree(finished[0] / "tasks", tmp_path / "tasks")
    assert main([*flags, "--out", str(tmp_path), "--paths", path]) == 0
    assert len(list((tmp_path / "tasks").glob("*.json"))) == 32
    *rows, added = table(tmp_path)
    assert rows == table(finished[0])
    assert (added["stage_depths"], added["n"]) == (path, "2")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(path)]
    assert f"{float(added['accuracy_mean']):.2f}" in line
    truth = str(tmp_path / "ground_truth.csv")
    assert len(load_truth(truth, SPACE)) == 15
    assert load_truth_of_paths(truth, SPACE) == {path: float(added["accuracy_mean"])}


def test_bad_input_found_by_a_process_ends_the_command(flags, tmp_path):
    code, _, err = run(*command(tmp_path / "truth", flags, faults="images:5-1-1:0:9"))
    assert code == 2
    assert "error: the images are others" in err


class FakeJob:
    """A job that is done when it is submitted."""

    def __init__(self, number, function, arguments):
        self.job_id, self.failure, self.outcome = f"job{number}", None, None
        try:
            self.outcome = function(*arguments)
        except Exception as error:
            self.failure = error

    def done(self):
        return True

    def exception(self):
        return self.failure

    def result(self):
        return self.outcome


def fake_submitit(submitted: list) -> types.SimpleNamespace:
    class AutoExecutor:
        def __init__(self, folder):
            submitted.append(folder)

        def update_parameters(self, **parameters):
            if "colour" in parameters:
                raise NameError("unknown parameter colour")
            submitted.append(parameters)

        def submit(self, function, *arguments):
            return FakeJob(len(submitted), function, arguments)

    return types.SimpleNamespace(AutoExecutor=AutoExecutor)


def cluster_config(spec, folder, **resources) -> bmsn.GroundTruthConfig:
    resources = bmsn.Resources(executor="submitit", device="cpu", **resources)
    return bmsn.GroundTruthConfig(
        space=SPACE.name, data=spec, seeds=1, out=folder, training=TRAINING, resources=resources
    )


def test_jobs_of_a_cluster_fill_the_same_folder(finished, spec, tmp_path, monkeypatch):
    submitted: list = []
    monkeypatch.setitem(sys.modules, "submitit", fake_submitit(submitted))
    config = cluster_config(spec, tmp_path, workers=2, slurm="timeout_min=60,slurm_partition=long")
    truth = bmsn.run_ground_truth(config)
    assert submitted == [
        str(tmp_path / "tasks" / "jobs"),
        {"name": "bmsn", "timeout_min": 60, "slurm_partition": "long"},
    ]
    assert [row.n for row in truth.rows] == [1] * 15
    names = {path.name for path in (tmp_path / "tasks").glob("*.json")}
    assert names == {path.name for path in (finished[0] / "tasks").glob("*-seed0-*.json")}
    assert not truth.failed


def test_a_job_that_dies_leaves_networks_that_failed(spec, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", fake_submitit([]))

    def run_local(*arguments):
        raise RuntimeError("preempted")

    monkeypatch.setattr(bmsn.executors, "run_local", run_local)
    truth = bmsn.run_ground_truth(cluster_config(spec, tmp_path))
    assert not truth.rows
    assert set(truth.failed.values()) == {"job job2: preempted"}
    with pytest.raises(bmsn.InputError, match="slurm: unknown parameter colour"):
        bmsn.run_ground_truth(cluster_config(spec, tmp_path, slurm="colour=red"))
    with pytest.raises(bmsn.InputError, match=r"slurm must be name=value,name=value; got 'long'"):
        bmsn.run_ground_truth(cluster_config(spec, tmp_path, slurm="timeout_min=3,long"))


def test_synthetic_images_differ_from_seed_to_seed(tmp_path, monkeypatch):
    small = functools.partial(generate_synthetic, num_train=64, num_test=16)
    monkeypatch.setattr(bmsn.tasks, "generate_synthetic", small)
    tasks = []

    def run_tasks(given, *arguments):
        tasks.extend(given)
        return Outcome(results={}, failed={})

    monkeypatch.setattr(bmsn.truth, "run_tasks", run_tasks)
    bmsn.run_ground_truth(
        bmsn.GroundTruthConfig(data="synthetic:fine", seeds=2, first_seed=20, out=tmp_path, training=TRAINING)
    )
    assert len(tasks) == 30
    for number, seed in ((0, 20), (15, 21)):
        assert tasks[number].seed == seed
        assert tasks[number].images.fingerprint == small("fine", seed=seed).fingerprint
        opened = tasks[number].images.open(SPACE)
        assert (opened.train_images == small("fine", seed=seed).train_images).all()


def test_bad_input(flags, spec, tmp_path, capsys):
    out = tmp_path / "truth"
    blind = write_tiny_images(tmp_path / "blind.npz", num_test=0)
    (tmp_path / "file").write_text("")
    for changes, message in [
        (["--space", "resnet14-cifar1"], "did you mean 'resnet14-cifar10'"),
        (["--seeds", "0"], "seeds must be in [1, 10000]; got 0"),
        (["--first-seed", "-1"], "first_seed must be in"),
        (["--workers", "0"], "workers must be in [1, 4096]; got 0"),
        (["--timeout", "0"], "timeout must be above 0 seconds; got 0"),
        (["--batch-size", "500"], "batch_size must be in 2..128, the number of training images; got 500"),
        (["--data", blind], "has no test images"),
        (["--data", f"npz:{tmp_path}/none.npz"], "does not exist"),
        (["--paths", "0-0-0-1-1-2-2"], "paths must lie outside resnet14-cifar10; 0-0-0-1-1-2-2 is its [3,2,2]"),
        (["--paths", "0-0-3-1-1-2-2"], "does not fit resnet14-cifar10"),
        (["--slurm", "timeout_min=3"], "slurm is for executor submitit; the executor is local"),
        (["--executor", "submitit"], "executor submitit needs the submitit package: pip install 'bmsn[submitit]'"),
        (["--out", str(tmp_path / "file")], "cannot be written to: Not a directory"),
    ]:
        if "submitit" in changes and "submitit" in sys.modules:
            continue
        try:
            code = main([*flags, "--out", str(out), *changes])
        except SystemExit as stopped:  # found while the flags are read
            code = stopped.code
        captured = capsys.readouterr()
        assert code == 2, changes
        assert message in " ".join((captured.err + captured.out).replace("│", " ").split()), changes
    with pytest.raises(SystemExit) as stopped:
        main(["--space", SPACE.name, "--data", spec])
    assert stopped.value.code == 2
    assert "--out" in capsys.readouterr().err
    with pytest.raises(bmsn.InputError, match="space must be given for data"):
        bmsn.run_ground_truth(bmsn.GroundTruthConfig(data=spec, out=out))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(flags, tmp_path, capsys):
    assert main([*flags, "--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "device must be cpu or auto on this machine" in capsys.readouterr().err


def test_a_library_call_leaves_no_process_behind(spec, tmp_path):
    """Interrupted before the first network: the processes were being started."""
    config = bmsn.GroundTruthConfig(
        space=SPACE.name, data=spec, seeds=1, out=tmp_path, training=TRAINING, resources=bmsn.Resources(device="cpu")
    )
    asked = iter([False])
    with pytest.raises(bmsn.Interrupted, match="0 of 15 networks"):
        bmsn.run_ground_truth(config, should_stop=lambda: next(asked, True))
    assert not claims(tmp_path)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    assert not [line for line in commands if "spawn_main" in line]
