"""What each method alone found: figures hold the numbers of the records, and stand only where there are records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PatchCollection, QuadMesh
from matplotlib.colors import to_hex
from scipy import stats

from bmsn.config import SearchConfig
from bmsn.figures import ACCENT, PALETTE, style
from bmsn.figures_methods import course_figure, layers_figure, levels_figure, path_figure, tree_figure
from bmsn.reporting import write_report
from bmsn.reporting_records import TreeNode
from bmsn.reporting_run import read_runs
from bmsn.run import run_search
from bmsn.space import SearchSpace
from html_pages import HtmlPage, do_not_draw
from run_folders import write_run
from searching import write_tiny_set

SPACE = SearchSpace.named("resnet14-cifar10")
HEADING = "What the method found"
CAPTIONS = {
    "path": "The resolution at which each layer works.",
    "shares": "Share of each resolution in each layer",
    "accuracies": "Moving average of the validation accuracies of the paths",
    "tree": "The tree at the end.",
    "visits": "Left: share of the visits since the snapshot before.",
    "probability": "Above: inverse temperature k",
    "supernets": "Accuracies in each supernet and their mean.",
}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_draw(monkeypatch)


def report(run: Path) -> HtmlPage:
    return HtmlPage.read(write_report([run], run.parent / "page.html"))


def captions(page: HtmlPage) -> set[str]:
    return {name for name, begins in CAPTIONS.items() if any(caption.startswith(begins) for caption in page.captions)}


# Figures. -------------------------------------------------------------------------------------------------------------


def test_tree_has_a_box_a_node_and_names_where_there_is_room() -> None:
    def node(layer: int, left: float, width: float, pools: bool = False, picked: bool = False) -> TreeNode:
        return TreeNode(
            layer=layer, pools=pools, left=left, width=width, visits=round(100 * width), reward=width, picked=picked
        )

    nodes = [node(0, 0, 1, picked=True), node(1, 0, 0.99, pools=True, picked=True), node(1, 0.99, 0.01)]
    with style():
        (axis, *_) = tree_figure(nodes, ["[1,1]", "[2]"], 2).axes
    (boxes,) = (found for found in axis.collections if isinstance(found, PatchCollection))
    assert [path.get_extents().bounds for path in boxes.get_paths()] == [
        pytest.approx(bounds) for bounds in ((0, -0.5, 1, 1), (0, 0.5, 0.99, 1), (0.99, 0.5, 0.01, 1))
    ]
    assert boxes.get_array().tolist() == pytest.approx([100, 99, 1])
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["[1,1]"]  # one of 1 % has no room
    assert [text.get_text() for text in axis.texts] == ["100", "99"]
    assert len(axis.patches) == 2  # frames of the path


def test_course_has_a_row_an_architecture_and_time_from_the_start() -> None:
    weight, value = np.array([[0.0, 100], [30, 70]]), np.array([[np.nan, 5.0], [4, 6]])
    with style():
        figure = course_figure(
            np.array([1.0, 3.0]), [("w", weight), ("v", value)], ["a", "b"], x_label="epoch",
            curves=[("k", [1, 3], [1, 100]), ("e", [1, 3], [2, 1])],
        )  # fmt: skip
    maps = [mesh for axis in figure.axes[:4] for mesh in axis.collections if isinstance(mesh, QuadMesh)]
    np.testing.assert_equal([np.ma.filled(mesh.get_array(), np.nan) for mesh in maps], [weight.T, value.T])
    assert maps[0].get_coordinates()[0, :, 0].tolist() == [0, 1, 3]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1, 100]
    assert figure.axes[2].get_ylim() == (1.5, -0.5)  # the first architecture at the top


def test_a_line_each_resolution_and_none_where_no_path_goes() -> None:
    values = np.full((3, 4, 2), np.nan)
    values[:, 1:, 0] = [[0.1] * 3, [0.2] * 3, [0.3] * 3]
    values[1:, 3, 1] = 0.5  # layer 3 alone works at the second resolution, from the second snapshot on
    with style():
        figure = layers_figure(np.array([1.0, 2, 3]), values, [8, 4], x_label="epoch", y_label="share (%)")
    lines = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes[:3]]
    first = [[1, 10], [2, 20], [3, 30]]
    expected = [[first, []], [first, []], [first, [[2, 50], [3, 50]]]]
    for found, wanted in zip(lines, expected, strict=True):
        for line, points in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.reshape(line, (-1, 2)), np.reshape(points, (-1, 2)))
    assert [axis.get_title(loc="left") for axis in figure.axes[:3]] == ["layer 1", "layer 2", "layer 3"]


@pytest.mark.parametrize("with_shares", [True, False])
def test_path_is_orange_where_it_goes_up(with_shares: bool) -> None:
    shares = np.full((4, 3), 1 / 3) if with_shares else None
    with style():
        (axis,) = path_figure([0, 2, 1, 1], [32, 16, 8], shares).axes
    drawn = [(line.get_xydata().tolist(), to_hex(line.get_color())) for line in axis.lines[:3]]
    assert drawn == [
        ([[0, 0], [1, 2]], PALETTE[0].lower()),
        ([[1, 2], [2, 1]], ACCENT.lower()),
        ([[2, 1], [3, 1]], PALETTE[0].lower()),
    ]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts.pop((0, 0)) == "32"  # layer 0 has no choice
    assert len(texts) == 9
    assert texts[2, 1] == ("33.3" if with_shares else "16")


def test_levels_are_means_and_the_best_is_named() -> None:
    with style():
        (axis,) = levels_figure(
            [("1", [("[a]", 10.0), ("[b]", 40.0)]), ("2", [("[c]", 5.0)])], x_label="x", y_label="y"
        ).axes
    levels = [lines.get_segments()[0][0][1] for lines in axis.collections if hasattr(lines, "get_segments")]
    assert levels == [25, 5]
    assert [text.get_text() for text in axis.texts] == ["[b]", "[c]"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1\n2", "2\n1"]


# Where they stand. ----------------------------------------------------------------------------------------------------

SEARCHES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mcts": ({"max_macs": "1x"}, {"tree", "visits"}),  # numbers its architectures otherwise than the space
    "boltzmann": ({"warm_up": 0.5}, {"probability"}),
    "few-shot": ({"truth": True}, {"supernets"}),
    "gaea": ({}, {"path", "shares"}),
    "spos-unshared": ({"max_macs": "0.6x"}, {"accuracies"}),
    "spos-unshared-all": ({}, {"path", "accuracies"}),
    "macs": ({}, set()),
}

AVERAGES = "the moving averages a[c] of validation accuracies after step 8"
UNFINISHED = {
    "mcts": "visits in the tree, from its root down, after step 8 (accuracies are mean rewards)",
    "boltzmann": AVERAGES,
    "few-shot": AVERAGES,
    "gaea": "the shares of its resolutions after step 8",
    "spos-unshared-all": (
        "the mean over layers of the moving averages of validation accuracies at their resolutions after step 8"
    ),
}


@pytest.mark.parametrize("method", SEARCHES)
def test_real_search(method: str, tmp_path: Path) -> None:
    settings, expected = SEARCHES[method]
    settings = dict(settings)
    if settings.pop("truth", False):
        (tmp_path / "truth.csv").write_text(
            "stage_depths,accuracy_mean\n" + "".join(f"{a.slug},{50 + a.index}\n" for a in SPACE)
        )
        settings["truth"] = str(tmp_path / "truth.csv")
    result = run_search(
        SearchConfig(
            space=SPACE.name, data=write_tiny_set(tmp_path / "tiny.npz"), method=method, epochs=2, batch_size=16,
            device="cpu", fast_eval=True, out=tmp_path / "run", **settings,
        )
    )  # fmt: skip
    page = report(tmp_path / "run")
    assert captions(page) == expected
    assert (HEADING in page.headings) == bool(expected)
    if method == "few-shot":
        rows = page.table("first pooling before layer")
        assert [row["n"] for row in rows] == ["5", "4", "3", "2", "1"]
        assert sum(int(row["visits"]) for row in rows) == 8  # steps
        assert set(rows[3]["architectures"].split()) == {"[4,1,2]", "[4,2,1]"}
        assert rows[3]["mean alone %"] == "62.50"  # of 50 + 12 and 50 + 13
    if method == "mcts":
        records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        last = [record for record in records if record["kind"] == "tree"][-1]
        assert len(last["visits"][-1]) < len(SPACE)
    if method in UNFINISHED:  # killed between its last record and its result
        (tmp_path / "run" / "result.json").unlink()
        (reported,) = read_runs([tmp_path / "run"])
        own = list(result.ranking)
        if method in ("few-shot", "spos-unshared-all"):  # which rank by the accuracies of the final scoring
            own.sort(key=lambda row: row.ema_rank or len(SPACE) + row.architecture.index)
        assert [(row.architecture, row.supernet) for row in reported.rows] == [
            (row.architecture, row.supernet) for row in own
        ]
        known = [row.other["ema_accuracy"] if method == "gaea" else row.accuracy for row in reported.rows]
        assert known == pytest.approx([row.ema_accuracy for row in own])
        assert reported.ranked_by == UNFINISHED[method]


@pytest.mark.parametrize("method", ["spos-unshared", "spos-unshared-all"])
def test_unfinished_run_without_weight_sharing(method: str, tmp_path: Path) -> None:
    """Mean over layers; what passes a layer at a resolution that never trained comes last, without an accuracy."""
    run = write_run(tmp_path / "run", SPACE, finished=False)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("method: mixture", f"method: {method}"))
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step", ' in line]
    accuracy = np.random.default_rng(1).random((7, 3))
    visits = np.ones((7, 3), int)
    visits[3, 0] = accuracy[3, 0] = 0  # [4,1,2] and the two behind it
    record = {"kind": "resolutions", "step": 95, "visits": visits.tolist(), "accuracy": accuracy.tolist()}
    (run / "metrics.jsonl").write_text("\n".join([*steps, json.dumps(record), ""]))
    expected = {
        a.slug: np.mean([accuracy[layer, r] for layer, r in enumerate(np.repeat([0, 1, 2], a.stage_depths))])
        for a in SPACE
        if a.stage_depths[0] < 4
    }
    page = report(run)
    (reported,) = read_runs([run])
    assert [row.architecture.slug for row in reported.rows] == [
        *sorted(expected, key=lambda slug: -expected[slug]), "4-1-2", "4-2-1", "5-1-1",
    ]  # fmt: skip
    assert [row.accuracy for row in reported.rows] == [
        *map(pytest.approx, sorted(expected.values(), reverse=True)), None, None, None,
    ]  # fmt: skip
    by = "the mean over layers of the moving averages of validation accuracies at their resolutions after step 95"
    assert f"Architectures are ranked by {by}" in page.text


def test_older_schemas_have_none_of_it(tmp_path: Path) -> None:
    for version in (2, 3, 4):
        run = write_run(tmp_path / str(version), SPACE, num_supernets=1)
        content = json.loads((run / "result.json").read_text()) | {"schema_version": version}
        for key in ("method", "latency"):
            content.pop(key, None)
        (run / "result.json").write_text(json.dumps(content))
        page = report(run)
        assert captions(page) == set()
        assert HEADING not in page.headings


def test_unfinished_run_has_what_is_recorded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE, num_supernets=1, finished=False)
    record = {"kind": "boltzmann", "step": 90, "probability": [1 / 15] * 15, "scores": [None] * 14 + [0.5]}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert captions(report(run)) == {"probability"}


def test_ranking_on_the_way_of_a_method_with_its_own_order(tmp_path: Path) -> None:
    """As of mcts with score_every: the accuracies stand beside its order and don't decide it."""
    run = write_run(tmp_path / "run", SPACE, finished=False)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("method: mixture", "method: mcts"))
    order = np.random.default_rng(2).permutation(len(SPACE)).tolist()
    record = {"kind": "ranking", "step": 95, "epoch": 9, "accuracy": {SPACE[i].slug: 0.1 + i / 100 for i in order},
              "supernet": {SPACE[i].slug: 0 for i in order}}  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    alone = {a.index: float(a.index) for a in SPACE}
    (tmp_path / "truth.csv").write_text(
        "stage_depths,accuracy_mean\n" + "".join(f"{SPACE[i].slug},{value}\n" for i, value in alone.items())
    )
    (reported,) = read_runs([run], str(tmp_path / "truth.csv"))
    assert [row.architecture.index for row in reported.rows] == order
    assert reported.ranked_by == "visits in the tree, from its root down, after epoch 9"
    ranks = stats.kendalltau([-order.index(i) for i in alone], list(alone)).statistic
    assert reported.agreement["ranking"]["kendall_tau_b"] == pytest.approx(ranks)
    assert reported.agreement["accuracy"]["kendall_tau_b"] == pytest.approx(1)


