"""Figures of a mixture over training against loops written out."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest

from bmsn.reporting_statistics import kl_to_uniform, mixture_history
from bmsn.space import SearchSpace
from run_folders import make_records

SPACE = SearchSpace.named("resnet14-cifar10")


def test_kl_by_hand() -> None:
    assert kl_to_uniform(np.array([0.75, 0.25])) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_to_uniform(np.array([1.0, 0.0, 0.0])) == pytest.approx(math.log(3))  # 0 log 0 = 0
    assert kl_to_uniform(np.array([0.5, 0.5])) == 0


def test_history_of_two_snapshots_by_hand() -> None:
    first = dict(step=4, assignment=[[0.9, 0.1], [0.2, 0.8]], visits=[[2, 0], [1, 1]], last_visit=[[3, -1], [0, 2]])
    second = dict(step=10, assignment=[[0.4, 0.6], [0.2, 0.8]], visits=[[2, 3], [1, 4]], last_visit=[[3, 9], [0, 8]])
    history = mixture_history([first, second])
    assert history.steps.tolist() == [4, 10]
    assert history.load.tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert np.isnan(history.switch_rate[0])
    assert history.switch_rate[1] == 0.5  # architecture 0 went from supernet 0 to 1
    assert history.age_max.tolist() == [4, 9]  # never visited in 4 steps; visited in the first of 10
    assert history.age_median.tolist() == [2.0, 3.5]  # of 0 4 3 1; of 6 0 9 1
    assert history.age_assigned.tolist() == [0.5, 0.5]  # of 0 1; of 0 1
    assert history.never_visited.tolist() == [0.25, 0.0]


@pytest.mark.parametrize("num_supernets", [1, 3])
def test_history_against_loops(num_supernets: int) -> None:
    records = [r for r in make_records(SPACE, num_supernets, (7, 8, 90), seed=num_supernets) if r["kind"] == "mixture"]
    history = mixture_history(records)
    for i, record in enumerate(records):
        p, cells = record["assignment"], [(c, m) for c in range(len(SPACE)) for m in range(num_supernets)]
        entropy = -sum(p[c][m] * math.log(p[c][m]) for c, m in cells if p[c][m]) / len(SPACE)
        assert history.entropy[i] == pytest.approx(entropy, abs=1e-12)
        of_m = [sum(p[c][m] for c in range(len(SPACE))) / len(SPACE) for m in range(num_supernets)]
        assert history.kl[i] == pytest.approx(sum(q * math.log(q * num_supernets) for q in of_m), abs=1e-12)
        ages = [record["step"] - 1 - record["last_visit"][c][m] for c, m in cells]
        assert (history.age_median[i], history.age_max[i]) == (median(ages), max(ages))
        best = [row.index(max(row)) for row in p]
        assigned = [record["step"] - 1 - record["last_visit"][c][m] for c, m in enumerate(best)]
        assert history.age_assigned[i] == median(assigned)
        assert history.never_visited[i] == sum(record["visits"][c][m] == 0 for c, m in cells) / len(cells)
        if i:
            before = [row.index(max(row)) for row in records[i - 1]["assignment"]]
            assert history.switch_rate[i] == sum(x != y for x, y in zip(before, best, strict=True)) / len(SPACE)


def test_the_load_is_that_of_what_is_drawn() -> None:
    p = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    record = dict(step=4, assignment=p, visits=[[2, 0], [0, 1], [0, 1]], last_visit=[[2, -1], [-1, 3], [-1, 1]])
    assert mixture_history([record | {"weights": [1.5, 0.75, 0.75]}]).kl[0] == 0
    assert mixture_history([record]).kl[0] == pytest.approx(math.log(2) + math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)


def test_no_visit_between_two_snapshots_has_no_load() -> None:
    record = dict(step=4, assignment=[[0.5, 0.5]], visits=[[2, 2]], last_visit=[[0, 3]])
    assert np.isnan(mixture_history([record, record | {"step": 5}]).load[1]).all()
