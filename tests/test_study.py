"""benchmarks/study.py on tiny images: its table against the searches' own figures, resumed, and bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import bmsn
from bmsn.intervals import bootstrap_interval
from bmsn.rank_rules import RANK_RULES
from installation import REPOSITORY
from searching import write_tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")


@pytest.fixture(scope="module")
def study():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("study", REPOSITORY / "benchmarks" / "study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("study")
    data = write_tiny_images(folder / "tiny.npz")
    accuracy = np.random.default_rng(3).uniform(50, 90, len(SPACE))
    lines = [f"{a.slug},{accuracy[a.index]:.3f}" for a in SPACE]
    (folder / "truth.csv").write_text("\n".join(["stage_depths,accuracy_mean", *lines, ""]))
    return [
        "--methods", "mixture:supernets=2,spos,mixture:supernets=2,refresh_every=2", "--space", SPACE.name,
        "--data", data, "--truth", str(folder / "truth.csv"), "--budgets", "2", "--seeds", "2",
        "--settings", "batch_size=16", "--device", "cpu", "--out", str(folder / "out"),
    ]  # fmt: skip


def rows_of(flags) -> list[dict[str, str]]:
    with open(f"{flags[-1]}/study.csv") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_the_table(study, flags, capsys):
    assert study.main(flags) == 0
    printed = capsys.readouterr().out
    rows = rows_of(flags)
    settings = ["mixture:supernets=2", "spos", "mixture:supernets=2 refresh_every=2"]
    expected = [(settings[0], rule) for rule in RANK_RULES]
    expected += [("spos", "assigned"), *((settings[2], rule) for rule in RANK_RULES), ("macs", "-")]
    assert [(row["setting"], row["rule"]) for row in rows] == expected
    results = [
        bmsn.run_search(bmsn.SearchConfig(
            space=SPACE.name, data=flags[flags.index("--data") + 1], method="mixture", supernets=2, refresh_every=2,
            epochs=2, batch_size=16, device="cpu", fast_eval=True, seed=seed, score="pairs",
            truth=flags[flags.index("--truth") + 1],
        ))
        for seed in (0, 1)
    ]  # fmt: skip
    found = {(row["budget"], row["setting"], row["rule"]): row for row in rows}
    for rule in RANK_RULES:
        row = found["2", settings[2], rule]
        for name in ("kendall_tau_b", "partial_kendall", "regret_top1", "regret_top3"):
            values = [result.truth["rules"][rule][name] for result in results]
            digits = 5e-3 if "regret" in name else 5e-4
            assert float(row[name]) == pytest.approx(np.mean(values), abs=digits)
            low, high = bootstrap_interval(values)
            assert (float(row[f"{name}_low"]), float(row[f"{name}_high"])) == pytest.approx((low, high), abs=digits)
        baseline = found["2", settings[0], "assigned"]
        gain = float(row["kendall_tau_b"]) - float(baseline["kendall_tau_b"])
        assert float(row["tau_b_difference"]) == pytest.approx(gain, abs=1.1e-3)
        assert f"| {rule} | 2 | {row['kendall_tau_b']} [{row['kendall_tau_b_low']}, " in printed
    assert found["2", settings[0], "assigned"]["tau_b_difference"] == ""
    assert len({tuple(row.items()) for row in rows if row["setting"] == settings[2]}) == 5
    assert "| tau-b less mixture:supernets=2 \\| assigned |" in printed


def test_what_is_finished_is_not_searched_again(study, flags, capsys):
    """Two settings of five rules, one of one, and MACs, with two seeds: 4 x 2 searches."""
    before = {path: path.stat().st_mtime_ns for path in Path(flags[-1]).glob("runs/*/result.json")}
    assert len(before) == 8
    content = (Path(flags[-1]) / "study.csv").read_text()
    assert study.main(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(flags[-1]).glob("runs/*/result.json")} == before
    assert (Path(flags[-1]) / "study.csv").read_text() == content
    assert json.loads((Path(flags[-1]) / "comparison.json").read_text())["budgets"] == [2]


def test_the_baseline_is_named_as_the_setting_is(study, flags, capsys):
    """With its commas, as in --methods; nothing is searched again."""
    assert study.main([*flags, "--baseline", "mixture:supernets=2,refresh_every=2"]) == 0
    assert "tau-b less mixture:supernets=2 refresh_every=2 \\| assigned" in capsys.readouterr().out
    assert study.main([*flags, "--baseline", "spos"]) == 0
    assert "tau-b less spos" in capsys.readouterr().out


def test_labels_hold_whatever_the_settings_say(study):
    """Where one rule is enough, it is that of the label."""
    text = "mixture:adapt=5,rank_by=mean,label=adapted,spos,few-shot,macs"
    config = study.Study(methods=text, budgets="2", truth="paper", settings="score=pairs", out=Path("out")).comparison()
    assert [spec.label for spec in config.specs] == [
        "adapted | assigned", "spos | assigned", "few-shot | assigned", "macs | assigned",
    ]  # fmt: skip
    for spec in config.specs:
        filled = bmsn.SearchConfig(method=spec.method, **{"score": "pairs"} | spec.settings).filled()
        assert filled.rank_by == "assigned"
        assert filled.score == ("best" if filled.adapt else "pairs")


def test_bad_input(study, flags, capsys):
    assert study.main([*flags, "--baseline", "absent"]) == 2
    assert "baseline must be among mixture:supernets=2 | assigned" in capsys.readouterr().err
    assert study.main([*flags, "--methods", "mixture:supernet=2"]) == 2
    assert "did you mean 'supernets'" in capsys.readouterr().err


def test_the_default_settings_are_known(study):
    """Each is one that a search takes, and changes something that no other does."""
    specs = bmsn.method_spec.parse_methods(study.METHODS)
    filled = [bmsn.SearchConfig(method=spec.method, **spec.settings).filled().as_dict() for spec in specs]
    assert all(filled.count(config) == 1 for config in filled)


def test_help_that_nobody_reads(study, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as left:
            study.main(["--help"])
        assert left.value.code == 141
    assert capsys.readouterr().err == ""
