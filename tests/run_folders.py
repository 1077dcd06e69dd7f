"""Run folders with made-up numbers, as bmsn.search writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bmsn.config import SearchConfig
from bmsn.result import SCHEMA_VERSION
from bmsn.space import SearchSpace

NUM_STEPS = 100


def make_records(space: SearchSpace, num_supernets: int, steps: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    """`step` and `mixture` records at these steps; probabilities and visits are random, last visits fit the visits."""
    rng = np.random.default_rng(seed)
    visits = np.zeros((len(space), num_supernets), np.int64)
    last_visit = np.full(visits.shape, -1)
    records: list[dict[str, Any]] = []
    done = 0
    for step in steps:
        for t in range(done, step):
            pair = rng.integers(len(space)), rng.integers(num_supernets)
            visits[pair] += 1
            last_visit[pair] = t
        done = step
        p = rng.dirichlet(np.full(num_supernets, 0.5), size=len(space))
        records.append({
            "kind": "step", "step": step, "epoch": step / 10, "loss": 2 - step / NUM_STEPS, "accuracy": 0.3, "lr": 0.1,
            "inverse_temperature": float(step), "entropy": 0.5, "load": p.mean(0).tolist(), "mean_score": 0.5,
            "nan_steps": 0, "train_seconds": 1.0,
        })  # fmt: skip
        records.append({
            "kind": "mixture", "step": step, "scores": rng.random(visits.shape).tolist(), "visits": visits.tolist(),
            "assignment": p.tolist(), "last_visit": last_visit.tolist(),
        })  # fmt: skip
    return records


def make_result(space: SearchSpace, accuracy: list[float | None], config: dict[str, Any], **changes: Any) -> str:
    """result.json in which architecture i has accuracy[i]; those without one come last."""
    macs = [space.macs(a) for a in space]
    order = sorted(range(len(space)), key=lambda i: -1.0 if accuracy[i] is None else accuracy[i], reverse=True)
    total = 1000
    rows = [
        {
            "rank": place, "architecture": space[i].slug, "accuracy": accuracy[i], "index": i + 1,
            "standard_error": None if accuracy[i] is None else 0.01,
            "images_seen": 0 if accuracy[i] is None else total, "supernet": i % config["supernets"], "macs": macs[i],
            "macs_ratio": macs[i] / macs[space.default.index], "ema_accuracy": (accuracy[i] or 0.0) / 2,
            "ema_rank": place,
        }
        for place, i in enumerate(order, start=1)
    ]  # fmt: skip
    content = {
        "schema_version": SCHEMA_VERSION, "best": rows[0]["architecture"], "config": config,
        "environment": {"torch": "2.13.0", "git_commit": "0123abcd", "cuda_device": None},
        "data": {"name": "tiny", "fingerprint": "f00d", "num_train": 100, "num_classes": 10, "image_size": 32},
        "timings": {"train_seconds": 12.5, "total_seconds": 14.25}, "scores": {"total": total}, "truth": {},
        "notes": [], "ranking": rows,
    }  # fmt: skip
    return json.dumps(content | changes)


def write_run(
    path: Path, space: SearchSpace, *, accuracy: list[float | None] | None = None, finished: bool = True,
    num_supernets: int = 2, steps: tuple[int, ...] = (20, 60, NUM_STEPS), truth: str | None = None, **result: Any,
) -> Path:  # fmt: skip
    """A run folder; without `accuracy` architecture i of C has (i + 1) / (C + 1)."""
    path.mkdir(parents=True)
    filled = SearchConfig(
        space=space.name, data="synthetic", supernets=num_supernets, score="best", truth=truth
    ).filled()
    config = filled.as_dict()
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines = [json.dumps(record) for record in make_records(space, num_supernets, steps)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    if finished:
        accuracy = accuracy or [(i + 1) / (len(space) + 1) for i in range(len(space))]
        (path / "result.json").write_text(make_result(space, accuracy, config, **result))
    return path
