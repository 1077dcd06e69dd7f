"""The figures of a comparison against tables worked out by hand, and what is left where something is missing."""

from __future__ import annotations

import csv
import dataclasses
import json
import re

import pytest

import bmsn
from bmsn.compare import to_table
from bmsn.comparison import Comparison
from bmsn.comparison_figures import FIGURES, compare_pairs, describe_run, summarise, summarise_runs
from bmsn.comparison_files import draw_budgets, write_tables
from bmsn.result import RankedArchitecture, SearchResult

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")
# Five of the 15 architectures; MACs in units of the default's, [3,2,2] (index 10).
SLUGS = ("1-1-5", "2-2-3", "3-2-2", "4-1-2", "5-1-1")
MACS = dict(zip(SLUGS, (50, 70, 100, 140, 230), strict=True))
TRUTH = dict(zip(SLUGS, (70.0, 80.0, 75.0, 78.0, 60.0), strict=True))


def truth(*slugs: str) -> dict[int, float]:
    return {SPACE.find(slug).index: TRUTH[slug] for slug in slugs or SLUGS}


def search_result(accuracy: dict[str, float], method: str = "mixture", **method_record) -> SearchResult:
    """The result of a search that gave these accuracies in percent, on 1,000 images."""
    rows = [
        RankedArchitecture(
            rank=rank, architecture=SPACE.find(slug), accuracy=accuracy[slug] / 100, standard_error=0.0,
            images_seen=1000, supernet=0, macs=MACS[slug], macs_ratio=MACS[slug] / 100, ema_accuracy=0.5, ema_rank=1,
            pareto=False,
        )
        for rank, slug in enumerate(sorted(accuracy, key=lambda slug: -accuracy[slug]), start=1)
    ]  # fmt: skip
    # As `macs` is not the true one, neither are these rows all of the space: nothing here looks at the others.
    return SearchResult(
        ranking=tuple(rows), config={"method": method}, environment={}, data={}, scores={"total": 1000},
        timings={"train_seconds": 3.0, "score_seconds": 1.0, "total_seconds": 5.0},
        cost={"training_images": 640, "validation_images": 320, "training_macs": 10**12, "validation_macs": 10**11},
        method={"ranked_by": "validation accuracy", "estimate": "a[c,m]", **method_record}, truth={},
    )  # fmt: skip


def run(accuracy: dict[str, float], label: str = "mixture", seed: int = 0, known=None, **kwargs):
    result = search_result(accuracy, **kwargs)
    return describe_run(label, 5, seed, result, SPACE, truth() if known is None else known, {"0-0-2-2-1-2-2": 71.5})


FIRST = {"4-1-2": 90.0, "2-2-3": 80.0, "3-2-2": 70.0, "5-1-1": 60.0, "1-1-5": 50.0}
SECOND = {"1-1-5": 90.0, "5-1-1": 80.0, "3-2-2": 70.0, "4-1-2": 60.0, "2-2-3": 50.0}


def test_one_run_by_hand():
    """Ranking 412, 223, 322, 511, 115; truth 78, 80, 75, 60, 70: two of ten pairs the other way round."""
    done = run(FIRST)
    assert (done.pick, done.pick_within_macs, done.n, done.undefined) == ("4-1-2", "2-2-3", 5, {})
    figures = done.figures
    assert figures["accuracy"] == 78.0
    assert [figures[f"regret_top{k}"] for k in (1, 3, 5)] == [2.0, 0.0, 0.0]
    assert figures["gain_within_macs"] == 80.0 - 75.0
    assert figures["macs_ratio"] == 1.4
    assert figures["kendall_tau_b"] == pytest.approx((8 - 2) / 10)
    # Ranks 5 4 3 2 1 of the ranking, 4 5 3 1 2 of the truth: 1 - 6 (1 + 1 + 0 + 1 + 1) / (5 * 24).
    assert figures["spearman"] == pytest.approx(0.8)
    # By MACs: 511, 412, 322, 223, 115. With the ranking 6 to 4 pairs agree, with the truth 4 to 6: 0.2 and -0.2.
    assert figures["partial_kendall"] == pytest.approx((0.6 - 0.2 * -0.2) / (1 - 0.2**2))
    assert done.cost["training_images"] == 640


