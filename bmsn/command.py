"""What the commands have in common: exit codes and signals, and lines of progress of those that share out tasks."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from bmsn.errors import InputError, RunStopped, is_disk_error
from bmsn.progress import clock, say
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
        say(line)


def until_signalled(run: Callable[[Callable[[], bool]], _T]) -> _T:
    """`run(should_stop)`, which SIGTERM and SIGINT ask to stop; its Interrupted then has the signal's exit code."""
    with SignalFlag() as signals:
        try:
            return run(lambda: signals.signal_number is not None)
        except Interrupted as stopped:
            stopped.exit_code = signals.exit_code
            raise


def parse_flags(
    form: Callable[..., _T] | type[_T], program: str, arguments: Sequence[str] | None, **options: Any
) -> _T:
    """`tyro.cli(form, prog=program, args=arguments, **options)`; help that stdout doesn't take is no error of ours.

    Raises:
        SystemExit: after --help (0, or 141 where stdout took nothing), an unknown flag or a value (2).
    """
    try:
        try:
            return tyro.cli(form, prog=program, args=arguments, **options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        _leave_stdout(program, "help", error)
        raise SystemExit(EXIT_STDOUT_CLOSED) from None


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
    except Interrupted as stopped:
        say(f"{program}: {stopped}")
        return stopped.exit_code
    except InputError as error:
        say(f"{program}: error: {error}")
        return EXIT_INPUT
    except RunStopped as error:
        say(f"{program}: stopped: {error}")
        return EXIT_STOPPED
    except OSError as error:
        if not is_disk_error(error):
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        say(f"{program}: stopped: {place}{error.strerror}; what was finished before is kept")
        return EXIT_STOPPED
    is_printed = _print_result(program, text)
    for label, reason in failed.items():
        say(f"{program}: failed: {label}: {reason.strip().splitlines()[-1]}")
    if failed:
        return EXIT_STOPPED
    return 0 if is_printed else EXIT_STDOUT_CLOSED


def _print_result(program: str, text: str) -> bool:
    """False where stdout takes nothing: then the result is in a folder, if one was given."""
    if sys.stdout is None:
        return False
    try:
        print(text, flush=True)
    except OSError as error:
        _leave_stdout(program, "the result", error)
        return False
    return True


def _leave_stdout(program: str, what: str, error: OSError) -> None:
    """Says why stdout does not take `what`, and keeps the interpreter from flushing its buffer once more."""
    if not isinstance(error, BrokenPipeError):  # whoever closes a pipe has seen enough
        say(f"{program}: {what} could not be printed: {error.strerror}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
