"""What the tests read from a page: headings, tables, references, and which elements are closed by whom."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bmsn.figures import style

_VOID = {"meta", "br", "img", "link", "input", "hr"}


def do_not_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of pages are made but not drawn, which takes seconds."""
    monkeypatch.setattr("bmsn.reporting_page.to_svg", lambda figure: '<svg width="1" height="1"></svg>')
    monkeypatch.setattr("bmsn.reporting_page.to_png", lambda figure: b"")


def assert_within(make: Callable[[], Figure]) -> None:
    """What a figure shows, names included, is within its edges, and its axes keep half of its width."""
    with style():
        figure = make()
        FigureCanvasAgg(figure).draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    assert sum(axis.get_position().width for axis in figure.axes) > 0.5


class HtmlPage(HTMLParser):
    """A parsed page.

    Attributes:
        headings: text of h1, h2, h3, in order. tables: rows of cell texts, the header first. captions: of figures.
        text: all of it outside style and script. ids, tags: in order. links: whatever an attribute or style names.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    @classmethod
    def read(cls, path: Path) -> HtmlPage:
        return cls(path.read_text())

    def table(self, first_column: str) -> list[dict[str, str]]:
        """The rows of the table whose first column has this name."""
        header, *rows = next(table for table in self.tables if table[0][0] == first_column)
        return [dict(zip(header, row, strict=True)) for row in rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value or "")
            assert not name.startswith("on"), f"no code in attributes: {name}"
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "figcaption":
            self.captions.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        if "figcaption" in self._open:
            self.captions[-1] += data
        elif {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        elif {"h1", "h2", "h3"} & set(self._open):
            self.headings[-1] += data
