"""`SearchConfig` and the other settings: values from YAML and from library calls, what is taken and what is refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

import bmsn
from bmsn.config_files import load_config
from bmsn.errors import InputError
from bmsn.field_types import check_types
from bmsn.interference import InterferenceConfig
from bmsn.search import main

REFUSED = [
    ("batch_size: big", "batch_size must be a whole number; got 'big'"),
    ("epochs: 2.5", "epochs must be a whole number; got 2.5"),
    ("seed: true", "seed must be a whole number; got True"),
    ("seed: null", "seed must be a whole number; got None"),
    ("lr: fast", "lr must be a number; got 'fast'"),
    ("lr: [0.1]", "lr must be a number; got [0.1]"),
    ("lr: .nan", "lr must be in [0, 100]; got nan"),
    ("balance_every: 1.5", "balance_every must be a whole number or epoch; got 1.5"),
    ("balance_every: epochs", "balance_every must be a whole number or epoch; got 'epochs' (did you mean 'epoch'?)"),
    ("out: 3", "out must be a path; got 3"),
    ("data: [x]", "data must be text; got ['x']"),
    ("method: 1.5", "method must be text; got 1.5"),
    ("fast_eval: 'no'", "fast_eval must be true or false; got 'no'"),
    ("resume: 1", "resume must be true or false; got 1"),
    ("preset: papr", "preset must be one of default, paper, authors; got 'papr' (did you mean 'paper'?)"),
    ("device: tpu", "device must be one of auto, cpu, cuda; got 'tpu' (did you mean 'cpu'?)"),
    ("score: pair", "score must be one of best, pairs; got 'pair' (did you mean 'pairs'?)"),
    ("norm: calibrate", "norm must be one of batch, calibrated; got 'calibrate' (did you mean 'calibrated'?)"),
    ("schedule: foo", "schedule must be one of inverse, temperature; got 'foo'"),
    ("engine: x", "engine must be one of auto, eager, graphs; got 'x'"),
    ("pool: maxx", "pool must be one of max, avg, stride; got 'maxx' (did you mean 'max'?)"),
    (
        "rank_by: means",
        "rank_by must be one of assigned, best, mean, weighted, level; got 'means' (did you mean 'mean'?)",
    ),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_value_of_another_kind_is_refused(line, message, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(line + "\n")
    assert main(["--config", str(file), "--print-config"]) == 2
    assert capsys.readouterr().err == f"python -m bmsn.search: error: config {file}: {message}\n"
    with pytest.raises(InputError) as caught:
        bmsn.SearchConfig(**yaml.safe_load(line))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("lr: 1e-3", 1e-3),  # text to PyYAML, as is the next
        ("adapt_lr: 1e3", None),
        ("lr: 1", 1.0),
        ("seed: '3'", 3),
        ("balance_every: '7'", 7),
        ("balance_every: epoch", "epoch"),
        ("supernets: null", None),
        ("max_macs: 40000000", "40000000"),
        ("out: runs/a", Path("runs/a")),
        ("fast_eval: yes", True),
    ],
)
def test_yaml_values_become_what_the_field_is(line, value, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(line + "\n")
    if line == "adapt_lr: 1e3":  # a number, so its range is what is wrong
        with pytest.raises(InputError, match=r"adapt_lr must be in \[0, 100\]; got 1000.0"):
            load_config(file)
        return
    found = getattr(load_config(file), line.partition(":")[0])
    assert (found, type(found)) == (value, type(value))


def test_a_library_call_may_give_what_is_as_good():
    config = bmsn.SearchConfig(lr=1, seed=np.int64(3), momentum=np.float32(0.5), out="runs/a")  # type: ignore[arg-type]
    found = [config.lr, config.seed, config.momentum, config.out]
    assert found == [1.0, 3, 0.5, Path("runs/a")]
    assert [type(value) for value in found[:3]] == [float, int, float]
    for text in ({"seed": "3"}, {"lr": "1e-3"}):  # text is for files alone
        with pytest.raises(InputError, match="number; got '"):
            bmsn.SearchConfig(**text)  # type: ignore[arg-type]


OTHERS = [
    (bmsn.TrainingSettings, dict(epochs="200"), "epochs must be a whole number; got '200'"),
    (bmsn.TrainingSettings, dict(milestones=0.5), "milestones must be several, each a number; got 0.5"),
    (bmsn.TrainingSettings, dict(milestones=(0.5, "x")), "milestones must be several, each a number; got (0.5, 'x')"),
    (bmsn.Resources, dict(device="gpu"), "device must be one of auto, cpu, cuda; got 'gpu' (did you mean 'cpu'?)"),
    (bmsn.Resources, dict(workers=True), "workers must be a whole number; got True"),
    (bmsn.GroundTruthConfig, dict(out="a", seeds=2.0), "seeds must be a whole number; got 2.0"),
    (bmsn.GroundTruthConfig, dict(out="a", training={}), "training must be TrainingSettings; got {}"),
    (bmsn.ComparisonConfig, dict(methods=["spos"], truth="paper", out="a"), "methods must be text; got ['spos']"),
    (bmsn.ComparisonConfig, dict(methods="spos", truth="paper", out="a", budget="5"),
     "budget must be a whole number; got '5'"),
    (bmsn.RetrainConfig, dict(run="a", architecture="5,3,2"),
     "architecture must be several, each text; got '5,3,2'"),
    (bmsn.RetrainConfig, dict(run=None, top=1), "run must be a path; got None"),
    (bmsn.ExportConfig, dict(run="a", architecture=3), "architecture must be text; got 3"),
    (bmsn.ExportConfig, dict(run="a", architecture="3,2,2", from_supernet="yes"),
     "from_supernet must be true or false; got 'yes'"),
    (InterferenceConfig, dict(lr="high"), "lr must be a number; got 'high'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "message"), OTHERS, ids=[f"{k.__name__} {g}" for k, g, _ in OTHERS])
def test_other_settings_are_checked_alike(kind, given, message):
    with pytest.raises(InputError) as caught:
        kind(**given)
    assert str(caught.value) == message


def test_lists_become_tuples_and_text_a_path():
    config = bmsn.RetrainConfig(run="a", architecture=["5,3,2"], training=bmsn.TrainingSettings(milestones=[0.5]))  # type: ignore[arg-type]
    assert (config.run, config.architecture, config.training.milestones) == (Path("a"), ("5,3,2",), (0.5,))


def test_no_number_is_a_choice_or_text():
    @dataclass
    class Settings:
        flag: bool | None = None
        name: str = ""

    check_types(Settings(flag=True, name="x"))
    for wrong in (Settings(flag=0), Settings(name=1), Settings(name=None)):  # type: ignore[arg-type]
        with pytest.raises(InputError):
            check_types(wrong)


@pytest.mark.parametrize("data", [None, "cifar10:somewhere"])
@pytest.mark.parametrize("preset", ["default", "paper", "authors"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--lr", "1e-3", "--rank-by", "mean", "--max-macs", "40000000"], ["--balance-every", "7", "--device", "cpu"]],
    ids=" ".join,
)
def test_what_is_printed_reads_back_as_the_same_config(flags, preset, data, tmp_path, capsys):
    given = ["--preset", preset, *flags]
    if data is not None:
        given += ["--data", data, "--space", "resnet50-cifar100", "--truth", "a.csv"]
    assert main([*given, "--print-config"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "c.yaml"
    file.write_text(printed)
    assert main(["--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    read = load_config(file)
    filled = read.filled()
    assert yaml.safe_load(printed) == filled.as_dict()
    # Nothing was left open, and filling it in again changes nothing.
    assert asdict(read) == asdict(filled)
    assert (read.preset, read.data) == (preset, data or "synthetic")