def test_seeds_and_pairs_by_hand():
    """The second ranking has 115 first, of accuracy 70; tau -6/10 by symmetry of its order."""
    runs = [run(FIRST), run(SECOND, seed=1), run(FIRST, seed=2)]
    row = summarise_runs(runs)
    assert row.picks == {"4-1-2": 2, "1-1-5": 1}
    accuracy = row.figures["accuracy"]
    assert (accuracy.n, accuracy.mean) == (3, pytest.approx((78 + 70 + 78) / 3))
    assert accuracy.bootstrap == pytest.approx((70.0, 78.0), abs=1e-4)
    # s = sqrt(((2.667)^2 * 2 + 5.333^2) / 2) = 4.619; 4.3027 * 4.619 / sqrt(3) = 11.47
    assert accuracy.student == pytest.approx((75.333 - 11.474, 75.333 + 11.474), abs=2e-3)
    assert row.figures["gain_within_macs"].mean == pytest.approx((5 - 5 + 5) / 3)
    base = [run(SECOND, "spos"), run(SECOND, "spos", seed=1), run(SECOND, "spos", seed=7)]
    paired = compare_pairs(runs, base)
    assert (paired.label, paired.baseline) == ("mixture", "spos")
    difference = paired.figures["accuracy"]
    assert (difference.n, difference.mean) == (2, pytest.approx(((78 - 70) + 0) / 2))  # seeds 0 and 1 are in both


def test_rankings_that_are_not_by_accuracy():
    """That by MACs takes MACs themselves, so that equal ones are no order; that of chance its places."""
    by_macs = run(SECOND, method="macs")
    assert by_macs.figures["kendall_tau_b"] == pytest.approx(-0.2)
    assert by_macs.figures["partial_kendall"] is None
    assert by_macs.undefined == {"partial_kendall": "MACs decide the ranking or the truth"}
    untrained = {slug: 50.0 for slug in SLUGS}  # equal accuracies say nothing of a ranking by chance
    assert run(untrained, method="random").figures["kendall_tau_b"] is not None


def test_a_race_counts_those_that_saw_all_images():
    result = search_result(FIRST)
    rows = [dataclasses.replace(row, images_seen=1000 if row.rank <= 3 else 200) for row in result.ranking]
    done = describe_run("mixture", 5, 0, dataclasses.replace(result, ranking=tuple(rows)), SPACE, truth(), {})
    assert done.n == 3
    assert done.figures["kendall_tau_b"] == pytest.approx((2 - 1) / 3)


def test_constant_accuracies_have_no_correlation_but_a_reason(tmp_path):
    constant = run({slug: 50.0 for slug in SLUGS})
    for name in ("kendall_tau_b", "spearman", "partial_kendall"):
        assert constant.figures[name] is None
        assert constant.undefined[name] == "constant ranking"
    assert constant.figures["accuracy"] is not None
    row = summarise_runs([constant, run(FIRST, seed=1)])
    assert (row.figures["kendall_tau_b"].n, row.figures["kendall_tau_b"].mean) == (1, pytest.approx(0.6))
    assert row.figures["kendall_tau_b"].undefined == "constant ranking"
    only = summarise_runs([constant])
    comparison = Comparison(
        rows=(only,), paired=(), runs=(constant,), failed={}, missing=(), num_architectures=5
    )  # fmt: skip
    table = to_table(comparison)
    assert "not defined: mixture, 5 epochs, kendall_tau_b: constant ranking" in table
    about = {"space_name": "s", "data": "d", "truth": "t", "seeds": [0]}
    write_tables(tmp_path, [only], [], [constant], about, {}, ())
    text = (tmp_path / "comparison.json").read_text() + (tmp_path / "comparison.csv").read_text() + table
    assert "nan" not in text.lower()
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["schema_version"] == 1
    assert content["runs"][0]["figures"]["kendall_tau_b"] is None
    assert content["runs"][0]["undefined"]["kendall_tau_b"] == "constant ranking"
    (cells,) = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()[1:])
    assert (cells["kendall_tau_b"], cells["kendall_tau_b_n"], cells["accuracy_low"]) == ("", "0", "")


