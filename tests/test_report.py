"""Reports: their numbers against the run's files and scipy, what is there when, one file alone, a real search."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bmsn.config import SearchConfig
from bmsn.figures import style, to_png, to_svg
from bmsn.figures_accuracy import accuracy_map, runs_truth_figure
from bmsn.reporting import write_report
from bmsn.reporting_page import Plot
from bmsn.reporting_reproduction import search_command
from bmsn.reporting_run import read_runs
from bmsn.reporting_several import several_blocks
from bmsn.run import run_search
from bmsn.search import parse
from bmsn.space import SearchSpace
from html_pages import HtmlPage, assert_within, do_not_draw
from run_folders import write_run
from searching import write_tiny_set

SPACE = SearchSpace.named("resnet14-cifar10")
ALWAYS = ["Ranking", "Accuracy by pooling positions", "Accuracy against cost", "Architectures",
          "What the method found", "Training", "The mixture", "To reproduce"]  # fmt: skip


def write_truth(path: Path, accuracies: list[float]) -> str:
    rows = [f"{a.slug},{value}" for a, value in zip(SPACE, accuracies, strict=False)]
    path.write_text("\n".join(["stage_depths,accuracy_mean", *rows, ""]))
    return str(path)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes seconds, except in tests marked `drawn`."""
    if request.node.get_closest_marker("drawn") is None:
        do_not_draw(monkeypatch)


def report(*runs: Path, **options: str) -> HtmlPage:
    return HtmlPage.read(write_report(runs, runs[0].parent / "page.html", **options))


# Numbers. -------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_run_and_of_scipy(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    found, alone = rng.permutation(15) / 20, rng.permutation(15) + 50.0
    truth = write_truth(tmp_path / "truth.csv", alone.tolist())
    page = report(write_run(tmp_path / "run", SPACE, accuracy=found.tolist(), truth=truth))

    macs = np.array([SPACE.macs(a) for a in SPACE])
    rows = page.table("rank")
    order = np.argsort(-found)
    assert [row["architecture"] for row in rows] == [str(SPACE[i]) for i in order]
    assert [float(row["accuracy %"]) for row in rows] == pytest.approx(100 * found[order], abs=0.006)
    assert [float(row["alone %"]) for row in rows] == pytest.approx(alone[order], abs=0.006)
    assert [row["pooling before"] for row in rows] == [", ".join(map(str, SPACE[i].pool_positions)) for i in order]
    front = [i for i in order if not any((macs[j] <= macs[i]) and found[j] > found[i] for j in range(15))]
    assert {row["architecture"] for row in rows if row["Pareto"]} == {str(SPACE[i]) for i in front}

    ranking, ema, by_macs = page.table("ranking")
    assert float(ranking["tau-b"]) == pytest.approx(stats.kendalltau(found, alone).statistic, abs=6e-4)
    assert float(ranking["Spearman"]) == pytest.approx(stats.spearmanr(found, alone).statistic, abs=6e-4)
    assert ema["tau-b"] == ranking["tau-b"]  # made to be half of it
    assert float(by_macs["tau-b"]) == pytest.approx(stats.kendalltau(macs, alone).statistic, abs=6e-4)
    assert float(ranking["regret of top 1"]) == pytest.approx(alone.max() - alone[order[0]], abs=0.006)


def test_table_of_the_mixture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE, steps=(20, 60, 100))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mixture = [record for record in records if record["kind"] == "mixture"]
    rows = report(run).table("step")
    assert [row["step"] for row in rows] == ["20", "60", "100"]
    visits = np.array([record["visits"] for record in mixture]).sum(1)
    since = visits[1] - visits[0]
    assert float(rows[1]["most load %"]) == pytest.approx(100 * since.max() / since.sum(), abs=0.06)
    assert rows[0]["changed %"] == "-"
    best = [np.argmax(record["assignment"], axis=1) for record in mixture]
    assert float(rows[2]["changed %"]) == pytest.approx(100 * np.mean(best[2] != best[1]), abs=0.06)


