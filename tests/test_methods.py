"""Methods from end to end on tiny images: selection by name, settings that fit, resume, cost, ranking, metrics."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bmsn
from bmsn.checkpoint import CheckpointStore
from bmsn.config import SearchConfig
from bmsn.errors import InputError
from bmsn.methods.base import Method
from bmsn.runfolder import read_metrics
from bmsn.search import main
from searching import tiny_flags, write_tiny_set

SPACE = bmsn.SearchSpace.named("resnet14-cifar10").resized(8)  # images of the tiny sets
# Settings under which every method does all that it can.
FULL: dict[str, dict[str, object]] = {
    "mixture": dict(refresh_every=5, score_every=2),
    "spos": dict(refresh_every=5, score_every=2),
    "few-shot": dict(refresh_every=5, score_every=2),
    "mcts": dict(warm_up=0.4, ucb_constant=0.5, score_every=2),
    "boltzmann": dict(warm_up=0.4, refresh_every=5, score_every=2),
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_tiny_set(tmp_path_factory.mktemp("data") / "tiny.npz")


def settings(spec: str, **changes: object) -> SearchConfig:
    given = dict(space=SPACE.name, data=spec, epochs=4, batch_size=16, device="cpu", fast_eval=True)
    return SearchConfig(**given | changes)


def search(spec: str, **changes: object) -> bmsn.SearchResult:
    return bmsn.run_search(settings(spec, **changes))


def stop_after(steps: int, config: SearchConfig) -> None:
    """Runs a search, or goes on with it, and stops it after `steps` steps."""
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > steps

    with pytest.raises(bmsn.Interrupted):
        bmsn.run_search(config, should_stop=stop)


def records(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in r.items() if k != "train_seconds"} for r in read_metrics(folder / "metrics.jsonl")]


# By name. -------------------------------------------------------------------------------------------------------------


def test_methods_are_found_by_name():
    assert {"mixture", "spos", "few-shot", "mcts", "boltzmann", "random", "macs"} <= set(bmsn.methods.names())
    for name in bmsn.methods.names():
        method = bmsn.methods.get(name)
        assert issubclass(method, Method)
        assert method.name == name
    assert SearchConfig().method == "mixture"


def test_the_help_names_every_method():
    described = str(SearchConfig.__doc__).partition("method: how to search:")[2].partition("supernets:")[0]
    assert set(re.findall(r"[a-z-]+", described)) == set(bmsn.methods.names()) | {"or"}


def test_an_unknown_method_is_refused_with_the_nearest(spec, capsys):
    with pytest.raises(InputError, match=r"method 'mtcs' is unknown \(did you mean 'mcts'"):
        bmsn.methods.get("mtcs")
    assert main([*tiny_flags(spec), "--method", "boltzman"]) == 2
    assert "did you mean 'boltzmann'" in capsys.readouterr().err
    with pytest.raises(InputError, match="is unknown; known: mixture, spos"):
        SearchConfig(method="?")


# Settings. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "space", "supernets"),
    [("mixture", "resnet20-cifar10", 4), ("spos", "resnet20-cifar10", 1), ("few-shot", "resnet20-cifar10", 8),
     ("few-shot", "resnet18-imagenet", 5), ("mcts", "resnet20-cifar10", 1), ("random", "resnet20-cifar10", 1)],
)  # fmt: skip
def test_supernets_follow_from_the_method(method, space, supernets):
    filled = SearchConfig(method=method, space=space, data="cifar10:somewhere").filled()
    assert filled.supernets == supernets
    assert filled.epochs == 100 * supernets
    assert filled.filled() == filled
    given = SearchConfig(method=method, space=space, data="cifar10:somewhere", supernets=supernets)
    assert given.filled() == filled


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "spos", "--supernets", "4"], ["supernets must be 1", "spos", "4"]),
        (["--method", "few-shot", "--supernets", "2"], ["supernets must be 5", "few-shot", "resnet14-cifar10", "2"]),
        (["--method", "mcts", "--supernets", "2"], ["supernets must be 1", "mcts", "2"]),
        (["--method", "mcts", "--refresh-every", "3"], ["refresh_every", "mcts", "3"]),
        (["--method", "mcts", "--race", "3"], ["race", "mcts", "3"]),
        (["--method", "boltzmann", "--race", "3"], ["race", "boltzmann", "3"]),
        (["--method", "boltzmann", "--ucb-constant", "3"], ["ucb_constant", "boltzmann", "3"]),
        (["--method", "mixture", "--warm-up", "0.5"], ["warm_up", "mixture", "0.5"]),
        (["--method", "few-shot", "--warm-up", "0.5"], ["warm_up", "few-shot", "0.5"]),
        (["--method", "random", "--score-every", "1"], ["score_every", "random", "1"]),
        (["--method", "macs", "--evaluate-top", "3"], ["evaluate_top", "macs", "3"]),
        (["--method", "mcts", "--warm-up", "1.5"], ["warm_up", "[0, 1]", "1.5"]),
        (["--method", "mcts", "--ucb-constant", "-1"], ["ucb_constant", "[0, 1000]", "-1"]),
    ],
)
def test_settings_that_do_not_fit_are_named(spec, flags, words, capsys):
    command = ["--space", SPACE.name, "--data", spec, "--epochs", "2", "--batch-size", "16", *flags]
    assert main(command) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


# Resume. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FULL)
def test_a_search_that_was_stopped_ends_as_one_that_was_not(spec, method, tmp_path):
    whole, parts = (settings(spec, method=method, out=tmp_path / n, **FULL[method]) for n in ("whole", "parts"))
    expected = bmsn.run_search(whole)
    stop_after(4, parts)  # in the warm-up, before the first refresh
    again = settings(spec, method=method, out=tmp_path / "parts", resume=True, **FULL[method])
    stop_after(7, again)  # after both
    result = bmsn.run_search(again)
    for name in ("ranking", "scores", "cost", "method"):
        assert getattr(result, name) == getattr(expected, name), name
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    states = [CheckpointStore(tmp_path / n / "checkpoints").load_latest() for n in ("whole", "parts")]
    assert states[0][0] == states[1][0] == 16
    first, second = (state["loop"]["method"] for _, state in states)
    assert torch.equal(first["arena"], second["arena"])
    assert torch.equal(first["velocity"], second["velocity"])
    assert bmsn.run_search(again).ranking == expected.ranking  # a finished one: the stored result


# Ranking. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spos", "few-shot"])
def test_ranking_by_accuracy(spec, method):
    result = search(spec, method=method)
    accuracies = [row.accuracy for row in result.ranking]
    assert accuracies == sorted(accuracies, reverse=True)
    for row in result.ranking:
        assert row.supernet == (0 if method == "spos" else row.architecture.pool_positions[0] - 1)
    assert result.method["ranked_by"] == "validation accuracy"


def test_spos_is_the_mixture_of_one(spec):
    spos, mixture = search(spec, method="spos"), search(spec, method="mixture", supernets=1)
    assert (spos.ranking, spos.scores, spos.cost) == (mixture.ranking, mixture.scores, mixture.cost)


@pytest.mark.parametrize("method", ["mcts", "boltzmann"])
def test_ranking_by_the_methods_own_estimate(spec, method, tmp_path):
    """The pick is the method's; the accuracy of the final scoring stands beside it."""
    truth = tmp_path / "truth.csv"
    rows = [f"{a.slug},{80 + a.index / 10}" for a in SPACE]
    truth.write_text("stage_depths,accuracy_mean\n" + "\n".join(rows) + "\n")
    result = search(spec, method=method, truth=str(truth), epochs=8, warm_up=0.5)
    accuracies = [row.accuracy for row in result.ranking]
    assert None not in accuracies
    assert accuracies != sorted(accuracies, reverse=True)
    places = {row.ema_rank: row for row in result.ranking}
    assert sorted(places) == list(range(1, 16))  # the warm-up visits all
    averages = [places[rank].ema_accuracy for rank in range(1, 16)]
    assert averages == sorted(averages, reverse=True)
    if method == "boltzmann":
        assert [row.ema_rank for row in result.ranking] == list(range(1, 16))
        assert sum(result.method["visits"].values()) == 32
    else:
        best = result.best.architecture.pool_positions
        path = result.method["path"]
        assert path[0]["keep"] + path[0]["pool"] == 32
        for row in path:
            taken, other = ("pool", "keep") if row["layer"] in best else ("keep", "pool")
            assert row[taken] >= (row[other] or 0)
    own, scored = result.truth["ranking"], result.truth["accuracy"]
    truths = [80 + row.architecture.index / 10 for row in result.ranking]
    assert own["regret_top1"] == pytest.approx(81.4 - truths[0])
    assert own["regret_top3"] == pytest.approx(81.4 - max(truths[:3]))
    assert scored["kendall_tau_b"] != own["kendall_tau_b"]
    shown = result.to_table()
    assert "by accuracy" in shown
    assert f"Ranked by {result.method['ranked_by']}." in shown


