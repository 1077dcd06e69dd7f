"""Pages in headless Chromium: tables sort, and nothing is cut off."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bmsn.reporting import write_report
from bmsn.space import SearchSpace
from comparison_folders import make_comparison, write_comparison
from html_pages import do_not_draw
from run_folders import write_run

SPACE = SearchSpace.named("resnet14-cifar10")
pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty figures as wide as those that are drawn."""
    do_not_draw(monkeypatch)
    drawing = '<svg width="648pt" height="300pt" viewBox="0 0 648 300"></svg>'
    monkeypatch.setattr("bmsn.reporting_page.to_svg", lambda figure: drawing)


def evaluate(path: Path, script: str, profile: Path, width: int = 1280) -> str:
    """The title that `script` gives a page which headless Chromium shows so many pixels wide."""
    page = path.with_name("scripted.html")
    page.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
               f"--window-size={width},900", f"--user-data-dir={profile}", page.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    return title[1]


def test_a_click_sorts_and_a_second_one_the_other_way(tmp_path: Path) -> None:
    accuracy = [None if i == 4 else (i * 7 % 15) / 20 for i in range(15)]
    path = write_report([write_run(tmp_path / "run", SPACE, accuracy=accuracy)], tmp_path / "page.html")
    clicks = """
      const table = document.querySelector("table.sortable"), lines = [];
      const column = (name) => [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === name);
      for (const name of ["accuracy %", "accuracy %", "architecture"]) {
        table.tHead.rows[0].cells[column(name)].firstElementChild.click();
        lines.push([...table.tBodies[0].rows].map((row) => row.cells[column(name)].textContent).join(" "));
      }
      document.title = lines.join("|");"""
    up, down, by_name = (line.split(" ") for line in evaluate(path, clicks, tmp_path).split("|"))
    values = sorted(f"{100 * a:.2f}" for a in accuracy if a is not None)
    assert up == [*sorted(values, key=float), "-"]
    assert down == [*sorted(values, key=float, reverse=True), "-"]
    assert by_name == [str(a) for a in SPACE]


@pytest.mark.parametrize(("width", "too_wide"), [(1280, False), (640, True)])
def test_nothing_is_cut_off(width: int, too_wide: bool, tmp_path: Path) -> None:
    """The page is no wider than the window, with long names; a table that is wider scrolls in a box of its own."""
    long = 120 * "x"
    truth = tmp_path / "truth.csv"
    truth.write_text("stage_depths,accuracy_mean\n" + "".join(f"{a.slug},{50 + a.index}\n" for a in SPACE))
    runs = [write_run(tmp_path / name, SPACE, truth=str(truth), notes=[long]) for name in ("run", long)]
    comparison = write_comparison(tmp_path / "compare", make_comparison((5, 10), label=long))
    path = write_report([*runs, comparison], tmp_path / "page.html")
    measure = """
      const page = document.documentElement, seen = page.clientWidth, lost = [];
      for (const element of document.body.querySelectorAll("*")) {
        const box = element.closest("div.scroll"), ends = (box ?? element).getBoundingClientRect();
        const cut = getComputedStyle(element).overflowX === "hidden" && element.scrollWidth > element.clientWidth;
        if (ends.left < 0 || ends.right > seen || cut) lost.push(element.tagName);
      }
      const wide = [...document.querySelectorAll("div.scroll")].filter((box) => box.scrollWidth > box.clientWidth);
      const scrolls = wide.every((box) => getComputedStyle(box).overflowX === "auto");
      document.title = [seen, page.scrollWidth, wide.length, scrolls, lost.join(" ")].join("|");"""
    seen, needed, wide, scrolls, lost = evaluate(path, measure, tmp_path, width).split("|")
    assert int(seen) == width
    assert int(needed) <= width
    assert lost == ""
    assert (int(wide) > 0) == too_wide
    assert scrolls == "true"
