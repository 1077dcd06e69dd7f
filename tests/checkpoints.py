"""A state that its step determines, what a folder of checkpoints holds, and files that the system refuses to grow."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bmsn.checkpoint import CheckpointStore


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    """A state that its step determines."""
    values = torch.arange(size, dtype=torch.float64) * 1.5 + step
    return {"weights": values.float(), "nested": {"momentum": [values, values + 1], "step": step}}


def assert_is_state_of(step: int, state: dict[str, Any], size: int = 64) -> None:
    expected = make_state(step, size)
    assert torch.equal(state["weights"], expected["weights"])
    assert all(map(torch.equal, state["nested"]["momentum"], expected["nested"]["momentum"]))
    assert state["nested"]["step"] == step


def loaded_step(folder: Path) -> int | None:
    """The step that a new process would start from; its state is checked."""
    latest = CheckpointStore(folder).load_latest()
    if latest is None:
        return None
    assert_is_state_of(*latest)
    return latest[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow past the limit: as on a full disk, a write is cut short and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
