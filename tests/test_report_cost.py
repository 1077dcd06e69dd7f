"""Cost in reports: latencies of result.json, fronts by their definition, correlations against scipy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from scipy import stats

from bmsn.figures import style
from bmsn.figures_cost import CostPanel, latency_figure, pareto_panels
from bmsn.reporting import write_report
from bmsn.reporting_cost import latencies
from bmsn.reporting_run import read_runs
from bmsn.space import SearchSpace
from html_pages import HtmlPage, do_not_draw
from run_folders import write_run

SPACE = SearchSpace.named("resnet14-cifar10")
MACS = [SPACE.macs(a) for a in SPACE]
RNG = np.random.default_rng(3)
ACCURACY = (RNG.permutation(15) / 20).tolist()
MEDIANS = {"1": RNG.permutation(15) + 1.0, "256": 10 + np.array(MACS) / 1e6}  # at random, and as MACs are
FRONTS = "Medians; grey bars"
AGAINST_MACS = "Medians with quartiles"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_draw(monkeypatch)


def latency(spread: float = 0.02, note: str = "Latency on a machine.") -> dict[str, Any]:
    milliseconds = {
        a.slug: {
            size: [0.9 * values[a.index], values[a.index], 1.2 * values[a.index]] for size, values in MEDIANS.items()
        }
        for a in SPACE
    }
    return {
        "device": "a machine", "dtype": "float32", "rounds": 9, "milliseconds": milliseconds,
        "spread": {"1": spread, "256": 0.01}, "note": note,
    }  # fmt: skip


def report(run: Path) -> HtmlPage:
    return HtmlPage.read(write_report([run], run.parent / "page.html"))


def has(page: HtmlPage, begins: str) -> bool:
    return any(caption.startswith(begins) for caption in page.captions)


def front(accuracy: list[float], cost: list[float]) -> set[int]:
    """By definition; there are no ties here."""
    rows = range(len(cost))
    return {i for i in rows if not any(cost[j] < cost[i] and accuracy[j] > accuracy[i] for j in rows)}


def test_latencies_of_a_result(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", SPACE, latency=latency())])
    one, many = latencies(run)
    assert (one.batch_size, one.spread, many.batch_size, many.spread) == (1, 0.02, 256, 0.01)
    for row in run.rows:
        value = MEDIANS["256"][row.architecture.index]
        assert many.of(row) == (0.9 * value, value, 1.2 * value)


def test_columns_correlations_and_fronts(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", SPACE, accuracy=ACCURACY, latency=latency()))
    names = {str(a): a.index for a in SPACE}
    for row in page.table("rank"):
        index = names[row["architecture"]]
        assert float(row["ms, batch 1"]) == MEDIANS["1"][index]
        assert float(row["ms, batch 256"]) == pytest.approx(MEDIANS["256"][index], rel=5e-4)  # four digits
    rows = page.table("batch")
    assert [row["batch"] for row in rows] == ["1", "256"]
    cheap = front(ACCURACY, MACS)
    for row, size in zip(rows, MEDIANS, strict=True):
        values = MEDIANS[size]
        assert float(row["tau-b with MACs"]) == pytest.approx(stats.kendalltau(values, MACS).statistic, abs=6e-4)
        assert float(row["Spearman"]) == pytest.approx(stats.spearmanr(values, MACS).statistic, abs=6e-4)
        fast = front(ACCURACY, values.tolist())
        counts = [len(fast & cheap), len(fast - cheap), len(cheap - fast)]
        assert [int(row[name]) for name in ("on both fronts", "by latency alone", "by MACs alone")] == counts
        assert [float(row["fastest (ms)"]), float(row["slowest (ms)"])] == pytest.approx(
            [min(values), max(values)], rel=5e-4
        )
    assert [row["spread %"] for row in rows] == ["2.0", "1.0"]
    assert has(page, FRONTS)
    assert has(page, AGAINST_MACS)
    assert 'class="note"' not in (tmp_path / "page.html").read_text()


def test_busy_machine_is_a_note_and_its_words_are_text(tmp_path: Path) -> None:
    evil = "busy </p><script>alert(1)</script>"
    page = report(write_run(tmp_path / "run", SPACE, latency=latency(spread=0.4, note=evil)))
    assert evil in page.text
    assert page.tags.count("script") == 1
    assert 'class="note">busy' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("content", [None, {}], ids=["schema 3", "not asked for"])
def test_without_latency(content: dict[str, Any] | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE, accuracy=ACCURACY)
    result = json.loads((run / "result.json").read_text())
    result |= {"schema_version": 3} if content is None else {"latency": content}
    (run / "result.json").write_text(json.dumps(result))
    page = report(run)
    assert not has(page, FRONTS)
    assert not has(page, AGAINST_MACS)
    assert not any("ms," in column for table in page.tables for column in table[0])
    assert has(page, "Nothing is at once cheaper and better")


def test_method_without_accuracies_has_latency_against_macs_alone(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", SPACE, accuracy=[None] * 15, latency=latency()))
    assert not has(page, FRONTS)
    assert has(page, AGAINST_MACS)
    assert "on both fronts" not in page.table("batch")[0]


def test_equal_latencies_have_no_correlation(tmp_path: Path) -> None:
    found = latency()
    for by_size in found["milliseconds"].values():
        by_size["1"] = [1.0, 1.0, 1.0]
    row = report(write_run(tmp_path / "run", SPACE, latency=found)).table("batch")[0]
    assert (row["tau-b with MACs"], row["Spearman"]) == ("-", "-")


def test_what_a_race_dropped_is_on_no_front(tmp_path: Path) -> None:
    """The cheapest has the best accuracy of all, but on fewer images."""
    cheapest = int(np.argmin(MACS))
    accuracy = [0.9 if i == cheapest else 0.3 + i / 100 for i in range(15)]
    run = write_run(tmp_path / "run", SPACE, accuracy=accuracy)
    content = json.loads((run / "result.json").read_text())
    for row in content["ranking"]:
        row["images_seen"] = 256 if row["index"] - 1 == cheapest else 1000
    (run / "result.json").write_text(json.dumps(content))
    rows = {row["architecture"]: row["Pareto"] for row in report(run).table("rank")}
    assert rows[str(SPACE[cheapest])] == ""
    assert "yes" in rows.values()


def test_panels_hold_fronts_quartiles_and_the_default() -> None:
    macs = CostPanel(label="MACs relative", cost=[1.0, 2.0, 3.0])
    slow = CostPanel(label="ms", cost=[6.0, 5.0, 4.0], quartiles=[(5.5, 7.0), (4.5, 5.5), (4.0, 4.0)])
    with style():
        figure = pareto_panels(["a", "b", "c"], [macs, slow], [10.0, 20.0, 15.0], default=2, accuracy_label="y")
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[1, 10], [2, 20]]
    assert right.lines[0].get_xydata().tolist() == [[4, 15], [5, 20]]
    assert right.lines[1].get_xydata().tolist() == [[4, 15]]
    assert right.lines[2].get_xydata().tolist() == [[6, 10], [5, 20]]  # those of the front against MACs
    (bars,) = (found for found in right.collections if isinstance(found, LineCollection))
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[5.5, 7], [4.5, 5.5], [4, 4]]
    assert [text.get_text() for text in right.texts] == ["b", "c"]


def test_latency_in_proportion_to_macs_is_dotted_through_the_default() -> None:
    panel = CostPanel(label="ms", cost=[3.0, 8.0], quartiles=[(2.0, 4.0), (8.0, 9.0)])
    with style():
        (axis,) = latency_figure([0.5, 1.0], [panel], default=1).axes
        (alone,) = latency_figure([0.5, 2.0], [panel], default=None).axes
    assert axis.lines[0].get_xydata().tolist() == [[0, 0], [1, 8]]
    assert axis.lines[1].get_xydata().tolist() == [[1, 8]]
    assert list(alone.lines) == []