@pytest.mark.parametrize(
    ("layers", "pools", "panels"), [(5, 1, 0), (7, 2, 1), (6, 3, 3), (6, 4, None)], ids=["bars", "map", "maps", "none"]
)
def test_map_of_pooling_positions(layers: int, pools: int, panels: int | None) -> None:
    space = SearchSpace(layers, pools, [4] * layers, image_size=32)
    accuracy = {a.index: 10.0 + a.index for a in space if a.index != 1}
    with style():
        figure = accuracy_map(space, accuracy, "accuracy")
    if panels is None:
        assert figure is None
        return
    assert figure is not None
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    if pools == 1:
        assert [bar.get_height() for bar in figure.axes[0].patches] == [10, 12, 13]
        return
    assert len(images) == panels
    drawn = {}
    for first, image in enumerate(images, start=1):
        for y, x in np.argwhere(np.isfinite(image.filled(np.nan))):
            drawn[(first, y, x) if pools == 3 else (y, x)] = float(image[y, x])
    assert drawn == {a.pool_positions: accuracy[a.index] for a in space if a.index in accuracy}


def test_command_gives_the_same_settings(tmp_path: Path) -> None:
    config = SearchConfig(
        space="resnet20-cifar10", data="folder:/a b/$c", supernets=3, preset="authors", fast_eval=True, race=3,
        balance_every="epoch", truth="paper", score="best",
    ).filled()  # fmt: skip
    command = search_command(config.as_dict())
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert parse(words.stdout.splitlines()[3:]).search.filled().as_dict() == config.as_dict()


# What is there when. --------------------------------------------------------------------------------------------------


def test_everything_that_has_data_is_there_and_nothing_else(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", SPACE))
    assert page.headings[2:] == ALWAYS
    assert "p(m|c): which supernet" in page.text

    truth = write_truth(tmp_path / "truth.csv", [50.0 + i for i in range(14)])
    one = write_run(tmp_path / "one", SPACE, num_supernets=1, truth=truth)
    (one / "retrain.csv").write_text("# title\nstage_depths,accuracy_mean\n3-2-2,91.5\n")
    ranking = {"kind": "ranking", "step": 50, "epoch": 5, "accuracy": {a.slug: 0.1 + a.index / 100 for a in SPACE}}
    with (one / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ranking) + "\n" + json.dumps({"kind": "unheard of", "step": 51}) + "\n")
    page = report(one)
    assert page.headings[2:] == ["Against the truth", *ALWAYS[:4], "Retrained alone", "Rankings during training",
                                 *ALWAYS[5:]]  # fmt: skip  # of one supernet there is nothing to compare
    assert "p(m|c): which supernet" not in page.text
    assert f"Without a row in the truth: {SPACE[14]}." in page.text
    assert page.table("stage_depths") == [{"stage_depths": "3-2-2", "accuracy_mean": "91.5"}]


def test_result_without_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE)
    (run / "metrics.jsonl").unlink()
    assert report(run).headings[2:] == [*ALWAYS[:5], "To reproduce"]


@pytest.mark.parametrize("ranked", [False, True], ids=["a[c,m]", "ranking"])
def test_unfinished_run_says_so_and_ranks_by_what_it_has(ranked: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE, finished=False, steps=(20, 40))
    mixture = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    found = [scores[int(np.argmax(p))] for scores, p in zip(mixture["scores"], mixture["assignment"], strict=True)]
    if ranked:
        found = np.random.default_rng(0).random(15).tolist()
        record = {"kind": "ranking", "step": 40, "epoch": 4, "accuracy": {}, "supernet": {}}
        for a in SPACE:
            record["accuracy"][a.slug], record["supernet"][a.slug] = found[a.index], 0  # type: ignore[index]
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n" + '{"kind": "step", "st')  # torn: being written
    page = report(run)
    what = "validation accuracy after epoch 4" if ranked else "a[c,m] after step 40"
    assert f"This run is unfinished: it has recorded 40 steps. Architectures are ranked by {what}" in page.text
    assert [row["architecture"] for row in page.table("rank")] == [str(SPACE[i]) for i in np.argsort(found)[::-1]]


