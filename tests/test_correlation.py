"""Rank figures, against scipy's definitions by hand and the published ones."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import pytest

from bmsn.correlation import (
    CORRELATIONS,
    REGRETS,
    agreement,
    load_truth,
    load_truth_of_paths,
    partial_kendall,
    ranking_agreement,
    why_undefined,
)
from bmsn.errors import InputError
from bmsn.result import RankedArchitecture
from bmsn.space import SearchSpace

TRUTH = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}


def tau_b(x, y):
    """Kendall's tau-b from its definition, pair by pair."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    score = sum(a * b for a, b in signs)
    return score / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def test_macs_and_the_published_figures():
    space = SearchSpace.named("resnet20-cifar10")
    truth = load_truth("paper", space)
    assert len(truth) == 36
    macs = {a.index: float(space.macs(a)) for a in space}
    figures = agreement(macs, truth, macs)
    assert round(figures["kendall_tau_b"], 3) == 0.498
    assert figures["kendall_tau_b"] == pytest.approx(tau_b(list(macs.values()), [truth[i] for i in macs]))
    assert figures["partial_kendall"] is None  # given MACs, MACs tell nothing
    assert truth[space.find("7-1-2").index] == 92.01


def test_partial_kendall_and_regret():
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 9, (3, 30)).astype(float)
    xy, xz, yz = tau_b(x, y), tau_b(x, z), tau_b(y, z)
    assert partial_kendall(x, y, z) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    predicted, truth = {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, {0: 70.0, 1: 60.0, 2: 80.0, 3: 75.0, 4: 90.0, 9: 99.0}
    figures = agreement(predicted, truth, dict.fromkeys(range(5), 1.0))
    assert figures["n"] == 5
    assert [figures[f"regret_top{k}"] for k in (1, 3, 5)] == [20.0, 10.0, 0.0]
    assert (
        figures["kendall_tau_b"]
        == figures["partial_kendall"]
        == pytest.approx(tau_b([5, 4, 3, 2, 1], [70, 60, 80, 75, 90]))
    )


def test_a_constant_ranking_has_no_correlation_and_says_why():
    figures = agreement(dict.fromkeys(range(4), 0.5), TRUTH, dict.fromkeys(range(4), 1.0))
    assert all(figures[name] is None for name in (*CORRELATIONS, *REGRETS.values()))
    assert figures["undefined"] == dict.fromkeys((*CORRELATIONS, *REGRETS.values()), "constant ranking")
    assert why_undefined(figures) == "constant ranking"
    shown = agreement(dict.fromkeys(range(4), 0.5), TRUTH, dict.fromkeys(range(4), 1.0), order=[2, 3, 0, 1])
    assert [shown[f"regret_top{k}"] for k in (1, 3, 5)] == [1.0, 0.0, 0.0]  # the one that was picked all the same
    constant = agreement({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 70.0), dict.fromkeys(range(3), 1.0))
    assert constant["undefined"]["spearman"] == "constant truth"
    assert constant["regret_top1"] == 0


def test_regret_is_that_of_what_was_picked():
    """Also where accuracies of some are not to be compared (a race), are equal, or are not in the truth."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        num = int(rng.integers(3, 12))
        truth = dict(enumerate(rng.integers(50, 90, num).astype(float).tolist()))
        order = rng.permutation(num).tolist()
        whole = order[: int(rng.integers(1, num + 1))]  # the others have dropped out
        values = dict(zip(whole, np.sort(rng.integers(0, 4, len(whole)))[::-1].tolist(), strict=True))  # with ties
        figures = agreement(values, truth, dict.fromkeys(range(num), 1.0), order)
        for k in (1, 3, 5):
            assert figures[f"regret_top{k}"] == max(truth.values()) - max(truth[i] for i in order[:k])


def test_a_pick_without_a_row_has_no_regret():
    figures = agreement({0: 3.0, 1: 2.0, 2: 1.0, 3: 0.0}, {1: 70.0, 2: 80.0, 3: 60.0}, dict.fromkeys(range(4), 1.0))
    assert figures["regret_top1"] is None
    assert figures["undefined"] == {"regret_top1": "no row in the truth for the first"}
    assert figures["regret_top3"] == 0
    assert figures["n"] == 3


def test_what_a_ranking_is_by():
    space = SearchSpace.named("resnet14-cifar10")
    rows = [
        RankedArchitecture(
            rank=rank, architecture=space[index], accuracy=accuracy, standard_error=None, images_seen=10, supernet=0,
            macs=macs, macs_ratio=1.0, ema_accuracy=None, ema_rank=None, pareto=False,
        )
        for rank, (index, accuracy, macs) in enumerate([(4, 0.9, 7), (2, 0.7, 7), (5, 0.8, 3), (0, None, 1)], start=1)
    ]  # fmt: skip
    truth = {4: 80.0, 2: 70.0, 5: 90.0, 0: 60.0}
    given = dict(method="mixture", by_accuracy=True)
    assert ranking_agreement(rows, rows, truth, **given)["kendall_tau_b"] == pytest.approx(
        tau_b([9, 7, 8], [80, 70, 90])
    )
    assert ranking_agreement(rows, rows[:2], truth, **given)["n"] == 2
    assert ranking_agreement(rows, rows[:2], truth, **given)["regret_top1"] == 10
    own = ranking_agreement(rows, rows, truth, method="mcts", by_accuracy=False)
    assert own["kendall_tau_b"] == pytest.approx(tau_b([4, 3, 2, 1], [80, 70, 90, 60]))
    by_macs = ranking_agreement(rows, rows, truth, method="macs", by_accuracy=False)
    assert by_macs["kendall_tau_b"] == pytest.approx(tau_b([7, 7, 3, 1], [80, 70, 90, 60]))
    assert why_undefined(by_macs) == ""  # that MACs say nothing more, given MACs, needs no words


def test_paths_outside_the_space_have_rows_of_their_own(tmp_path):
    space, table = SearchSpace.named("resnet14-cifar10"), tmp_path / "truth.csv"
    table.write_text("stage_depths,accuracy_mean\n3-2-2,90\n0-0-0-2-2-2-2,71.5\n4-1-2,91\n2-2-3,89\n")
    assert load_truth(str(table), space) == {
        space.find(a).index: x for a, x in [("3-2-2", 90), ("4-1-2", 91), ("2-2-3", 89)]
    }
    assert load_truth_of_paths(str(table), space) == {"0-0-0-2-2-2-2": 71.5}
    table.write_text(table.read_text() + "0-0-0-1-1-2-2,90\n")  # that of [3,2,2]
    with pytest.raises(InputError, match="row 5: stage_depths 0-0-0-1-1-2-2 stands there twice"):
        load_truth(str(table), space)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("4-3-3,80", r"truth .*csv: row 4: architecture .*4, 3, 3.* is not in resnet14-cifar10"),
        ("3-2-2,80", "truth .*csv: row 4: stage_depths 3-2-2 stands there twice"),
        ("1-1-5,nan", r"truth .*csv: row 4: accuracy_mean must be in \[0, 100\]; got 'nan'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    table = tmp_path / "truth.csv"
    table.write_text(f"stage_depths,accuracy_mean\n3-2-2,90\n4-1-2,91\n2-2-3,89\n{row}\n")
    with pytest.raises(InputError, match=message):
        load_truth(str(table), SearchSpace.named("resnet14-cifar10"))


def test_networks_of_another_size_are_of_another_space(tmp_path):
    """Wider ones, or those of larger images, are called the same; more classes or fewer channels are no other space."""
    table = tmp_path / "truth.csv"

    def write(space: SearchSpace, **images: int) -> None:
        rows = "".join(f"{a.slug},90,{space.macs(a, **images)}\n" for a in space)
        table.write_text(f"stage_depths,accuracy_mean,macs\n{rows}")

    space = SearchSpace.named("resnet14-cifar10")
    write(space, in_channels=1, num_classes=200)
    assert len(load_truth(str(table), space)) == len(space)
    for other in (SearchSpace.named("resnet14-cifar10", width=2), space.resized(64)):
        write(other)
        with pytest.raises(
            InputError, match=r"truth .*csv: row 1: .* 12,4\d\d,\d+ in resnet14-cifar10 with images of 32"
        ):
            load_truth(str(table), space)
    table.write_text("stage_depths,accuracy_mean,macs\n3-2-2,90,many\n")
    with pytest.raises(InputError, match="row 1: macs must be a number; got 'many'"):
        load_truth(str(table), space)
    table.write_text("stage_depths,accuracy_mean,macs\n3-2-2,90,\n4-1-2,91,\n2-2-3,89,\n")
    assert len(load_truth(str(table), space)) == 3


def test_published_rows_are_the_space(tmp_path):
    space = SearchSpace.named("resnet20-cifar10")
    copy = tmp_path / "copy.csv"
    with copy.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["stage_depths", "accuracy_mean"])
        writer.writerows((a.slug, load_truth("paper", space)[a.index]) for a in space)
    assert load_truth(str(copy), space) == load_truth("paper", space)