@pytest.mark.parametrize("method", ["random", "macs"])
def test_what_needs_no_training(spec, method, tmp_path, capsys):
    command = ["--space", SPACE.name, "--data", spec, "--batch-size", "16", "--method", method]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "Nothing was trained." in printed
    result = bmsn.SearchResult.from_json((tmp_path / "run" / "result.json").read_text(), "here")
    assert main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == printed
    assert sorted(row.architecture.index for row in result.ranking) == list(range(15))
    assert all((row.accuracy, row.ema_accuracy, row.supernet) == (None, None, None) for row in result.ranking)
    assert set(result.cost.values()) == {0}
    rows = list(csv.DictReader((tmp_path / "run" / "ranking.csv").read_text().splitlines()))
    assert [row["architecture"] for row in rows] == [row.architecture.slug for row in result.ranking]
    assert {row["accuracy"] for row in rows} == {""}
    if method == "macs":
        macs = [SPACE.macs(row.architecture, num_classes=4) for row in result.ranking]
        assert macs == sorted(macs, reverse=True)
    else:
        orders = [tuple(r.architecture.index for r in search(spec, method="random", seed=s).ranking) for s in range(8)]
        assert orders[0] == tuple(row.architecture.index for row in result.ranking)
        assert len(set(orders)) == 8


