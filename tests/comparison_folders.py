"""Folders of comparisons with made-up numbers, as bmsn.compare writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("accuracy", "regret_top1", "regret_top3", "regret_top5", "macs_ratio", "gain_within_macs", "kendall_tau_b",
         "spearman", "partial_kendall")  # fmt: skip


def figures(mean: float | None, spread: float | None = 0.25) -> dict[str, Any]:
    """The same for all; without a mean they are not defined. Student's interval is twice as wide."""
    known = mean is not None and spread is not None
    bootstrap, student = ([mean - k * spread, mean + k * spread] if known else None for k in (1, 2))
    undefined = "" if mean is not None else "constant ranking"
    return {name: {"n": 3, "mean": mean, "bootstrap": bootstrap, "student": student, "undefined": undefined}
            for name in NAMES}  # fmt: skip


def make_comparison(budgets: tuple[int, ...] = (5,), label: str = "mixture") -> dict[str, Any]:
    rows = [
        {"budget": budget, "method": method, "seeds": 3, "picks": {"2-2-3": 2, "3-1-3": 1}, "paths": ["0-1"],
         "figures": figures(mean), "costs": {"training_images": 1000.0 * budget, "validation_images": 77.0,
                                            "training_macs": 1.25e12 * budget, "validation_macs": 4.5e9}}
        for budget in budgets for method, mean in ((label, 0.5 + budget / 100), ("random", None), ("macs", 0.125))
    ]  # fmt: skip
    return {
        "schema_version": 1, "space": "resnet14-cifar10", "pool": "max", "data": "synthetic",
        "data_fingerprint": "f00d", "truth": "truth.csv", "seeds": [0, 1, 2], "budgets": list(budgets), "settings": {},
        "methods": [],
        "truth_missing": ["5-1-1"], "methods_over_seeds": rows, "runs": [],
        "paired": [
            {"budget": 5, "method": label, "baseline": "macs", "figures": figures(0.375)},
            {"budget": 5, "method": "random", "baseline": "macs", "figures": figures(0.375, None)},
        ],
        "timings": [{"budget": 5, "method": label, "seed": seed, "train_seconds": 10.0 + seed} for seed in range(3)],
    }  # fmt: skip


def write_comparison(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder
