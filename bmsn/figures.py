"""What all figures of a report have in common: one style, colours that the colour-blind tell apart, PNG and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Any

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("a report needs matplotlib and jinja2: pip install 'bmsn[report]'") from error

# Okabe & Ito 2008, "Color Universal Design", with a grey for its yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
MARKERS = "osD^vPX*"  # a second way to tell series apart
SEQUENTIAL = "cividis"  # even in lightness, and the same to all kinds of colour vision
ACCENT = "#D55E00"

WIDTH = 9.0  # inches; with 13 pt the text is readable where the figure is shown at half of its 900 pixels
_LEGEND = 78  # characters of a legend that are as wide
_DPI = 100
_STYLE: Any = {
    "figure.dpi": _DPI,
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "figure.labelsize": 13,
    "legend.fontsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "text.parse_math": False,  # names are text: a $ in one is a $
    "svg.fonttype": "path",  # needs no font where the page is read
    "svg.hashsalt": "bmsn",  # the same figure gives the same bytes
    "image.interpolation": "nearest",
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures, for as long as it is entered; afterwards matplotlib is as it was."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with rows x columns axes, in reading order; sizes in inches. Inside `style`."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def colour(place: int, count: int) -> str:
    """The colour of series `place` of `count`: of the palette, or of the sequential map where they are too many."""
    if count <= len(PALETTE):
        return PALETTE[place]
    return to_hex(matplotlib.colormaps[SEQUENTIAL](place / (count - 1)))


def fit_legend(names: Sequence[str]) -> tuple[list[str], int]:
    """For a legend below a figure of the usual width: the names, broken where they are wider, and its columns."""
    columns = max(1, min(5, _LEGEND // (max(map(len, names)) + 6)))  # 6: the mark and what is around it
    return [in_lines(name, _LEGEND) for name in names], columns


def in_lines(name: str, most: int) -> str:
    """A name, broken after commas, hyphens or, in need, anywhere where it has more characters than `most`."""
    return name if len(name) <= most else fill(name.replace(",", ", "), most)


def finish_grid(axes: Sequence[Axes], used: int) -> None:
    """Leaves the axes after the first `used` empty."""
    for unused in axes[used:]:
        unused.set_axis_off()


def to_png(figure: Figure) -> bytes:
    """The picture at 100 pixels an inch."""
    target = io.BytesIO()
    with style():
        figure.savefig(target, format="png", dpi=_DPI)
    return target.getvalue()


def to_svg(figure: Figure) -> str:
    """The drawing as a file; no date in it."""
    target = io.StringIO()
    with style():
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """An SVG file as an element for a page: its ids begin with `name`, so that figures of one page don't mix."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<!--.*?-->", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    # As wide as the drawing, or as the page where that is narrower; the view box keeps its shape.
    size = re.compile(r'(<svg\b[^>]*?) width="([^"]*)" height="[^"]*"')
    return size.sub(r'\1 style="width: \2; max-width: 100%; height: auto"', element, count=1)
