"""Comparisons in a report: numbers of comparison.json, figures against the budget, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bmsn.comparison import ComparisonConfig, run_comparison
from bmsn.errors import InputError
from bmsn.figures import style
from bmsn.figures_comparison import comparison_figure
from bmsn.report import main
from bmsn.reporting import write_report
from bmsn.run import Interrupted
from bmsn.scheduler import Resources
from bmsn.space import SearchSpace
from comparison_folders import make_comparison, write_comparison
from html_pages import HtmlPage, assert_within, do_not_draw
from run_folders import write_run
from searching import write_tiny_set

SPACE = SearchSpace.named("resnet14-cifar10")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_draw(monkeypatch)


def test_tables(tmp_path: Path) -> None:
    comparison = write_comparison(tmp_path / "comparison", make_comparison())
    page = HtmlPage.read(write_report([comparison], tmp_path / "page.html"))
    assert page.headings[1:] == ["comparison", "What they pick", "How they rank, and what they cost",
                                 "Differences, seed by seed", "To reproduce"]  # fmt: skip
    picked, ranked, paired = ([dict(zip(table[0], row, strict=True)) for row in table[1:]] for table in page.tables)
    assert picked[0] == {
        "budget": "5", "method": "mixture", "seeds": "3", "picks": "2-2-3 (2), 3-1-3 (1)\npath 0-1",
        "accuracy %": "0.55\n[0.30, 0.80]", "regret": "0.55\n[0.30, 0.80]", "top 3": "0.55\n[0.30, 0.80]",
        "top 5": "0.55\n[0.30, 0.80]", "MACs": "0.55x\n[0.30x, 0.80x]", "gain at 1x": "0.55\n[0.30, 0.80]",
    }  # fmt: skip
    assert ranked[0] == {
        "budget": "5", "method": "mixture", "seeds": "3", "tau-b": "0.550\n[0.300, 0.800]",
        "Spearman": "0.550\n[0.300, 0.800]", "partial": "0.550\n[0.300, 0.800]", "training images": "5000",
        "training TMACs": "6.25", "validation images": "77", "validation TMACs": "0.0045", "training s": "11",
    }  # fmt: skip
    assert {picked[1][name] for name in ("accuracy %", "regret", "gain at 1x")} == {ranked[1]["tau-b"]} == {"-"}
    assert ranked[2]["tau-b"] == "0.125\n[-0.125, 0.375]"
    assert (paired[0]["method"], paired[0]["less"]) == ("mixture", "macs")
    assert paired[0]["tau-b"] == "0.375\n[0.125, 0.625]\n(-0.125, 0.875)"
    assert paired[1]["tau-b"] == "0.375"  # of one seed
    assert "Without a row in the truth: 5-1-1." in page.text
    assert "Not defined: random, tau-b: constant ranking" in page.text
    assert "f00d" in page.text


def test_to_reproduce(tmp_path: Path) -> None:
    """The space in words, and one commit after another where the searches are of two."""
    content = make_comparison() | {
        "space": '{"num_layers": 9}', "space_name": "nine", "command": "python -m bmsn.compare --methods 'spos,macs'",
        "environment": {"git_commit": ["a1b2", "c3d4"], "cuda_device": [None]},
    }  # fmt: skip
    page = HtmlPage.read(write_report([write_comparison(tmp_path / "c", content)], tmp_path / "page.html"))
    assert page.headings[0] == "Methods in nine on synthetic"
    assert "python -m bmsn.compare --methods 'spos,macs'" in page.text
    assert page.table("Environment") == [
        {"Environment": "git_commit", "value": "a1b2, c3d4"}, {"Environment": "cuda_device", "value": "None"},
    ]  # fmt: skip


def test_beside_runs_and_with_html_in_a_label(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    comparison = write_comparison(tmp_path / "comparison", make_comparison(label=evil))
    run = write_run(tmp_path / "run", SPACE)
    page = HtmlPage.read(write_report([run, comparison], tmp_path / "page.html"))
    assert page.headings[0] == "1 search, 1 comparison"
    assert {"comparison", "run"} <= set(page.headings)
    assert page.tags.count("script") == 1
    assert evil in page.text


@pytest.mark.parametrize("budgets", [(5,), (5, 10, 20)], ids=["one budget", "three"])
def test_figure_has_every_mean(budgets: tuple[int, ...]) -> None:
    rows = make_comparison(budgets)["methods_over_seeds"]
    with style():
        figure = comparison_figure(rows)
    tau, regret = figure.axes
    for axis in (tau, regret):
        lines = [container.lines[0] for container in axis.containers]
        if len(budgets) == 1:
            assert [float(line.get_xdata()[0]) for line in lines] == pytest.approx(
                [0.55, float("nan"), 0.125], nan_ok=True
            )
        else:
            assert [float(y) for y in lines[0].get_ydata()] == pytest.approx([0.55, 0.6, 0.7])
            assert [float(y) for y in lines[2].get_ydata()] == pytest.approx([0.125] * 3)
    if len(budgets) == 1:
        assert [text.get_text() for text in tau.get_yticklabels()] == ["mixture", "random", "macs"]
        assert tau.yaxis_inverted(), "the first method stands at the top"


@pytest.mark.parametrize("budgets", [(5,), (5, 10, 20)], ids=["one budget", "three"])
def test_figure_has_room_for_long_names(budgets: tuple[int, ...]) -> None:
    """A method without a label is called by its settings."""
    label = "mixture:supernets=8,refresh_every=200,start_accuracy=0.1,rank_by=level,average_last=0.25,adapt=5"
    assert_within(lambda: comparison_figure(make_comparison(budgets, label)["methods_over_seeds"]))


def test_nothing_finished_yet(tmp_path: Path) -> None:
    content = make_comparison() | {"methods_over_seeds": [], "paired": []}
    page = HtmlPage.read(write_report([write_comparison(tmp_path / "c", content)], tmp_path / "page.html"))
    assert "No search has finished yet." in page.text
    assert page.tables == []


def test_unfinished_comparison_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, truth = tmp_path / "compare", tmp_path / "truth.csv"
    truth.write_text("stage_depths,accuracy_mean\n" + "".join(f"{a.slug},{50 + a.index}\n" for a in SPACE))
    config = ComparisonConfig(
        methods="macs", space=SPACE.name, data=write_tiny_set(tmp_path / "tiny.npz"), budget=1, seeds=1,
        truth=str(truth), settings="batch_size=16", out=out, resources=Resources(device="cpu"),
    )  # fmt: skip

    def check() -> None:
        assert main([str(out)]) == 2
        said = capsys.readouterr().err
        assert "unfinished comparison: run the same bmsn.compare command again until it is finished" in said
        assert not (out / "report").exists()

    with pytest.raises(Interrupted):
        run_comparison(config, should_stop=lambda: True)
    check()  # before the first search
    run_comparison(config)
    assert main([str(out)]) == 0
    shutil.rmtree(out / "report")
    (out / "comparison.json").unlink()
    check()  # after a search
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, SPACE)
    assert main([str(tmp_path)]) == 2  # a folder of runs is none
    assert "holds no run of bmsn.search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version must be at most 1; got 2"),
        ({"methods_over_seeds": [{"figures": {}}]}, "not a result of bmsn.compare: KeyError"),
    ],
)
def test_bad_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", make_comparison() | change)
    with pytest.raises(InputError, match=message):
        write_report([folder], tmp_path / "out")
    (folder / "comparison.json").write_text("{")
    with pytest.raises(InputError, match=r"not a result of bmsn\.compare"):
        write_report([folder], tmp_path / "out")