def test_several_runs_of_different_spaces(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "run", SPACE)
    other = write_run(tmp_path / "b" / "run", SearchSpace.named("resnet18-cifar10"), finished=False)
    page = report(one, other)
    rows = page.table("run")
    assert [row["run"] for row in rows] == ["run", "run-2"]
    assert [row["state"] for row in rows] == ["finished", "unfinished"]
    assert [row["space"] for row in rows] == ["resnet14-cifar10", "resnet18-cifar10"]
    assert [heading for heading in page.headings if heading.startswith("run")] == ["run", "run-2"]
    assert "All runs: data synthetic" not in page.text  # tiny and synthetic
    assert "method mixture" in page.text


def test_runs_that_share_space_and_truth_have_one_figure(tmp_path: Path) -> None:
    """Each in a colour and with a mark of its own, with what the legend says; others are left out."""
    rng = np.random.default_rng(4)
    alone = rng.permutation(15) + 50.0
    found = {f"M{m}": rng.permutation(15) / 20 for m in (1, 2, 4)}
    truth = write_truth(tmp_path / "truth.csv", alone.tolist())
    same = str(shutil.copy(truth, tmp_path / "same.csv"))
    runs = [
        write_run(tmp_path / name, SPACE, accuracy=found[name].tolist(), truth=named, num_supernets=int(name[1]))
        for name, named in zip(found, (truth, truth, same), strict=True)
    ]
    other = write_truth(tmp_path / "other.csv", [50.0 + i for i in range(15)])
    strangers = [
        write_run(tmp_path / "other", SPACE, truth=other), write_run(tmp_path / "none", SPACE),
        write_run(tmp_path / "unscored", SPACE, accuracy=[None] * 15, truth=truth),
    ]  # fmt: skip
    with style():
        *_, plot = several_blocks(read_runs([*runs, *strangers]))
    assert isinstance(plot, Plot)
    (axis,) = plot.figure.axes
    (legend,) = plot.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{name}, M = {name[1:]}: tau-b {stats.kendalltau(found[name], alone).statistic:.3f}" for name in found
    ]
    for points, name in zip(axis.collections, found, strict=True):
        assert sorted(points.get_offsets().tolist()) == sorted(np.column_stack([100 * found[name], alone]).tolist())
    assert len({tuple(points.get_facecolor()[0]) for points in axis.collections}) == 3
    page = report(*runs, *strangers)
    assert page.captions[0].startswith("resnet14-cifar10: accuracy in the search")
    heading = "Searches against the truth"
    assert heading in page.headings
    assert heading not in report(runs[0], *strangers).headings
    assert heading not in report(runs[0]).headings


def test_legend_of_several_runs_is_within_the_figure() -> None:
    names = [f"{name}: tau-b 0.500" for name in ("a", 120 * "x", "mixture-" * 15)]
    assert_within(lambda: runs_truth_figure([(name, [1.0, 2.0], [3.0, 4.0]) for name in names], "accuracy"))


