"""What architectures cost: a limit on their multiply-accumulates, and the Pareto front of accuracy against a cost."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bmsn.errors import InputError
from bmsn.space import Architecture, SearchSpace

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


def parse_max_macs(text: str) -> tuple[float, bool]:
    """A limit on multiply-accumulates for one image: `1.5x` as (1.5, True), relative to the default architecture; `40M`
    as (4e7, False). Raises InputError for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(x|[KMG]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"max_macs must be a positive number as 1.0x (of the default's), 40M or 1.2G; got {text!r}")
    return (float(match[1]), True) if match[2] == "x" else (float(match[1]) * _UNITS[match[2]], False)


def within_macs(space: SearchSpace, macs: Sequence[int], max_macs: str) -> list[Architecture]:
    """The architectures of at most `max_macs`.

    Args:
        space: the architectures.
        macs: of each of them, by index, for one image.
        max_macs: see `parse_max_macs`.
    Raises:
        InputError: none is that cheap; the message has the cheapest.
    """
    limit, is_relative = parse_max_macs(max_macs)
    if is_relative:
        limit *= macs[space.default.index]
    allowed = [a for a in space if macs[a.index] <= limit]
    if not allowed:
        cheapest = min(space, key=lambda a: macs[a.index])
        raise InputError(
            f"max_macs must be at least {macs[cheapest.index] / macs[space.default.index]:.3f}x or "
            f"{macs[cheapest.index] / 1e6:.2f}M, those of {cheapest}, the cheapest of {space.name}; got {max_macs}"
        )
    return allowed


def pareto_front(accuracy: Sequence[float | None], cost: Sequence[float]) -> list[bool]:
    """Which rows no other row beats: none is as cheap and as accurate, and cheaper or more accurate.

    Rows that are equal in both stand or fall together. A row without an accuracy is not on the front.

    Args:
        accuracy: larger is better.
        cost: MACs, milliseconds, ...: smaller is better.
    """
    front = [False] * len(cost)
    rows = [
        (price, -value, row) for row, (value, price) in enumerate(zip(accuracy, cost, strict=True)) if value is not None
    ]
    best: tuple[float, float] | None = None  # -accuracy and cost of the last one on the front, by rising cost
    for price, worth, row in sorted(rows):
        if best is None or worth < best[0] or (worth, price) == best:
            best, front[row] = (worth, price), True
    return front
