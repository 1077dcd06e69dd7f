"""`python -m bmsn.search`: the command line of a search. Its result goes to stdout, its progress to stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from bmsn.config import SearchConfig, load_config
from bmsn.errors import InputError, RunStopped
from bmsn.memory import keep_freed_memory
from bmsn.run import Interrupted, run_search
from bmsn.runfolder import SignalFlag

EXIT_INPUT, EXIT_STOPPED, EXIT_STDOUT_CLOSED = 2, 3, 141

PROGRAM = "python -m bmsn.search"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Search where a CNN should downsample: by a balanced mixture of supernets or another method, ranking all poolings.

    Attributes:
        search: the settings of the search.
        config: a YAML file of settings; flags override it.
        print_config: print the settings, as filled in by preset and data, and exit.
    """

    search: Annotated[SearchConfig, tyro.conf.arg(name="")] = field(default_factory=SearchConfig)
    config: Path | None = None
    print_config: bool = False


def parse(arguments: Sequence[str]) -> Command:
    """Flags over `--config` over the stored settings of a resumed run. Exits with 2 on an unknown flag or value."""
    command = _parse(arguments, SearchConfig())
    if command.config is not None:
        return _parse(arguments, load_config(command.config))
    if command.search.resume and command.search.out is not None:
        stored = command.search.out / "config.yaml"
        if stored.is_file():
            return _parse(arguments, load_config(stored))
    return command


def _parse(arguments: Sequence[str], default: SearchConfig) -> Command:
    return tyro.cli(Command, prog=PROGRAM, args=list(arguments), default=Command(search=default))


class Progress:
    """Shows metrics records on stderr: one line that is rewritten on a terminal, a line every 10 s elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        last = record["step"] == record["num_steps"]
        if not last and now - self._shown < (0.2 if self._terminal else 10):
            return
        self._shown = now
        accuracy = "-" if record["accuracy"] is None else f"{100 * record['accuracy']:.1f}%"
        minutes, seconds = divmod(round(record["seconds_left"]), 60)
        line = (
            f"step {record['step']}/{record['num_steps']}  {record['images_per_second']:.0f} images/s  "
            f"left {minutes}:{seconds:02d}  accuracy {accuracy}"
        )
        for name, label, digits in (("inverse_temperature", "1/tau", 1), ("entropy", "entropy", 3)):
            if name in record:
                line += f"  {label} {record[name]:.{digits}f}"
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="\n" if last or not self._terminal else "",
            file=sys.stderr,
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("bmsn").setLevel(logging.INFO)
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command.print_config:
            _print(yaml.safe_dump(command.search.filled().as_dict(), sort_keys=False).rstrip())
            return 0
        keep_freed_memory()
        with SignalFlag() as signals:
            try:
                result = run_search(
                    command.search, should_stop=lambda: signals.signal_number is not None, progress=Progress()
                )
            except Interrupted as stopped:
                print(f"{PROGRAM}: {stopped}", file=sys.stderr)
                return signals.exit_code
        _print(result.to_table())
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except RunStopped as error:
        print(f"{PROGRAM}: stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        # The result is in the run folder, if one was given; keep the interpreter from flushing into the closed pipe
        # again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_STDOUT_CLOSED
    return 0


def _print(text: str) -> None:
    print(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
