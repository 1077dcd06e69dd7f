"""A report of searches that are ranked by several accuracies of each architecture: by the rule, and it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import bmsn
from bmsn.rank_rules import IN_WORDS
from bmsn.reporting import write_report
from bmsn.reporting_run import read_runs
from bmsn.reporting_training import training_blocks
from bmsn.runfolder import read_metrics
from html_pages import HtmlPage, do_not_draw
from searching import write_tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_draw(monkeypatch)


@pytest.fixture(scope="module", params=["level", "mean"])  # the first is called an accuracy, the second is not
def searched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bmsn.SearchResult]:
    folder = tmp_path_factory.mktemp(request.param)
    accuracy = np.random.default_rng(3).uniform(50, 90, len(SPACE))
    lines = [f"{a.slug},{accuracy[a.index]:.3f}" for a in SPACE]
    (folder / "truth.csv").write_text("\n".join(["stage_depths,accuracy_mean", *lines, ""]))
    result = bmsn.run_search(
        bmsn.SearchConfig(
            space=SPACE.name, data=write_tiny_images(folder / "tiny.npz"), supernets=3, epochs=3, batch_size=16,
            device="cpu", fast_eval=True, rank_by=request.param, score_every=1, out=folder / "run",
            truth=str(folder / "truth.csv"),
        )
    )  # fmt: skip
    return folder / "run", result


def test_figures_and_table_are_those_of_the_rule(searched: tuple[Path, bmsn.SearchResult]) -> None:
    run, result = searched
    (reported,) = read_runs([run])
    assert {name: reported.agreement[name] for name in ("ranking", "accuracy", "ema", "macs")} == {
        name: result.truth[name] for name in ("ranking", "accuracy", "ema", "macs")
    }
    assert result.truth["ranking"] != result.truth["accuracy"]  # the case does tell them apart
    rows = HtmlPage.read(write_report([run], run.parent / "page.html")).table("rank")
    for row, ranked in zip(rows, result.ranking, strict=True):
        assert row["architecture"] == str(ranked.architecture)
        assert row[f"by {result.config['rank_by']} %"] == f"{100 * (ranked.rank_value or 0):.2f}"
        assert row["accuracy %"] == f"{100 * (ranked.accuracy or 0):.2f}"


def test_rankings_on_the_way_are_those_of_the_rule(
    searched: tuple[Path, bmsn.SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = searched
    curves: dict[str, list[float]] = {}
    monkeypatch.setattr("bmsn.reporting_training.ranking_history_figure", lambda epochs, found: curves.update(found))
    (reported,) = read_runs([run])
    training_blocks(reported, "run")
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "ranking"]
    assert curves["with the truth"] == [record["truth"]["ranking"]["kendall_tau_b"] for record in records]
    last = {row.architecture.slug: row.rank_value for row in reported.rows}
    expected = stats.kendalltau([records[-1]["rank_value"][slug] for slug in last], list(last.values())).statistic
    assert curves["with the last ranking"][-1] == pytest.approx(expected)


def test_an_unfinished_run_is_ranked_by_the_rule(searched: tuple[Path, bmsn.SearchResult], tmp_path: Path) -> None:
    run, result = searched
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (reported,) = read_runs([tmp_path])
    record = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "ranking"][-1]
    assert reported.rows[0].architecture.slug == record["best"]
    values = [row.rank_value for row in reported.rows]
    assert values == sorted(record["rank_value"].values(), reverse=True)
    assert reported.agreement["ranking"] == record["truth"]["ranking"]
    assert reported.ranked_by == f"{IN_WORDS[result.config['rank_by']]} after epoch 2"
