"""A tiny search for the tests: 8x8 images in four classes, ResNet-14, a few steps; and the process that gets killed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmsn.checkpoint import CheckpointStore
from bmsn.config import SearchConfig
from bmsn.data import ImageDataset
from bmsn.run import Interrupted, run_search
from bmsn.runfolder import read_metrics
from bmsn.space import SearchSpace

TESTS = Path(__file__).parent


def write_tiny_set(path: Path, num_images: int = 128, seed: int = 0, size: int = 8) -> str:
    """Writes an npz file of noise whose mean tells the class; returns its spec."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 4
    images = rng.integers(0, 120, (num_images, size, size, 3)) + 30 * labels[:, None, None, None]
    np.savez(path, train_images=images.astype(np.uint8), train_labels=labels.astype(np.int64))
    return f"npz:{path}"


def tiny_images(num_train: int = 128, num_test: int = 36, seed: int = 0) -> ImageDataset:
    """The same kind of images, with a test part."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_train + num_test) % 4
    images = rng.integers(0, 120, (len(labels), 8, 8, 3)) + 30 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return ImageDataset(
        name="tiny",
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
        class_names=("0", "1", "2", "3"),
    )


def write_tiny_images(path: Path, **changes: int) -> str:
    """`tiny_images` as an npz file; returns its spec."""
    data = tiny_images(**changes)
    arrays = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(path, **{name: getattr(data, name) for name in arrays})
    return f"npz:{path}"


def write_truth(path: Path, space: SearchSpace, missing: str) -> None:
    """Writes made-up accuracies of all architectures but one."""
    accuracy = np.random.default_rng(3).uniform(50, 90, len(space))
    lines = [f"{a.slug},{accuracy[a.index]:.3f}" for a in space if a.slug != missing]
    path.write_text("\n".join(["stage_depths,accuracy_mean", *lines, ""]))


def tiny_flags(spec: str, **changes: object) -> list[str]:
    """Flags of a search of 8 steps (2 epochs of 4) on the tiny set."""
    settings: dict[str, object] = dict(
        space="resnet14-cifar10", data=spec, supernets=2, epochs=2, batch_size=16, device="cpu"
    )
    settings |= changes
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m bmsn.search` or, with a first argument that ends in .py, that script, on one thread."""
    command = (
        [str(TESTS / arguments[0]), *arguments[1:]]
        if arguments[0].endswith(".py")
        else ["-m", "bmsn.search", *arguments]
    )
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `start`."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def resumed_and_undisturbed(config: SearchConfig, folder: Path) -> tuple[list[Any], list[Any]]:
    """What is left of a search that was stopped twice and went on, and of one that was not: all that must be equal."""
    outcomes = []
    for name, stops in (("stopped", (2, 7)), ("undisturbed", ())):
        out, stopped = folder / name, 0
        for place, stop in enumerate((*stops, None)):
            steps = itertools.count(1 if place == 0 else stops[place - 1] + 1)
            asked = lambda steps=steps, stop=stop: next(steps) == stop  # noqa: E731
            try:
                result = run_search(replace(config, out=out, resume=place > 0), should_stop=asked)
            except Interrupted:
                stopped += 1
        assert stopped == len(stops)
        saved = CheckpointStore(out / "checkpoints").load_latest()
        assert saved is not None
        state = {key: value for key, value in saved[1]["loop"].items() if key != "train_seconds"}
        records = [{k: v for k, v in r.items() if k != "train_seconds"} for r in read_metrics(out / "metrics.jsonl")]
        outcomes.append([plain(state), records, result.ranking, result.scores, result.method, result.cost])
    return outcomes[0], outcomes[1]


def plain(state: Any) -> Any:
    """Tensors and arrays as (dtype, shape, bytes), so that == compares them bit for bit."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    if isinstance(state, torch.Tensor):
        state = state.numpy()
    return (str(state.dtype), state.shape, state.tobytes()) if isinstance(state, np.ndarray) else state
