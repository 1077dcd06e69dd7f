"""What a search shows on stderr while it runs, on a terminal and elsewhere; of decoding: test_folder.py."""

from __future__ import annotations

import io
import sys

import pytest

from bmsn.search import Progress


class Stderr(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


def record(step: int) -> dict:
    return dict(step=step, num_steps=4, accuracy=0.5, images_per_second=100.0, seconds_left=70.0)


@pytest.mark.parametrize(
    ("terminal", "seconds", "steps"),
    [(True, 0.1, (1, 3, 4)), (True, 1, (1, 2, 3, 4)), (False, 4, (1, 4)), (False, 6, (1, 3, 4))],
)
def test_the_first_record_the_last_and_some_between_are_shown(
    terminal, seconds, steps, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal))
    now = 0.0
    monkeypatch.setattr("bmsn.progress.time.monotonic", lambda: now)
    show = Progress()
    for step in (1, 2, 3, 4):
        show(record(step))
        now += seconds
    lines = [f"step {step}/4  100 images/s  left 1:10  accuracy 50.0%" for step in steps]
    shown = "".join(f"\r\x1b[K{line}" for line in lines) + "\n" if terminal else "".join(f"{line}\n" for line in lines)
    assert sys.stderr.getvalue() == shown
