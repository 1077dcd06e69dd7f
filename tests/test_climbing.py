"""Coordinate ascent over paths on scores whose best path is known."""

from __future__ import annotations

from itertools import product

import numpy as np

from bmsn.methods.climbing import climb
from bmsn.paths import ResolutionPath

START = ResolutionPath((0, 0, 0, 1, 1, 2, 2))


def test_where_layers_do_not_depend_on_each_other_it_finds_the_best_of_all_paths():
    worth = np.random.default_rng(0).permutation(21).reshape(7, 3)

    def value(path):
        return int(sum(worth[layer, r] for layer, r in enumerate(path.resolutions)))

    best = max((ResolutionPath((0, *rest)) for rest in product(range(3), repeat=6)), key=value)
    path, score, scored = climb(START, lambda paths: [value(p) for p in paths], 3)
    assert best != START
    assert (path, score) == (best, value(best))
    assert scored == 1 + 2 * 12  # the second sweep finds nothing


def test_it_never_goes_down_and_stops_where_nothing_is_better():
    assert climb(START, lambda paths: [5] * len(paths), 3) == (START, 5, 1 + 12)
    seen = []

    def rugged(paths):
        values = [hash(p.resolutions) % 1009 for p in paths]
        seen.extend(values)
        return values

    _, score, scored = climb(START, rugged, 3)
    assert score == max(seen)
    assert scored == len(seen)
