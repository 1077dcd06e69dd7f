"""What the commands that train networks alone have in common: exit codes, signals, and the line of progress."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping

from bmsn.errors import InputError, RunStopped
from bmsn.run import Interrupted
from bmsn.runfolder import SignalFlag
from bmsn.scheduler import TaskProgress

EXIT_INPUT, EXIT_STOPPED, EXIT_STDOUT_CLOSED = 2, 3, 141


class ProgressLine:
    """Shows how far all tasks are on stderr: one line rewritten on a terminal, a line every 30 s elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0
        self._started = time.monotonic()

    def __call__(self, progress: TaskProgress) -> None:
        now = time.monotonic()
        if now - self._shown < (0 if self._terminal else 30):
            return
        self._shown = now
        failed = f", {progress.failed} failed" if progress.failed else ""
        left = "" if progress.seconds_left is None else f"  left {_clock(progress.seconds_left)}"
        line = f"{progress.finished} of {progress.total} networks{failed}  {_clock(now - self._started)}{left}"
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def run_command(
    program: str, run: Callable[[Callable[[], bool], Callable[[TaskProgress], None]], tuple[str, Mapping[str, str]]]
) -> int:
    """Runs a command; returns its exit code (the README lists them).

    Args:
        program: for messages.
        run: takes `should_stop` and `progress`; returns what to print, and the networks that failed with their reasons.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("bmsn").setLevel(logging.INFO)
    signals = SignalFlag()
    try:
        with signals:
            text, failed = run(lambda: signals.signal_number is not None, ProgressLine())
        print(text)
        sys.stdout.flush()
    except Interrupted as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return signals.exit_code
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except RunStopped as error:
        print(f"{program}: stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        # The table is in the folder; keep the interpreter from flushing into the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_STDOUT_CLOSED
    for label, reason in failed.items():
        print(f"{program}: failed: {label}: {reason.strip().splitlines()[-1]}", file=sys.stderr)
    return EXIT_STOPPED if failed else 0
