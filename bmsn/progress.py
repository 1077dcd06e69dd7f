"""How far something is, on stderr: one line that is rewritten on a terminal, a line every 10 s elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

_TERMINAL_SECONDS, _LINE_SECONDS = 0.2, 10.0  # from one line to the next
_BAR = 24  # characters


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def say(text: str, end: str = "\n") -> None:
    """Prints on stderr, if anybody listens there: a closed terminal or a full disk costs a message, not a run."""
    if sys.stderr is not None:  # print would take stdout instead
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


class StatusLine:
    """A line that is shown again and again.

    Args:
        write: where lines go that are not rewritten.
        shown: when there was a line last, by `time.monotonic`; the next one is due 0.2 s (elsewhere 10 s) later.
    """

    def __init__(self, write: Callable[[str], None] = say, shown: float = float("-inf")) -> None:
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self._write, self._shown, self._open = write, shown, False

    @property
    def due(self) -> bool:
        return time.monotonic() - self._shown >= (_TERMINAL_SECONDS if self.terminal else _LINE_SECONDS)

    def show(self, line: str) -> None:
        self._shown = time.monotonic()
        if self.terminal:
            say(f"\r\x1b[K{line}", end="")
            self._open = True
        else:
            self._write(line)

    def end(self, keep: bool) -> None:
        """Keeps what stands on the terminal, or clears it; what is written next has a line of its own."""
        if self._open:
            say("\n" if keep else "\r\x1b[K", end="")
            self._open = False


class Progress:
    """Shows how many of a known number are done, where the logger takes INFO: a bar on a terminal, else logged lines.

    A context manager: the bar is cleared at the end, after an error, too. A line in the log says when all are done.

    Args:
        logger: of the module whose progress it is.
        task: for the messages, as "pets: decoded".
        total: how many there are.
        noun: what they are.
    """

    def __init__(self, logger: logging.Logger, task: str, total: int, noun: str) -> None:
        self._logger, self._task, self._total, self._noun = logger, task, total, noun
        self._done, self._started = 0, time.monotonic()
        self._line = StatusLine(logger.info, shown=self._started)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._line.end(keep=False)

    def add(self, count: int) -> None:
        self._done += count
        finished = self._done == self._total
        if not self._logger.isEnabledFor(logging.INFO) or not (finished or self._line.due):
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._done / seconds
        left = clock(seconds * (self._total - self._done) / self._done)
        counted = f"{self._done} of {self._total} {self._noun}"
        if finished:
            self._line.end(keep=False)
            self._logger.info("%s %s (%.0f/s)", self._task, counted, rate)
        elif self._line.terminal:
            filled = _BAR * self._done // self._total
            self._line.show(f"{self._task} [{'#' * filled:.<{_BAR}}] {counted} ({rate:.0f}/s), left {left}")
        else:
            self._line.show(f"{self._task} {counted} ({rate:.0f}/s), left {left}")