def test_constant_accuracies_have_no_tau_and_the_reason_stands_there(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.csv", [50.0 + i for i in range(15)])
    page = report(write_run(tmp_path / "run", SPACE, accuracy=[0.5] * 15), truth=truth)
    ranking = page.table("ranking")[0]
    assert ranking["tau-b"] == "-"
    assert ranking["not defined"] == "constant ranking"
    assert "nan" not in page.text.lower()


def test_not_scored_architectures_are_listed_without_accuracy(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", SPACE, accuracy=[0.5, 0.6] + [None] * 13))
    assert [row["accuracy %"] for row in page.table("rank")][:3] == ["60.00", "50.00", "-"]


def test_truth_that_is_gone_is_a_note_and_can_be_given(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE, truth="/nonexistent.csv")
    page = report(run)
    assert "Against the truth" not in page.headings
    assert "/nonexistent.csv" in page.text
    given = write_truth(tmp_path / "truth.csv", [50.0 + i for i in range(15)])
    assert "Against the truth" in report(run, truth=given).headings


def test_method_that_ranks_in_its_own_way_and_finds_a_path(tmp_path: Path) -> None:
    """As darts: no supernets, an estimate, a ranking that is not by accuracy, and shares of resolutions."""
    rng = np.random.default_rng(5)
    found, estimate, alone = (rng.permutation(15) / 20 for _ in range(3))
    counts = [{"layer": 1, "keep": 7, "pool": 9}, {"layer": 2, "keep": None, "pool": 4}]
    method = {"ranked_by": "the shares", "estimate": "mean share", "resolution_path": "0-0-1-2-1-1-1",
              "other": 3, "visits": {"1-1-5": 12},
              "tree": counts, "shares": rng.dirichlet([1.0] * 3, size=7).tolist()}  # fmt: skip
    run = write_run(tmp_path / "run", SPACE, method=method, cost={"training_images": 4711})
    content = json.loads((run / "result.json").read_text())
    by_index = {row["index"] - 1: row for row in content["ranking"]}
    content["ranking"] = [
        by_index[i] | {"rank": place, "accuracy": found[i], "ema_accuracy": estimate[i], "supernet": None}
        for place, i in enumerate(np.argsort(-estimate).tolist(), start=1)
    ]
    content["ranking"][-1] |= {"ema_accuracy": None, "ema_rank": None}
    (run / "result.json").write_text(json.dumps(content))
    shares = rng.dirichlet([1.0] * 3, size=7).tolist()
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "alpha", "step": 9, "shares": shares, "path": "0"}) + "\n")
    page = report(run, truth=write_truth(tmp_path / "truth.csv", (100 * alone).tolist()))
    assert page.headings[2:] == [
        "Against the truth",
        *ALWAYS[:5],
        "To reproduce",
    ]
    assert "Path of resolutions: 0-0-1-2-1-1-1; no architecture of the space." in page.text
    assert page.table("found") == [{"found": "other", "value": "3"}]
    assert page.table("visits") == [{"visits": "1-1-5", "value": "12"}]
    assert page.table("layer")[1] == {"layer": "2", "keep": "-", "pool": "4"}
    rows = {row["ranking"]: row["tau-b"] for row in page.table("ranking")}
    last = int(np.argmin(estimate))
    rest = np.arange(15) != last
    assert rows == {
        "this ranking": f"{stats.kendalltau(estimate, alone).statistic:.3f}",
        "by accuracy": f"{stats.kendalltau(found, alone).statistic:.3f}",
        "by mean share": f"{stats.kendalltau(estimate[rest], alone[rest]).statistic:.3f}",
        "by MACs alone": f"{stats.kendalltau([SPACE.macs(a) for a in SPACE], alone).statistic:.3f}",
    }
    ranking = page.table("rank")
    assert ranking[-1]["mean share %"] == "-"
    assert "supernet" not in ranking[0]
    assert "4711" in page.text
    assert "Ranked by the shares." in page.text


def test_accuracies_after_adaptation_are_called_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE)
    assert "a copy of the supernet trains" not in report(run).text
    content = json.loads((run / "result.json").read_text())
    content["config"]["adapt"] = 5
    (run / "result.json").write_text(json.dumps(content))
    assert "a copy of the supernet trains 5 steps with that architecture alone." in report(run).text


def test_method_that_scores_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE, accuracy=[None] * 15, method={"ranked_by": "MACs", "estimate": "MACs"})
    (run / "metrics.jsonl").unlink()
    page = report(run, truth=write_truth(tmp_path / "truth.csv", [50.0 + i for i in range(15)]))
    assert page.headings[2:] == [
        "Against the truth",
        "Ranking",
        ALWAYS[1],
        "Architectures",
        "To reproduce",
    ]  # of the truth


def test_a_race_leaves_some_out_of_the_comparison(tmp_path: Path) -> None:
    accuracy = [(i * 7 % 15) / 20 + 0.1 for i in range(15)]
    run = write_run(tmp_path / "run", SPACE, accuracy=accuracy)
    content = json.loads((run / "result.json").read_text())
    for row in content["ranking"][5:]:
        row["images_seen"] = 256
    (run / "result.json").write_text(json.dumps(content))
    page = report(run, truth=write_truth(tmp_path / "truth.csv", [50.0 + i for i in range(15)]))
    assert [row["n"] for row in page.table("ranking")] == ["5", "15", "15"]
    assert [row["images"] for row in page.table("rank")] == ["1000"] * 5 + ["256"] * 10