def test_tree_without_a_visit_is_left_out(tmp_path: Path) -> None:
    """As of a search whose loss was not finite from the first step on."""
    run = write_run(tmp_path / "run", SPACE, num_supernets=1, finished=False)
    sizes = [len(wave) for wave in SPACE.prefix_tree()]
    record = {"kind": "tree", "step": 5, "visits": [[0] * n for n in sizes], "reward": [[None] * n for n in sizes]}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert captions(report(run)) == set()


def test_unfinished_run_within_macs_has_the_right_names(tmp_path: Path) -> None:
    """The mixture numbers those that the limit left: of 15, 8 of at most 0.9x."""
    run = write_run(tmp_path / "run", SPACE, finished=False)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_macs: null", "max_macs: 0.9x"))
    left = [a for a in SPACE if SPACE.macs(a) <= 0.9 * SPACE.macs(SPACE.default)]
    scores = [[i / 10, 0.0] for i in range(len(left))]
    record = {
        "kind": "mixture", "step": 95, "scores": scores, "visits": [[1, 1]] * len(left),
        "assignment": [[1.0, 0.0]] * len(left), "last_visit": [[1, 2]] * len(left),
    }  # fmt: skip
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step", ' in line]
    (run / "metrics.jsonl").write_text("\n".join([*steps, json.dumps(record), ""]))
    rows = report(run).table("rank")
    assert len(left) == 8
    assert [row["architecture"] for row in rows] == [str(a) for a in reversed(left)]


