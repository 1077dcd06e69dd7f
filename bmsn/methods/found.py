"""How a path of resolutions that a method found is given in result.json and in words."""

from __future__ import annotations

from typing import Any

from bmsn.methods.problem import Problem
from bmsn.paths import ResolutionPath, path_architecture, path_macs


def path_findings(problem: Problem, path: ResolutionPath) -> dict[str, Any]:
    """`path` as 0-0-1-2-1; `path_architecture` as 4-3-3, None outside the space; `path_macs` for one image."""
    space, data = problem.space, problem.data
    inside = path_architecture(space, path)
    macs = path_macs(space, path, num_classes=data.num_classes, in_channels=data.in_channels)
    return {
        "resolution_path": str(path),
        "resolution_path_architecture": None if inside is None else inside.slug,
        "resolution_path_macs": macs,
        "resolution_path_macs_ratio": macs / problem.macs[space.default.index],
    }


def in_words(found: dict[str, Any]) -> str:
    """`0-0-1-2-1 (outside the space), 1.31x the MACs of the default`, from `path_findings`."""
    inside = found["resolution_path_architecture"]
    place = "outside the space" if inside is None else f"[{inside.replace('-', ',')}]"
    return f"{found['resolution_path']} ({place}), {found['resolution_path_macs_ratio']:.2f}x the MACs of the default"
