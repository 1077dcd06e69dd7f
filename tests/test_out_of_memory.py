"""A search whose memory runs out, wherever it does: exit code 3, one line, and the last checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bmsn.methods.darts
import bmsn.methods.supernet
import bmsn.trainer
from bmsn.checkpoint import CheckpointStore
from bmsn.errors import RunStopped
from bmsn.search import main
from bmsn.worker import _perform
from searching import tiny_flags, write_tiny_set


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_set(tmp_path_factory.mktemp("data") / "tiny.npz")


def runs_out(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int = 0) -> None:
    """From its `after`-th call on, a function finds no memory."""
    real, calls = getattr(module, name), []

    def full(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize(
    ("method", "module", "name"),
    [
        ("mixture", bmsn.trainer, "sgd"),
        ("mcts", bmsn.trainer, "sgd"),
        ("darts", bmsn.methods.darts, "descend"),
    ],
)
def test_in_a_step(
    method: str, module: Any, name: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = tiny_flags(spec, method=method, supernets=1, checkpoint_every=2, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        runs_out(patch, module, name, after=5)
        assert main(flags) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert "stopped: step 5 of 8 or soon after (the last checkpoint is intact): out of memory on cpu at a peak" in line
    assert line.endswith("a smaller batch_size may help (CUDA out of memory. Tried to allocate 2 GiB.)")
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").load_latest()
    assert saved is not None
    assert saved[0] == 4
    assert main([*flags, "--resume"]) == 0


@pytest.mark.parametrize("fast_eval", [False, True], ids=["one by one", "fast_eval"])
def test_in_the_final_scoring(
    fast_eval: bool, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = tiny_flags(spec, out=tmp_path / "run", **({"fast_eval": True} if fast_eval else {}))
    with monkeypatch.context() as patch:
        runs_out(patch, bmsn.methods.supernet, "score_architectures" if fast_eval else "score_one_by_one")
        assert main(flags) == 3
    assert "stopped: after the last step (the last checkpoint is intact): out of memory" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0


def test_before_the_first_step(spec: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    runs_out(monkeypatch, bmsn.methods.supernet, "SupernetMixture")
    assert main(tiny_flags(spec)) == 3
    assert "stopped: before the first step: out of memory" in capsys.readouterr().err


def test_without_a_folder_nothing_is_promised(spec: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    runs_out(monkeypatch, bmsn.trainer, "sgd")
    assert main(tiny_flags(spec)) == 3
    assert "step 0 of 8 or soon after (nothing is kept without --out): out of memory" in capsys.readouterr().err


def test_a_task_that_ran_out_of_a_gpus_memory_is_tried_again():
    """Its neighbours on the GPU may be gone by then; a loss that is not finite would be again."""

    class Task:
        def __init__(self, cause):
            self.cause = cause

        def perform(self, place, progress):
            raise RunStopped("no more") from self.cause

    answers = [_perform(Task(cause), None, None) for cause in (torch.OutOfMemoryError("full"), None)]
    assert answers == [("error", "no more"), ("stopped", "no more")]
