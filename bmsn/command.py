"""What the commands have in common: exit codes and signals, and lines of progress of those that share out tasks."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from bmsn.errors import InputError, RunStopped
from bmsn.progress import clock
from bmsn.run import Interrupted
from bmsn.runfolder import SignalFlag
from bmsn.scheduler import TaskProgress

EXIT_INPUT, EXIT_STOPPED, EXIT_STDOUT_CLOSED = 2, 3, 141

_T = TypeVar("_T")
_LINE_SECONDS = 30  # from one line of progress to the next


class ProgressLines:
    """Shows how far all tasks are on stderr, every 30 s; each one that is finished has a line besides.

    Args:
        noun: what they are.
    """

    def __init__(self, noun: str = "networks") -> None:
        self._noun = noun
        self._started = self._shown = time.monotonic()

    def __call__(self, progress: TaskProgress) -> None:
        now = time.monotonic()
        if now - self._shown < _LINE_SECONDS:
            return
        self._shown = now
        failed = f", {progress.failed} failed" if progress.failed else ""
        left = "" if progress.seconds_left is None else f", left {clock(progress.seconds_left)}"
        line = f"{progress.finished} of {progress.total} {self._noun}{failed}; took {clock(now - self._started)}{left}"
        print(line, file=sys.stderr, flush=True)


def until_signalled(run: Callable[[Callable[[], bool]], _T]) -> _T:
    """`run(should_stop)`, which SIGTERM and SIGINT ask to stop; its Interrupted then has the signal's exit code."""
    with SignalFlag() as signals:
        try:
            return run(lambda: signals.signal_number is not None)
        except Interrupted as stopped:
            stopped.exit_code = signals.exit_code
            raise


def run_command(program: str, run: Callable[[], tuple[str, Mapping[str, str]]]) -> int:
    """Runs a command; returns its exit code (the README lists them).

    Args:
        program: for messages.
        run: returns what to print, and the tasks that failed with their reasons.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("bmsn").setLevel(logging.INFO)
    try:
        text, failed = run()
        print(text)
        sys.stdout.flush()
    except Interrupted as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except RunStopped as error:
        print(f"{program}: stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        # The result is in a folder, if one was given; keep the interpreter from flushing into the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_STDOUT_CLOSED
    for label, reason in failed.items():
        print(f"{program}: failed: {label}: {reason.strip().splitlines()[-1]}", file=sys.stderr)
    return EXIT_STOPPED if failed else 0