def test_macs_agree_with_themselves(spec, tmp_path):
    truth = tmp_path / "truth.csv"
    rows = [f"{a.slug},{80 + a.index / 10}" for a in SPACE]
    truth.write_text("stage_depths,accuracy_mean\n" + "\n".join(rows) + "\n")
    result = search(spec, method="macs", truth=str(truth))
    assert result.truth["ranking"]["regret_top1"] == result.truth["macs"]["regret_top1"]
    assert result.truth["ema"]["n"] == result.truth["accuracy"]["n"] == 0
    assert "by own" not in result.to_table()


def test_evaluate_top_scores_the_methods_best(spec):
    result = search(spec, method="boltzmann", warm_up=1.0, evaluate_top=3)
    assert [row.accuracy is not None for row in result.ranking] == [True] * 3 + [False] * 12


def test_few_shot_races_and_scores_all_its_pairs(spec):
    pairs = search(spec, method="few-shot", score="pairs")
    assert len(pairs.scores["correct"]) == 15  # no other supernet has trained an architecture
    assert pairs.ranking == search(spec, method="few-shot").ranking
    raced = search(spec, method="few-shot", race=2, batch_size=8)
    assert [row.images_seen for row in raced.ranking[:2]] == [64, 64]


# Cost and metrics. ----------------------------------------------------------------------------------------------------


def test_cost_is_counted(spec):
    """60 steps in blocks of 15 train each architecture four times; 8 refreshes of both supernets; the final scoring of
    64 images in one of them.
    """
    macs = [SPACE.macs(a, num_classes=4) for a in SPACE]
    result = search(
        spec, draw="architectures", supernets=2, split_after=0.0, epochs=15, refresh_every=7, score_every=5,
        score="best",
    )  # fmt: skip
    assert result.cost == {
        "training_images": 60 * 16,
        "validation_images": 60 * 16 + 8 * 30 * 16 + 15 * 64,
        "training_macs": 3 * 4 * 16 * sum(macs),
        "validation_macs": (4 * 16 + 8 * 2 * 16 + 64) * sum(macs),
    }
    assert json.loads(result.to_json())["cost"] == result.cost


def test_a_race_costs_what_it_scored(spec):
    result = search(spec, method="spos", epochs=1, race=3, batch_size=8, confidence=0.5)
    assert result.cost["validation_images"] == 2 * 8 + sum(result.scores["images_seen"])  # one step in four of 8


def test_snapshots_hold_what_is_the_methods_own(spec, tmp_path):
    for method, kind in (("mcts", "tree"), ("boltzmann", "boltzmann"), ("few-shot", "few-shot")):
        out = tmp_path / method
        search(spec, method=method, out=out, **FULL[method])
        found = records(out)
        snapshots = [record for record in found if record["kind"] == kind]
        assert [record["step"] for record in snapshots] == list(range(1, 17))
        last, step = snapshots[-1], next(r for r in reversed(found) if r["kind"] == "step")
        if method == "mcts":
            assert [len(wave) for wave in last["visits"]] == [len(wave) for wave in SPACE.prefix_tree()]
            assert {sum(wave) for wave in last["visits"]} == {16}
            assert step["pick"] in {a.slug for a in SPACE}
            assert 0 < step["pick_share"] <= 1
        else:
            assert sum(last["visits"]) == 16
            assert len(last["scores"]) == 15
        if method == "boltzmann":
            assert math.fsum(last["probability"]) == pytest.approx(1)
            assert step["inverse_temperature"] == 100
        if method == "few-shot":
            assert np.sum(step["load"]) == pytest.approx(1)
        ranked = [record for record in found if record["kind"] == "ranking"]
        assert [record["epoch"] for record in ranked] == [2]
        assert ranked[0]["cost"]["training_images"] == 8 * 16
