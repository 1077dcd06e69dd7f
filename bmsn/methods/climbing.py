"""Coordinate ascent over resolution paths: too many to score them all, so from a good one, layer by layer, uphill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bmsn.paths import ResolutionPath

SWEEPS = 2  # over all layers; both together cost about what the architectures of a space do


def climb(
    start: ResolutionPath, score: Callable[[Sequence[ResolutionPath]], Sequence[int]], num_resolutions: int
) -> tuple[ResolutionPath, int, int]:
    """The best path that is reached by changing one layer at a time, and keeping the change if it scores higher.

    Args:
        start: where it begins.
        score: counts to compare, larger is better; called with the alternatives of one layer at a time.
        num_resolutions: R, the choices of each layer but the first.
    Returns:
        The path, its score, and the number of paths scored.
    """
    best, scored = start, 1
    (highest,) = score([start])
    for _ in range(SWEEPS):
        before = best
        for layer in range(1, len(start.resolutions)):
            now = best.resolutions
            others = [
                ResolutionPath((*now[:layer], r, *now[layer + 1 :])) for r in range(num_resolutions) if r != now[layer]
            ]
            scored += len(others)
            for path, found in zip(others, score(others), strict=True):
                if found > highest:
                    best, highest = path, found
        if best == before:
            break
    return best, highest, scored
