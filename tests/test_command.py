"""Exit codes of commands whose stdout or stderr is gone."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable

import pytest

from bmsn.command import ProgressLines, run_command
from bmsn.run import Interrupted
from bmsn.scheduler import TaskProgress
from bmsn.search import Progress


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk():
    return open("/dev/full", "w")  # it becomes stdout


@pytest.fixture(params=[closed_pipe, full_disk, lambda: None], ids=["closed pipe", "full disk", "none"])
def broken(request):
    stream = request.param()
    yield stream
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()


def result(failed: dict[str, str] | None = None) -> Callable[[], tuple[str, dict[str, str]]]:
    return lambda: ("the result", failed or {})


def test_a_result_that_is_not_taken(broken, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", broken)
    assert run_command("here", result()) == 141
    said = capsys.readouterr().err
    is_full = broken is not None and broken.name == "/dev/full"
    assert said == (f"here: the result could not be printed: {os.strerror(errno.ENOSPC)}\n" if is_full else "")
    if broken is not None:
        broken.flush()  # as the interpreter does at its end


@pytest.mark.parametrize("broken", [closed_pipe, full_disk], indirect=True)
@pytest.mark.parametrize("module", ["search", "retrain", "ground_truth", "compare", "report", "export"])
def test_help_that_nobody_takes(module, broken, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", broken)
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"bmsn.{module}").main(["--help"])
    assert left.value.code == 141
    full = f"python -m bmsn.{module}: help could not be printed: {os.strerror(errno.ENOSPC)}\n"
    assert capsys.readouterr().err == (full if broken.name == "/dev/full" else "")
    broken.flush()  # as the interpreter does at its end


def test_what_failed_is_said_all_the_same(broken, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", broken)
    assert run_command("here", result({"that": "no luck"})) == 3
    assert "here: failed: that: no luck" in capsys.readouterr().err


def test_messages_that_nobody_takes(broken, monkeypatch, capsys):
    def interrupted() -> tuple[str, dict[str, str]]:
        raise Interrupted("asked to")

    monkeypatch.setattr(sys, "stderr", broken)
    Progress()({"step": 1, "num_steps": 9, "pairs_scored": 1, "num_pairs": 2})
    monkeypatch.setattr("bmsn.command._LINE_SECONDS", 0)
    ProgressLines()(TaskProgress(finished=1, failed=0, total=2, seconds_left=None))
    assert run_command("here", interrupted) == 130
    assert run_command("here", result({"that": "no luck"})) == 3
    assert run_command("here", result()) == 0
    assert capsys.readouterr().out == "the result\nthe result\n"


def test_a_full_disk_stops_a_run_with_one_line(capsys):
    def full(*arguments) -> tuple[str, dict[str, str]]:
        raise OSError(*arguments)

    assert run_command("here", lambda: full(errno.ENOSPC, "No space left on device", "runs/table.csv")) == 3
    assert run_command("here", lambda: full(errno.EDQUOT, "Disk quota exceeded")) == 3
    kept = "what was finished before is kept"
    assert capsys.readouterr().err == (
        f"here: stopped: runs/table.csv: No space left on device; {kept}\nhere: stopped: Disk quota exceeded; {kept}\n"
    )
    with pytest.raises(FileNotFoundError):  # of our own
        run_command("here", lambda: full(errno.ENOENT, "No such file or directory", "runs/table.csv"))


def test_a_broken_pipe_inside_a_run_is_an_error_of_its_own():
    def breaks() -> tuple[str, dict[str, str]]:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command("here", breaks)
