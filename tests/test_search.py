"""The search from its command line: result and files, options, bad input, failures on the way."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import bmsn
import bmsn.loop
from bmsn import engine
from bmsn.checkpoint import CheckpointStore, CheckpointWriteError, write_atomically
from bmsn.config import SearchConfig
from bmsn.errors import InputError
from bmsn.runfolder import read_metrics
from bmsn.search import Progress, main
from searching import run, tiny_flags, write_tiny_set


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_tiny_set(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def finished(spec, tmp_path_factory):
    """A finished run with everything switched on, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    truth = folder / "truth.csv"
    rows = [f"{a.slug},{80 + a.index / 10}" for a in bmsn.SearchSpace.named("resnet14-cifar10") if a.slug != "5-1-1"]
    truth.write_text("stage_depths,accuracy_mean\n" + "\n".join(rows) + "\n")
    flags = tiny_flags(
        spec,
        epochs=15,
        fast_eval=True,
        score_every=5,
        refresh_every=7,
        truth=truth,
        out=folder / "run",
        tensorboard=True,
    )
    code, out, err = run(*flags)
    assert code == 0, err
    return folder / "run", out, err


def test_result_files(finished):
    folder, printed, _ = finished
    result = json.loads((folder / "result.json").read_text())
    assert result["schema_version"] == 4
    assert set(result["timings"]) == {"train_images_per_second", "train_seconds", "score_seconds", "total_seconds"}
    assert result["scores"]["total"] == 64
    assert len(result["scores"]["correct"]) == len(result["ranking"]) == 15
    assert result["data"]["num_train"] == result["data"]["num_validation"] == 64
    rows = list(csv.DictReader((folder / "ranking.csv").read_text().splitlines()))
    assert list(rows[0])[:6] == ["rank", "architecture", "accuracy", "supernet", "macs_ratio", "ema_accuracy"]
    accuracies = [float(row["accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.5  # chance is 0.25
    by_pair = {
        (a, m): c
        for a, m, c in zip(*(result["scores"][k] for k in ("architecture", "supernet", "correct")), strict=True)
    }
    for row, line in zip(rows, printed.splitlines()[1:], strict=False):
        count = by_pair[row["architecture"], int(row["supernet"])]
        assert float(row["accuracy"]) == count / 64
        standard_error = math.sqrt(count / 64 * (1 - count / 64) / 64)
        assert f"{100 * count / 64:.2f} ± {100 * standard_error:.2f}" in line
        assert f"[{row['architecture'].replace('-', ',')}]" in line
    assert result["best"] == rows[0]["architecture"]
    assert list(folder.glob("events.out.tfevents*"))


def test_metrics_hold_the_whole_mixture_at_50_steps(finished):
    records = read_metrics(finished[0] / "metrics.jsonl")
    snapshots = [r for r in records if r["kind"] == "mixture"]
    assert len(snapshots) == 50
    assert snapshots[-1]["step"] == 60
    assert np.shape(snapshots[-1]["scores"]) == np.shape(snapshots[-1]["last_visit"]) == (15, 2)
    assert np.sum(snapshots[-1]["visits"]) == 30 // 4 + 30  # while one supernet trains alone, every fourth step
    weights = np.array(snapshots[-1]["weights"])
    assert weights.mean() == pytest.approx(1)
    assert weights[14] == pytest.approx(15 * (1 / 5 + 1 / 25) / 2)  # [5,1,1]: alone of 5 first, one of 5 last positions
    np.testing.assert_allclose(weights @ snapshots[-1]["assignment"] / 15, 0.5, atol=1e-5)
    assert [r["epoch"] for r in records if r["kind"] == "ranking"] == [5, 10]
    assert all(r["truth"]["ranking"]["n"] == 14 for r in records if r["kind"] == "ranking")


def test_truth_is_compared_on_the_rows_it_has(finished):
    folder, printed, _ = finished
    truth = json.loads((folder / "result.json").read_text())["truth"]
    assert truth["missing"] == ["5-1-1"]
    assert truth["ranking"]["n"] == 14
    assert "by MACs alone" in printed
    assert "without a row in the truth: 5-1-1" in printed


def test_config_yaml_reproduces_the_run(finished, tmp_path):
    folder, _, _ = finished
    code, _, err = run("--config", str(folder / "config.yaml"), "--out", str(tmp_path / "again"))
    assert code == 0, err
    first, second = (json.loads((f / "result.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["scores"] == second["scores"]
    assert first["ranking"] == second["ranking"]
    assert (folder / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def search(spec, **changes):
    settings = dict(space="resnet14-cifar10", data=spec, supernets=2, epochs=2, batch_size=16, device="cpu") | changes
    return bmsn.run_search(SearchConfig(**settings))


def test_fast_eval_changes_the_evaluator_and_nothing_else(spec, monkeypatch):
    monkeypatch.setattr(bmsn.loop, "compute_dtype", lambda device: torch.float32)
    slow, fast = search(spec), search(spec, fast_eval=True)
    differences = np.abs(np.subtract(slow.scores["correct"], fast.scores["correct"]))
    assert differences.max() <= 1  # rounding ties
    averages = [{row.architecture: row.ema_accuracy for row in result.ranking} for result in (slow, fast)]
    assert averages[0] == averages[1]


def test_calibrated_scoring(spec):
    plain, calibrated = (search(spec, fast_eval=True, norm=norm) for norm in ("batch", "calibrated"))
    assert calibrated.scores["total"] == plain.scores["total"]
    assert calibrated.scores["correct"] != plain.scores["correct"]
    with pytest.raises(InputError, match="norm calibrated needs fast_eval"):
        SearchConfig(norm="calibrated")


def test_score_pairs_and_evaluate_top(spec):
    pairs = search(spec, score="pairs", fast_eval=True)
    assert len(pairs.scores["correct"]) == 30
    for row in pairs.ranking:
        counts = [
            c
            for a, c in zip(pairs.scores["architecture"], pairs.scores["correct"], strict=True)
            if a == row.architecture.slug
        ]
        assert row.accuracy == max(counts) / 64
    top = search(spec, evaluate_top=4, fast_eval=True)
    assert [row.accuracy is not None for row in top.ranking] == [True] * 4 + [False] * 11
    assert sorted(row.ema_rank for row in top.ranking[:4]) == [1, 2, 3, 4]
    assert "not scored" in top.to_table()


def test_a_seed_decides_everything(spec):
    first, again, other = search(spec, seed=1), search(spec, seed=1), search(spec, seed=2)
    assert first.scores == again.scores
    assert first.ranking == again.ranking
    assert first.ranking != other.ranking


def test_result_is_found_again_and_best_can_be_built(spec):
    result = search(spec, epochs=1)
    again = bmsn.SearchResult.from_json(result.to_json(), "here")
    assert again.ranking == result.ranking
    network = bmsn.build_network(bmsn.SearchSpace.named("resnet14-cifar10"), result.best.architecture, num_classes=4)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    with pytest.raises(bmsn.InputError, match=r"schema_version must be in 2\.\.4; got 1"):
        bmsn.SearchResult.from_json(result.to_json().replace('"schema_version": 4', '"schema_version": 1'), "here")


def test_progress_is_told_every_step(spec):
    told = []
    config = SearchConfig(
        space="resnet14-cifar10", data=spec, supernets=2, epochs=10, batch_size=16, fast_eval=True, split_after=0.0
    )
    bmsn.run_search(config, progress=told.append)
    training = [record for record in told if "num_pairs" not in record]
    assert [record["step"] for record in training] == list(range(1, 41))  # a line of metrics every two steps
    assert all(record["num_steps"] == 40 and 0 <= record["accuracy"] <= 1 for record in training)
    assert all(record["images_per_second"] > 0 for record in training)
    assert "entropy" in training[-1]
    scoring = [(record["pairs_scored"], record["num_pairs"]) for record in told if "num_pairs" in record]
    assert scoring == [(3, 15), (7, 15), (11, 15), (15, 15)]  # four batches of 16 images


def test_progress_is_shown_every_ten_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr("bmsn.progress.time.monotonic", lambda: now)
    progress = Progress()
    numbers = {"num_steps": 25, "images_per_second": 99.6, "seconds_left": 61.0, "accuracy": None}
    for step in range(1, 26):
        now = 100.0 + step
        progress(numbers | {"step": step, "accuracy": 0.5 if step > 5 else None, "entropy": 0.25})
    for scored in range(26):
        now += 0.5
        progress(numbers | {"step": 25, "pairs_scored": scored, "num_pairs": 25})
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 1/25  100 images/s  left 1:01  accuracy -  entropy 0.250",
        "step 11/25  100 images/s  left 1:01  accuracy 50.0%  entropy 0.250",
        "step 21/25  100 images/s  left 1:01  accuracy 50.0%  entropy 0.250",
        "step 25/25  100 images/s  left 1:01  accuracy 50.0%  entropy 0.250",
        "step 25/25  scoring 19 of 25",
    ]


def test_a_terminal_has_one_line_that_is_ended(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with contextlib.closing(Progress()) as progress:
        progress({"step": 3, "num_steps": 3, "pairs_scored": 2, "num_pairs": 9})
    assert capsys.readouterr().err == "\r\x1b[Kstep 3/3  scoring 2 of 9\n"


# Bad input: found before the first step, named, exit code 2. ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--space", "resnet20-cifar"], ["resnet20-cifar10"]),
        (["--data", "npy:x"], ["npy", "npz"]),
        (["--data", "npz:absent.npz"], ["absent.npz"]),
        (["--data", "synthetic:corse", "--print-config"], ["synthetic:corse", "'coarse'"]),
        (["--batch-size", "1"], ["batch_size", "[2,", "1"]),
        (["--epochs", "0"], ["epochs", "[1,", "0"]),
        (["--lr", "-1"], ["lr", "-1"]),
        (["--min-lr", "0.5", "--lr", "0.1"], ["min_lr", "0.1", "0.5"]),
        (["--balance-every", "0"], ["balance_every", "0"]),
        (["--batch-size", "65"], ["batch_size", "64", "65"]),
        (["--evaluate-top", "16"], ["evaluate_top", "15", "16"]),
        (["--truth", "paper"], ["paper", "resnet20-cifar10"]),
        (["--truth", "absent.csv"], ["absent.csv"]),
        (["--resume"], ["resume needs out"]),
        (["--tensorboard"], ["tensorboard needs out"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
    ],
)
def test_bad_values_are_named(spec, flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_flags(spec) + flags) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_a_last_scoring_group_of_one_value_is_found_before_training(tmp_path, capsys):
    spec = write_tiny_set(tmp_path / "tiny.npz", num_images=132, size=4)  # the last map is 1x1, half of the images 66
    flags = tiny_flags(spec, out=tmp_path / "run")
    assert main([*flags, "--batch-size", "13"]) == 2
    message = capsys.readouterr().err
    for words in ("batch_size", "the last 1 of 66 validation images", "got 13", "at least 2 values a channel"):
        assert words in message
    assert not (tmp_path / "run").exists()
    assert main([*flags, "--batch-size", "16", "--epochs", "1"]) == 0  # a last group of 2
    assert main([*flags[:-2], "--batch-size", "13", "--method", "macs", "--supernets", "1"]) == 0  # scores nothing


def test_without_tensorboard_no_folder_is_made(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(tiny_flags(spec, tensorboard=True, out=tmp_path / "run")) == 2
    assert "pip install 'bmsn[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "word"), [(["--fast-evall"], "--fast-eval"), (["--lr", "fast"], "fast"), (["--device", "tpu"], "cpu")]
)
def test_unknown_flags_and_values_exit_with_2(flags, word, capsys):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert word in captured.err + captured.out


def test_unknown_keys_are_refused_with_the_nearest(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("wait_decay: 0.1\n")
    assert main(["--config", str(file)]) == 2
    assert "did you mean 'weight_decay'" in capsys.readouterr().err
    file.write_text("- 1\n")
    assert main(["--config", str(file)]) == 2
    assert "mapping" in capsys.readouterr().err


def test_space_is_required_for_other_data(capsys):
    assert main(["--data", "cifar10:x"]) == 2
    assert "space must be given" in capsys.readouterr().err
    assert main(["--data", "synthetik"]) == 2
    assert "did you mean 'synthetic'" in capsys.readouterr().err


def test_truth_file_is_checked(spec, tmp_path, capsys):
    file = tmp_path / "t.csv"
    for text, words in (
        ("stage_depths,accuracy\n3-2-2,80\n", ["accuracy_mean is missing"]),
        ("stage_depths,accuracy_mean\n3-2-2,eighty\n", ["row 1", "eighty"]),
        ("stage_depths,accuracy_mean\n3-2-2,80\n", ["at least 3", "1"]),
        ("stage_depths,accuracy_mean\n4-3-3,80\n", ["not in resnet14"]),
    ):
        file.write_text(text)
        assert main([*tiny_flags(spec), "--truth", str(file)]) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message


# Failures on the way. -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_skipped_and_counted(spec, monkeypatch):
    real, calls = engine.device_step, []

    def sometimes(nets, velocity, copies, architecture, row, images, labels, **settings):
        calls.append(1)
        before = nets.arena.detach().clone()
        if len(calls) in (3, 4):
            images = images * math.nan
        loss, correct = real(nets, velocity, copies, architecture, row, images, labels, **settings)
        assert torch.equal(before, nets.arena) == math.isnan(loss) == (len(calls) in (3, 4))
        return loss, correct

    monkeypatch.setattr(engine, "device_step", sometimes)
    result = search(spec)
    assert result.notes == ("2 updates were skipped: their loss was not finite.",)
    assert all(math.isfinite(row.ema_accuracy) for row in result.ranking)


def test_twenty_such_losses_in_a_row_stop_the_run(spec, monkeypatch, tmp_path, capsys):
    real, calls = engine.device_step, []

    def breaks(*args, **kwargs):
        calls.append(1)
        loss, correct = real(*args, **kwargs)
        return (loss * math.nan if len(calls) > 4 else loss), correct

    monkeypatch.setattr(engine, "device_step", breaks)
    assert main(tiny_flags(spec, epochs=10, checkpoint_every=2, out=tmp_path / "run")) == 3
    message = capsys.readouterr().err
    assert "step 23" in message
    assert "architecture [" in message
    assert "supernet" in message
    assert len(calls) == 24
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").load_latest()
    assert saved is not None
    assert torch.isfinite(saved[1]["loop"]["method"]["arena"]).all()


def test_a_balance_that_fails_stops_the_run_with_pair_and_step(spec, monkeypatch, capsys):
    monkeypatch.setattr(engine, "mixture_step", partial(engine.mixture_step, max_iterations=1))
    assert main(tiny_flags(spec, split_after=0)) == 3
    message = capsys.readouterr().err
    assert "step 0" in message
    assert "architecture [" in message
    assert "after 1 iterations" in message


def test_training_goes_on_when_the_disk_is_full(spec, monkeypatch, tmp_path, caplog):
    real, calls = CheckpointStore.save, []

    def full(self, step, state):
        calls.append(step)
        if step == 4:
            raise CheckpointWriteError(errno.ENOSPC, "No space left on device", "checkpoint")
        return real(self, step, state)

    monkeypatch.setattr(CheckpointStore, "save", full)
    assert main(tiny_flags(spec, checkpoint_every=2, out=tmp_path / "run")) == 0
    assert calls == [2, 4, 6, 8]
    assert "step 4 could not be written, training goes on" in caplog.text
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("name", ["ranking.csv", "result.json"])
def test_a_result_that_cannot_be_written_is_printed(spec, name, monkeypatch, tmp_path, capsys, caplog):
    def full(path, data):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, data)

    flags, out = tiny_flags(spec, epochs=1, fast_eval=True), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("bmsn.run.write_atomically", full)
        assert main([*flags, "--out", str(out)]) == 3
    printed = capsys.readouterr()
    assert "Best:" in printed.out
    assert f"failed: {out}: not finished" in printed.err
    assert f"{out / name}: the result could not be written: No space left on device" in caplog.text
    assert main(["--resume", "--out", str(out)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "±" in line] == [
        line for line in printed.out.splitlines() if "±" in line
    ]
    assert (out / "result.json").exists()


def test_a_full_disk_ends_what_tensorboard_gets(spec, monkeypatch, tmp_path, caplog):
    class Writer:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, step):
            assert step <= 3
            if step == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    pytest.importorskip("tensorboard")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    search(spec, tensorboard=True, out=tmp_path / "run", fast_eval=True)
    assert "step 3: TensorBoard gets no more, training goes on: [Errno 28] No space left on device" in caplog.text
    assert (tmp_path / "run" / "result.json").exists()


def test_a_closed_stderr_costs_nothing_but_messages(spec, tmp_path):
    command = [sys.executable, "-m", "bmsn.search", *tiny_flags(spec, epochs=1, fast_eval=True, out=tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    assert "Best:" in process.stdout.read()
    assert process.wait(timeout=300) == 0


def test_a_closed_stdout_ends_quietly(spec, tmp_path):
    command = [sys.executable, "-m", "bmsn.search", *tiny_flags(spec, epochs=1, fast_eval=True, out=tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    message = process.stderr.read()
    assert process.wait(timeout=300) == 141
    assert "Traceback" not in message
    assert "Exception ignored" not in message
    assert (tmp_path / "run" / "result.json").exists()
