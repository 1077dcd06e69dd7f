"""`python -m bmsn.search`: the command line of a search. Its result goes to stdout, its progress to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from bmsn.command import parse_flags, run_command, until_signalled
from bmsn.config import SearchConfig
from bmsn.config_files import load_config
from bmsn.memory import keep_freed_memory
from bmsn.progress import StatusLine
from bmsn.run import run_search

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
    return parse_flags(Command, PROGRAM, arguments, default=Command(search=default))


class Progress:
    """Shows on stderr how far a search is: one line that is rewritten on a terminal, a line every 10 s elsewhere."""

    def __init__(self) -> None:
        self._line = StatusLine()

    def __call__(self, record: dict[str, Any]) -> None:
        """Takes what `run_search` gives to its `progress`."""
        scoring = "num_pairs" in record
        last = record["step"] == record["num_steps"] and not scoring
        if not last and not self._line.due:
            return
        line = f"step {record['step']}/{record['num_steps']}  "
        self._line.show(
            line + (f"scoring {record['pairs_scored']} of {record['num_pairs']}" if scoring else _training_line(record))
        )
        if last:
            self.close()

    def close(self) -> None:
        """Ends a line that would be rewritten."""
        self._line.end(keep=True)


def _training_line(record: dict[str, Any]) -> str:
    accuracy = "-" if record["accuracy"] is None else f"{100 * record['accuracy']:.1f}%"
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    line = f"{record['images_per_second']:.0f} images/s  left {minutes}:{seconds:02d}  accuracy {accuracy}"
    for name, label, digits in (("inverse_temperature", "1/tau", 1), ("entropy", "entropy", 3)):
        if name in record:
            line += f"  {label} {record[name]:.{digits}f}"
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (the README lists them)."""

    def run() -> tuple[str, Mapping[str, str]]:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command.print_config:
            return yaml.safe_dump(command.search.filled().as_dict(), sort_keys=False).rstrip(), {}
        keep_freed_memory()
        with contextlib.closing(Progress()) as progress:
            result = until_signalled(lambda stop: run_search(command.search, should_stop=stop, progress=progress))
        out = command.search.out
        is_kept = out is None or (out / "result.json").is_file()
        return result.to_table(), {} if is_kept else {
            str(out): "not finished: --resume writes the result that is above"
        }

    return run_command(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
