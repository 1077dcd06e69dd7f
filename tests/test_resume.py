"""Nothing is lost when a run dies: killed anywhere and resumed, a search ends as an undisturbed one does."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bmsn.checkpoint import CheckpointStore
from bmsn.config import SearchConfig
from bmsn.run import Interrupted, run_search
from bmsn.runfolder import read_metrics
from bmsn.search import main
from searching import run, start, tiny_flags, write_tiny_set

# (place, which time): at a step between checkpoints, inside the first and a later checkpoint, between a checkpoint and
# the metrics line after it, before a metrics line, in the final scoring.
KILLS = [("step", 2), ("fsync", 1), ("saved", 2), ("fsync", 6), ("metrics", 4), ("step", 1), ("score", 1)]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    spec = write_tiny_set(tmp_path_factory.mktemp("data") / "tiny.npz")
    return tiny_flags(spec, epochs=6, checkpoint_every=3, fast_eval=True, score_every=2)


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, _, err = run(*flags, "--out", str(out))
    assert code == 0, err
    return out


def outcome(out: Path) -> tuple:
    result = json.loads((out / "result.json").read_text())
    saved = CheckpointStore(out / "checkpoints").load_latest()
    assert saved is not None
    step, state = saved
    records = [{k: v for k, v in r.items() if k != "train_seconds"} for r in read_metrics(out / "metrics.jsonl")]
    ranking = (out / "ranking.csv").read_text()
    return (
        step,
        result["scores"],
        result["ranking"],
        ranking,
        state["loop"]["method"]["arena"],
        state["loop"]["method"]["velocity"],
        records,
    )


def assert_same(first: tuple, second: tuple) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_killed_anywhere_and_resumed_it_ends_the_same(flags, undisturbed, tmp_path):
    out = tmp_path / "run"
    begun_at = []
    for number, (place, count) in enumerate(KILLS):
        resume = ["--resume"] if number else []
        code, _, err = run("killed_search.py", place, str(count), *flags, *resume, "--out", str(out))
        assert code == -signal.SIGKILL, err
        begun_at += [int(line.split(" at step ")[1].split()[0]) for line in err.splitlines() if " at step " in line]
    code, printed, err = run(*flags, "--resume", "--out", str(out))
    assert code == 0, err
    assert "Best:" in printed
    begun_at += [int(line.split(" at step ")[1].split()[0]) for line in err.splitlines() if " at step " in line]
    assert begun_at[0] == 0
    assert len(begun_at) == len(KILLS) + 1
    assert sum(step > 0 for step in begun_at) >= 3, begun_at
    assert_same(outcome(out), outcome(undisturbed))


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_a_resume_goes_on(flags, undisturbed, tmp_path, number, exit_code):
    out = tmp_path / "run"
    process = start(*flags, "--out", str(out))
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == exit_code, err
    assert "interrupted" in err
    code, _, err = run("--resume", "--out", str(out))  # the stored settings are enough
    assert code == 0, err
    assert_same(outcome(out), outcome(undisturbed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fast_eval": True},
        {"race": 3},
        {"adapt": 1},
        {"score_every": 1, "epochs": 2},
        {"method": "spos-unshared-all", "supernets": 1},
    ],
    ids=lambda changes: " ".join(map(str, changes)) or "one by one",
)
def test_a_scoring_that_is_stopped_is_done_again(changes, flags, tmp_path):
    settings: dict = dict(space="resnet14-cifar10", data=flags[flags.index("--data") + 1], supernets=2, epochs=1)
    config = SearchConfig(**(settings | {"batch_size": 16, "device": "cpu"} | changes))
    scored: list[int] = []

    def progress(record: dict) -> None:
        if "num_pairs" in record:
            scored.append(record["pairs_scored"])
            assert record["pairs_scored"] <= record["num_pairs"] == 15
            assert record["step"] == 4

    stop = replace(config, out=tmp_path / "stopped")
    with pytest.raises(Interrupted, match=r"interrupted while scoring at step 4 of .; go on with --resume"):
        run_search(stop, should_stop=lambda: bool(scored), progress=progress)
    assert len(scored) == 1
    results = [run_search(replace(stop, resume=True)), run_search(replace(config, out=tmp_path / "undisturbed"))]
    assert results[0].ranking == results[1].ranking
    assert results[0].scores == results[1].scores
    assert results[0].cost == results[1].cost
    assert_same(outcome(tmp_path / "stopped"), outcome(tmp_path / "undisturbed"))


def test_a_finished_run_prints_its_result_again(undisturbed, capsys):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in undisturbed.iterdir() if p.name != ".lock")
    assert main(["--resume", "--out", str(undisturbed)]) == 0
    assert "Best:" in capsys.readouterr().out
    assert sorted((p.name, p.stat().st_mtime_ns) for p in undisturbed.iterdir() if p.name != ".lock") == before


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_run(flags, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert run("killed_search.py", "score", "1", *flags, "--out", str(out))[0] == -signal.SIGKILL
    newest = max((out / "checkpoints").glob("*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    code, _, err = run("--resume", "--out", str(out))
    assert code == 0, err
    assert newest.name in err
    assert " at step 21 of 24" in err
    assert_same(outcome(out), outcome(undisturbed))


def test_other_settings_or_data_are_refused(flags, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    spec = write_tiny_set(tmp_path / "own.npz")
    own = tiny_flags(spec, checkpoint_every=3)
    assert run("killed_search.py", "step", "5", *own, "--out", str(out))[0] == -signal.SIGKILL
    assert main(["--resume", "--out", str(out), "--lr", "0.05", "--epochs", "3"]) == 2
    message = capsys.readouterr().err
    assert "lr: 0.1 stored, 0.05 given" in message
    assert "epochs: 2 stored, 3 given" in message
    write_tiny_set(tmp_path / "own.npz", seed=5)
    assert main(["--resume", "--out", str(out)]) == 2
    assert "has changed since the run was saved" in capsys.readouterr().err
    assert main([*own, "--out", str(out)]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_folder_in_use_and_a_folder_that_is_no_run_are_refused(undisturbed, tmp_path, capsys):
    from bmsn.runfolder import RunFolder

    with RunFolder.resume(undisturbed):
        code, _, err = run("--resume", "--out", str(undisturbed))
        assert code == 2
        assert "in use by a living process" in err
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert "no run to resume" in capsys.readouterr().err


def test_a_run_that_died_before_its_first_checkpoint_starts_again(flags, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert run("killed_search.py", "step", "1", *flags, "--out", str(out))[0] == -signal.SIGKILL
    code, _, err = run("--resume", "--out", str(out))
    assert code == 0, err
    assert "at step 0" in err
    assert_same(outcome(out), outcome(undisturbed))