def test_unfinished_run_on_images_of_another_size(tmp_path: Path) -> None:
    """Its limit on MACs, its names and its MACs are those of its images: here 8 pixels, one channel, 3 classes."""
    run = write_run(tmp_path / "run", SPACE, finished=False)
    config = (run / "config.yaml").read_text()
    space = SPACE.resized(8)
    macs = [space.macs(a, num_classes=3, in_channels=1) for a in space]
    limit = sorted(macs)[7]
    (run / "config.yaml").write_text(config.replace("max_macs: null", f"max_macs: {limit / 1e6}M"))
    left = [a for a in space if macs[a.index] <= limit]
    data = {"kind": "data", "step": 0, "name": "small", "num_classes": 3, "image_size": 8, "in_channels": 1}
    record = {
        "kind": "mixture", "step": 95, "scores": [[i / 10, 0.0] for i in range(len(left))],
        "visits": [[1, 1]] * len(left), "assignment": [[1.0, 0.0]] * len(left), "last_visit": [[1, 2]] * len(left),
    }  # fmt: skip
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step", ' in line]
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(data), *steps, json.dumps(record), ""]))
    (reported,) = read_runs([run])
    assert [row.architecture for row in reported.rows] == left[::-1]
    assert [row.macs for row in reported.rows] == [macs[a.index] for a in left[::-1]]
    assert (reported.image_size, reported.data_name) == (8, "small")


def test_findings_with_html_are_text(tmp_path: Path) -> None:
    evil = "</td><script>alert(1)</script>"
    method = {
        "ranked_by": evil, "estimate": evil, evil: evil, "counts": {evil: 1}, "rows": [{evil: evil}],
        "resolution_path": "0-0-1-1-2-2-2", "resolution_path_architecture": evil,
    }  # fmt: skip
    page = report(write_run(tmp_path / "run", SPACE, method=method))
    assert page.tags.count("script") == 1
    assert page.text.count(evil) >= 5
