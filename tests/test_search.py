"""The search from its command line: result and files, options, bad input, failures on the way."""

from __future__ import annotations

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
from bmsn.checkpoint import CheckpointStore, CheckpointWriteError
from bmsn.config import SearchConfig
from bmsn.errors import InputError
from bmsn.runfolder import read_metrics
from bmsn.search import main
from global_state import unchanged
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
    assert np.sum(snapshots[-1]["visits"]) == 60
    np.testing.assert_allclose(np.mean(snapshots[-1]["assignment"], 0), 0.5, atol=1e-5)
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


def test_public_calls_leave_global_state_alone(spec):
    with unchanged():
        data = bmsn.open_dataset(spec)
        config = SearchConfig(space="resnet14-cifar10", data=spec, supernets=2, epochs=1, batch_size=16)
        result = bmsn.run_search(config, data)
        space = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
        nets = bmsn.SupernetMixture(space, 2, 4, generator=torch.Generator().manual_seed(0))
        images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
        bmsn.score_architectures(nets, images, labels)
        bmsn.score_one_by_one(nets, images, labels, [(space[0], 0)])
        bmsn.balance(np.eye(3, 2), 0.1)
        mixture = bmsn.BalancedMixture(num_architectures=15, num_supernets=2)
        mixture.observe_and_draw(0, 1, 0.5, 10.0, 3, 0.2)
        bmsn.backend_report()
        result.to_table()


# Bad input: found before the first step, named, exit code 2. ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--space", "resnet20-cifar"], ["resnet20-cifar10"]),
        (["--data", "npy:x"], ["npy", "npz"]),
        (["--data", "npz:absent.npz"], ["absent.npz"]),
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
    assert main(tiny_flags(spec)) == 3
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
