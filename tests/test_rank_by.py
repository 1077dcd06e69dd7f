"""`--rank-by` in a search and in a comparison: results, tables, truth, what is shared, and bad settings."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

import bmsn
from bmsn.config import SearchConfig
from bmsn.rank_rules import IN_WORDS, RANK_RULES
from bmsn.ranking import rerank
from bmsn.run import run_search
from bmsn.runfolder import read_metrics
from searching import write_tiny_images, write_truth

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and a truth that lacks [2,1,4]."""
    folder = tmp_path_factory.mktemp("rank_by")
    write_tiny_images(folder / "tiny.npz")
    write_truth(folder / "truth.csv", SPACE, missing="2-1-4")
    return folder


def config(folder, **changes) -> SearchConfig:
    given = dict(
        space=SPACE.name, data=f"npz:{folder}/tiny.npz", supernets=3, epochs=2, batch_size=16, device="cpu",
        fast_eval=True, truth=str(folder / "truth.csv"),
    )  # fmt: skip
    return SearchConfig(**given | changes)


@pytest.fixture(scope="module")
def level(folder) -> bmsn.SearchResult:
    """A search that is ranked by corrected levels, with a ranking on the way."""
    return run_search(config(folder, rank_by="level", score_every=1, out=folder / "level"))


def accuracies(result) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Slugs, acc[c, m] and p(m|c), (15, 3), as result.json holds them."""
    slugs = result.scores["architecture"][::3]
    tables = (np.reshape(result.scores[name], (15, 3)) for name in ("correct", "probability"))
    correct, probability = tables
    return slugs, correct / result.scores["total"], probability


def test_the_ranking_is_the_rules(level):
    slugs, accuracy, probability = accuracies(level)
    assert (level.config["rank_by"], level.config["score"]) == ("level", "pairs")
    np.testing.assert_allclose(probability.sum(1), 1)
    own = probability.argmax(1)
    expected = accuracy[np.arange(15), own] - accuracy.mean(0)[own] + accuracy.mean()
    rows = {row.architecture.slug: row for row in level.ranking}
    for slug, value, supernet, row_accuracy in zip(slugs, expected, own, accuracy, strict=True):
        assert rows[slug].rank_value == pytest.approx(value)
        assert rows[slug].supernet == supernet
        assert rows[slug].accuracy == row_accuracy[supernet]
    values = [row.rank_value for row in level.ranking]
    assert values == sorted(values, reverse=True)
    plain = [row.accuracy for row in level.ranking]
    assert plain != sorted(plain, reverse=True)  # the case does tell the rule from the accuracy
    assert level.method["ranked_by"] == IN_WORDS["level"]


def test_one_search_tells_all_rules(level, folder):
    """Under truth, each rule's figures; the ranking's own among them; on the way as well."""
    truth = bmsn.correlation.load_truth(str(folder / "truth.csv"), SPACE)
    slugs, accuracy, _ = accuracies(level)
    assert list(level.truth["rules"]) == list(RANK_RULES)
    assert level.truth["rules"]["level"] == level.truth["ranking"]
    assert level.truth["rules"]["assigned"] == level.truth["accuracy"]
    known = [place for place, slug in enumerate(slugs) if slug != "2-1-4"]
    for rule, values in (("best", accuracy.max(1)), ("mean", accuracy.mean(1).round(12))):
        figures, true = level.truth["rules"][rule], [truth[SPACE.find(slugs[place]).index] for place in known]
        assert figures["n"] == 14
        assert figures["kendall_tau_b"] == pytest.approx(stats.kendalltau(values[known], true).statistic)
    on_the_way = [r for r in read_metrics(folder / "level" / "metrics.jsonl") if r["kind"] == "ranking"]
    assert [set(record["truth"]["rules"]) for record in on_the_way] == [set(RANK_RULES)]


def test_files_and_table_say_what_the_ranking_is_by(level, folder):
    rows = list(csv.DictReader((folder / "level" / "ranking.csv").read_text().splitlines()))
    assert [float(row["rank_value"]) for row in rows] == [row.rank_value for row in level.ranking]
    stored = bmsn.SearchResult.from_json((folder / "level" / "result.json").read_text(), "here")
    assert stored.ranking == level.ranking
    printed = stored.to_table()
    assert "Ranked by validation accuracy corrected for the level of its supernet." in printed
    assert "by level %" in printed.splitlines()[0]
    assert f"{100 * level.best.rank_value:.2f}" in printed.splitlines()[1]
    assert "rank_by weighted" in printed


def test_another_rule_needs_no_other_search(level, folder):
    """Ranked anew, a result is that of the same search with the other rule."""
    other = run_search(config(folder, rank_by="mean"))
    again = rerank(level, "mean")
    assert again.ranking == other.ranking
    assert (again.scores, again.config["rank_by"], again.method) == (other.scores, "mean", other.method)
    assert rerank(again, "level").ranking == level.ranking
    assert "rank_value" not in rerank(level, "best").to_csv()


def test_what_is_not_given_follows(folder):
    for given, expected in [
        (dict(), ("best", "assigned")),
        (dict(score="pairs"), ("pairs", "best")),
        (dict(rank_by="mean"), ("pairs", "mean")),
        (dict(rank_by="assigned"), ("best", "assigned")),
        (dict(score="pairs", rank_by="assigned"), ("pairs", "assigned")),
        (dict(method="few-shot", supernets=None, score="pairs"), ("pairs", "assigned")),
        (dict(method="mcts", supernets=None, rank_by="assigned"), ("best", "assigned")),
    ]:
        filled = config(folder, **given).filled()
        assert (filled.score, filled.rank_by) == expected, given
        assert filled.filled() == filled
    authors = SearchConfig(space="resnet20-cifar10", data="cifar10:x", preset="authors").filled()
    assert (authors.score, authors.rank_by) == ("pairs", "best")


def test_older_results_are_ranked_as_they_were(folder):
    """Without the fields: best where all pairs were scored; and they cannot be ranked anew."""
    result = run_search(config(folder, epochs=1, score="pairs"))
    content = json.loads(result.to_json())
    del content["config"]["rank_by"], content["scores"]["probability"]
    for row in content["ranking"]:
        del row["rank_value"]
    old = bmsn.SearchResult.from_json(json.dumps(content), "old")
    assert old.ranking == result.ranking
    assert old.config["rank_by"] == "best"
    with pytest.raises(bmsn.InputError, match="rank_by mean needs the accuracies of all pairs"):
        rerank(old, "mean")


def test_top_architectures_by_a_rule(folder):
    """Only K are scored, each in all supernets: the rule ranks these, the rest follow by a[c,m]."""
    result = run_search(config(folder, epochs=1, rank_by="mean", evaluate_top=4))
    assert [row.rank_value is not None for row in result.ranking] == [True] * 4 + [False] * 11
    ranks = [row.ema_rank for row in result.ranking]
    assert sorted(ranks[:4]) == [1, 2, 3, 4]
    assert ranks[4:] == list(range(5, 16))
    assert rerank(rerank(result, "best"), "mean").ranking == result.ranking


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank_by="mean", score="best"), "rank_by mean needs .*: score must be pairs, or not given; got best"),
        (dict(rank_by="level", race=3), "race ranks .* rank_by assigned; got rank_by level"),
        (dict(method="mcts", supernets=None, rank_by="best"), "rank_by does not fit method mcts: it must be assigned"),
        (dict(method="few-shot", supernets=None, rank_by="level"), "rank_by does not fit method few-shot"),
        (dict(method="macs", supernets=None, rank_by="mean"), "rank_by does not fit method macs"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(folder, changes, message):
    with pytest.raises(bmsn.InputError, match=message):
        config(folder, **changes).filled()


def test_a_comparison_searches_once_for_all_rules(folder):
    """Three rules are one search a seed, and their figures are those of the search alone."""
    compared = bmsn.ComparisonConfig(
        methods="mixture:supernets=3,rank_by=mean,label=mean,mixture:supernets=3,rank_by=level,label=level,"
        "mixture:supernets=3,score=pairs,label=best,mixture:supernets=3,label=alone",
        space=SPACE.name, data=f"npz:{folder}/tiny.npz", truth=str(folder / "truth.csv"), budget=2, seeds=1,
        settings="batch_size=16", out=folder / "compared", resources=bmsn.Resources(device="cpu"),
    )  # fmt: skip
    comparison = bmsn.run_comparison(compared)
    assert len(list((folder / "compared" / "runs").glob("mixture-*"))) == 2
    figures = {run.label: run.figures for run in comparison.runs}
    result = run_search(config(folder, rank_by="mean"))
    for label, expected in [
        ("mean", result.truth["ranking"]), ("level", result.truth["rules"]["level"]),
        ("best", result.truth["rules"]["best"]), ("alone", result.truth["rules"]["assigned"]),
    ]:  # fmt: skip
        for name in ("kendall_tau_b", "partial_kendall", "regret_top1", "regret_top3"):
            assert figures[label][name] == pytest.approx(expected[name]), (label, name)
    picks = {run.label: run.pick for run in comparison.runs}
    assert picks["mean"] == result.best.architecture.slug


def test_searches_of_one_method_are_told_apart(folder):
    from bmsn.comparison import _make_searches

    compared = bmsn.ComparisonConfig(
        methods="mixture,mixture:refresh_every=5", space=SPACE.name, data=f"npz:{folder}/tiny.npz", budget=2, seeds=1,
        truth=str(folder / "truth.csv"), settings="batch_size=16", out=folder / "labels",
    )  # fmt: skip
    searches = _make_searches(compared, SPACE, bmsn.open_dataset(compared.data))
    assert [search.task.label for search in searches.values()] == [
        "mixture, 2 epochs, seed 0", "mixture:refresh_every=5, 2 epochs, seed 0", "macs, 2 epochs, seed 0",
    ]  # fmt: skip
    renamed = dataclasses.replace(searches[2, "mixture", 0].task, spec_label="other")
    assert renamed.name == searches[2, "mixture", 0].task.name  # the folder is that of the settings