def test_older_schema(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE)
    content = json.loads((run / "result.json").read_text()) | {"schema_version": 1}
    for row in content["ranking"]:
        del row["images_seen"]
    (run / "result.json").write_text(json.dumps(content))
    assert report(run).headings[2:] == ALWAYS


# One file, safe whatever names say. -----------------------------------------------------------------------------------


@pytest.mark.drawn
def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.csv", [50.0 + i for i in range(15)])
    runs = [write_run(tmp_path / name, SPACE, truth=truth, steps=(50, 100)) for name in ("one", HTML)]
    path = write_report(runs, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    html = path.read_text()
    page = HtmlPage(html)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert [url for url in re.findall(r"url\(([^)]*)\)", html) if not url.startswith("#")] == []
    assert not {"link", "iframe", "object", "embed", "img"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    figures = {file.name for file in (tmp_path / "out" / "report-figures").iterdir()}
    names = ("truth", "map", "map-truth", "pareto", "drawings", "supernets", "training", "assignment", "mixture")
    files = {f"run-{n}-{name}" for n in (1, 2) for name in names} | {"runs-truth-1"}
    assert figures == {f"{name}.{kind}" for name in files for kind in ("png", "svg")}
    assert page.tags.count("figure") == len(figures) / 2


HTML = "<img src=x onerror=alert(1)>&amp;$x_$"


def test_names_with_html_are_text(tmp_path: Path) -> None:
    """Whatever a user names: classes (no page shows them yet), file of the images, file of the truth, run folder."""
    images = tmp_path / f"{HTML}.npz"
    spec = write_tiny_set(images)
    with np.load(images) as arrays:
        np.savez(images, class_names=[f"{HTML}{i}" for i in range(4)], **arrays)
    truth = write_truth(tmp_path / f"{HTML}.csv", [60.0 + i for i in range(15)])
    config = SearchConfig(
        space=SPACE.name, data=spec, supernets=2, epochs=1, batch_size=16, device="cpu", fast_eval=True, truth=truth,
        out=tmp_path / f"{HTML} run",
    )  # fmt: skip
    run_search(config)
    page = report(tmp_path / f"{HTML} run", write_run(tmp_path / "other", SPACE))
    assert "img" not in page.tags
    assert f"{HTML} run" in page.headings
    assert page.table("run")[0]["run"] == f"{HTML} run"
    assert page.table("Data")[0] == {"Data": "name", "value": HTML}
    assert f"data: npz:{tmp_path / HTML}.npz" in page.text.replace("\n  ", " ")
    assert report(tmp_path / f"{HTML} run").headings[0] == f"resnet14-cifar10 on {HTML}"


def test_same_numbers_give_the_same_bytes() -> None:
    drawn = []
    for _ in range(2):
        with style():
            figure = accuracy_map(SPACE, {a.index: float(a.index) for a in SPACE}, "accuracy")
        assert figure is not None
        drawn.append((to_svg(figure), to_png(figure)))
    assert drawn[0] == drawn[1]


# A real run. ----------------------------------------------------------------------------------------------------------


def test_report_of_a_real_search(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.csv", [60.0 + i * 3 % 15 for i in range(15)])
    spec = write_tiny_set(tmp_path / "tiny.npz")
    config = SearchConfig(
        space=SPACE.name, data=spec, supernets=2, epochs=2, batch_size=16, device="cpu", fast_eval=True, score_every=1,
        truth=truth, out=tmp_path / "run",
    )  # fmt: skip
    result = run_search(config)
    page = report(tmp_path / "run")
    headings = page.headings[2:]
    assert headings == ["Against the truth", *ALWAYS[:5], "Rankings during training", *ALWAYS[5:]]
    assert [row["architecture"] for row in page.table("rank")] == [str(row.architecture) for row in result.ranking]
    for row, key in zip(page.table("ranking"), ("ranking", "ema", "macs"), strict=True):
        expected = result.truth[key]["kendall_tau_b"]
        assert row["tau-b"] == ("-" if expected is None else f"{expected:.3f}")
    assert result.data["fingerprint"] in page.text
