"""A page of text, tables and figures, and how it becomes one HTML file with its figures as PNG and SVG beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from bmsn.checkpoint import write_atomically
from bmsn.errors import InputError
from bmsn.figures import inline_svg, to_png, to_svg

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("a report needs matplotlib and jinja2: pip install 'bmsn[report]'") from error

_LONG = 40  # characters


@dataclass(frozen=True)
class Text:
    """A paragraph; `is_note`: what the reader must not miss."""

    text: str
    is_note: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Heading:
    """The title of what follows, below that of the section."""

    text: str
    kind: Literal["heading"] = "heading"


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is."""

    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is that of its files, and the title is read out in place of it."""

    name: str
    title: str
    caption: str
    figure: Figure
    kind: Literal["plot"] = "plot"


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what it sorts by ("": no value, always last)."""

    text: str
    key: str

    @property
    def is_long(self) -> bool:
        """Whether a line of it must be broken for the other columns to have room."""
        return any(len(line) > _LONG for line in self.text.splitlines())


def cell(value: float | int | str | None, shown: str = "{}") -> Cell:
    """A cell of a number or text, shown by a format; None is a dash."""
    if value is None:
        return Cell("-", "")
    return Cell(shown.format(value), str(value))


def percent(share: float | None) -> Cell:
    """A cell of a share in [0, 1] in percent."""
    return cell(None if share is None else 100 * share, "{:.2f}")


@dataclass(frozen=True)
class Row:
    """Cells, one a column; marked rows have a background of their own."""

    cells: Sequence[Cell]
    is_marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table. Columns in which every value is a number stand to the right and sort as numbers."""

    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    sortable: bool = False
    kind: Literal["table"] = "table"

    @property
    def is_number(self) -> list[bool]:
        keys = zip(*([cell.key for cell in row.cells] for row in self.rows), strict=True)
        return [_are_numbers(column) for column in keys] or [False] * len(self.columns)


def _are_numbers(keys: Sequence[str]) -> bool:
    given = [key for key in keys if key]
    try:
        return bool([float(key) for key in given])
    except ValueError:
        return False


Block: TypeAlias = Text | Heading | Code | Plot | Table


@dataclass(frozen=True)
class Section:
    """A part of a page; `anchor` is its id there, in letters, digits and hyphens."""

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page: `blocks` come first, then the sections."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    def plots(self) -> Iterator[Plot]:
        for block in (*self.blocks, *(block for section in self.sections for block in section.blocks)):
            if isinstance(block, Plot):
                yield block


def write_page(page: Page, out: Path, file_name: str) -> Path:
    """Writes the page, and its figures as PNG and SVG into a folder beside it.

    Args:
        page: what to write.
        out: a file that ends in .html, its figures in a folder of the same name with "-figures"; else a folder.
        file_name: of the page in a folder.
    Returns:
        The HTML file; it needs none of the others.
    Raises:
        InputError: a place that cannot be written to.
    """
    path = out if out.suffix == ".html" else out / file_name
    figures = path.with_name(f"{path.stem}-figures")
    svg = {}
    try:
        figures.mkdir(parents=True, exist_ok=True)
        for plot in page.plots():
            drawing = to_svg(plot.figure)
            write_atomically(figures / f"{plot.name}.svg", drawing.encode())
            write_atomically(figures / f"{plot.name}.png", to_png(plot.figure))
            svg[plot.name] = Markup(inline_svg(drawing, plot.name))  # our own drawing: its texts are outlines
        environment = Environment(loader=PackageLoader("bmsn"), autoescape=True, undefined=StrictUndefined)
        html = environment.get_template("report.html.j2").render(page=page, svg=svg)
        write_atomically(path, html.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return path