def test_without_a_row_in_the_truth():
    """Of the pick: its accuracy is not known, the rest is over four. Of the default: no gain over it."""
    done = run(FIRST, known=truth("1-1-5", "2-2-3", "3-2-2", "5-1-1"))
    assert (done.n, done.pick) == (4, "4-1-2")
    assert done.figures["accuracy"] is None
    assert done.undefined == {
        "accuracy": "no row in the truth for [4,1,2]",
        "regret_top1": "no row in the truth for the first",
    }
    assert done.figures["kendall_tau_b"] == pytest.approx((5 - 1) / 6)
    assert run(FIRST, known=truth("1-1-5", "2-2-3", "5-1-1")).undefined["gain_within_macs"] == (
        "no row in the truth for [3,2,2]"
    )
    nothing = run(FIRST, known={SPACE.find("1-2-4").index: 3.0})
    assert nothing.n == 0
    assert nothing.undefined["regret_top1"] == "no row in the truth for the first"
    assert nothing.undefined["kendall_tau_b"] == "0 of them in the truth"


def test_a_path_is_named_with_its_accuracy_where_the_truth_has_it(tmp_path):
    """Outside the space with a row of its own, without one, and inside it."""
    paths = ("0-0-2-2-1-2-2", "0-0-1-2-1-1-2", "0-0-0-1-1-2-2")  # the last is [3,2,2]
    runs = tuple(run(FIRST, seed=seed, resolution_path=path) for seed, path in enumerate(paths))
    assert [done.path_accuracy for done in runs] == [71.5, None, TRUTH["3-2-2"]]
    comparison = Comparison(
        rows=(summarise_runs(runs),), paired=(), runs=runs, failed={}, missing=("1-2-4",), num_architectures=15
    )
    table = to_table(comparison)
    found = f"0-0-2-2-1-2-2 (71.50 % alone), 0-0-1-2-1-1-2, 0-0-0-1-1-2-2 ({TRUTH['3-2-2']:.2f} % alone)"
    assert f"mixture also found {found}, resolutions by layer." in table
    about = {"space_name": "s", "data": "d", "truth": "t", "seeds": [0]}
    write_tables(tmp_path, comparison.rows, [], runs, about, {}, ())
    (row,) = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()[1:])
    assert row["paths"] == f"0-0-2-2-1-2-2:71.500 0-0-1-2-1-1-2 0-0-0-1-1-2-2:{TRUTH['3-2-2']:.3f}"
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [each["path_accuracy"] for each in content["runs"]] == [71.5, None, TRUTH["3-2-2"]]
    assert "without a row in the truth: 1-2-4" in table
    assert "Figures over 5 of 15 architectures, means over 3 seeds" in table
    fewer = dataclasses.replace(comparison, rows=(*comparison.rows, summarise_runs(runs[:2])))
    assert "means over 2 to 3 seeds" in to_table(fewer)


def test_summaries_of_nothing():
    empty = summarise([None, None], ["constant ranking", "constant ranking"])
    assert (empty.n, empty.mean, empty.bootstrap, empty.undefined) == (0, None, None, "constant ranking")
    assert summarise([]).mean is None


def test_figures_against_the_budget(tmp_path):
    """Files from the same numbers are the same; each method is in the legend; a figure not defined is left out."""
    rows = [
        dataclasses.replace(summarise_runs([run(accuracy, label, seed) for seed in range(2)]), budget=budget)
        for label, accuracy in (("mixture", FIRST), ("spos <b>", SECOND), ("flat", {slug: 1.0 for slug in SLUGS}))
        for budget in (5, 20)
    ]
    draw_budgets(tmp_path, rows, "title")
    svg = (tmp_path / "budgets.svg").read_text()
    for words in ("mixture", "spos &lt;b&gt;", "flat", "rank correlation with the truth (tau-b)", "regret of the pick"):
        assert words in svg
    assert (tmp_path / "budgets.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "again").mkdir()
    draw_budgets(tmp_path / "again", rows, "title")
    assert (tmp_path / "again" / "budgets.svg").read_text() == svg


def test_long_names_in_the_figure_are_whole(tmp_path):
    """Each line of the legend is narrower than the figure; a $ is one."""
    names = ["mixture:supernets=8,refresh_every=200,average_last=0.2,adapt=5,adapt_lr=0.01,rank_by=mean", "$a$", "b"]
    rows = [
        dataclasses.replace(summarise_runs([run(FIRST, name)]), budget=budget) for name in names for budget in (5, 20)
    ]
    draw_budgets(tmp_path, rows, "title")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "budgets.svg").read_text())
    assert "$a$" in texts
    assert max(map(len, texts)) <= 78
    assert "".join(names[0].split(",")) in "".join(texts).replace(",", "").replace(" ", "")


def test_every_figure_is_summed_up():
    assert set(run(FIRST).figures) == set(FIGURES) == set(summarise_runs([run(FIRST)]).figures)
