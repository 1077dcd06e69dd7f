"""Prints what benchmarks measured as tables: our time, each peer's, and the ratio with its spread.

    python benchmarks/report.py FILE.json [FILE.json ...]       # of pytest --benchmark-json=FILE.json

Reads what `peers.report` leaves in a benchmark's extra_info: `NAME (ms)` for every side, `OURS against PEER` for the
ratio, `NAME (logit error)` and the like for how exact that same side is; whatever else is there becomes a line under
the table. A benchmark without peers has its median alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AGAINST = " against "
ERRORS = ("logit error", "twice eager's", "count error")  # columns of their own where a side has them


def table(benchmark: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown for one benchmark."""
    info = dict(benchmark["extra_info"])
    times = {name.removesuffix(" (ms)"): info.pop(name) for name in list(info) if name.endswith(" (ms)")}
    ratios = {name: info.pop(name) for name in list(info) if AGAINST in name}
    yield f"### {benchmark['group'] or benchmark['fullname']}: {benchmark['name']}"
    yield ""
    if not times:
        times = {"median": round(1e3 * benchmark["stats"]["median"], 4)}
    of_peer = {name.split(AGAINST)[1]: text for name, text in ratios.items()}
    found = {error: {name: info.pop(f"{name} ({error})", "") for name in times} for error in ERRORS}
    errors = {error: texts for error, texts in found.items() if any(texts.values())}
    yield f"| {' | '.join(['what', 'ms', 'ours against it', *errors])} |"
    yield "|---" * (3 + len(errors)) + "|"
    for name, milliseconds in times.items():
        exact = [texts[name] for texts in errors.values()]
        yield f"| {' | '.join([name, f'{milliseconds:g}', of_peer.get(name, ''), *exact])} |"
    yield ""
    yield "; ".join(f"{name}: {value}" for name, value in info.items())
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Print benchmarks as tables of ratios.")
    parser.add_argument("files", type=Path, nargs="+", help="written by pytest --benchmark-json")
    for file in parser.parse_args().files:
        measured = json.loads(file.read_text())
        machine, commit = measured["machine_info"], measured.get("commit_info", {})
        print(
            f"## {machine.get('cpu', {}).get('brand_raw', machine['machine'])}, {measured['datetime'][:19]}, ", end=""
        )
        print(f"Python {machine['python_version']}, commit {commit.get('id', 'unknown')[:7]}\n")
        for benchmark in measured["benchmarks"]:
            print("\n".join(table(benchmark)))


if __name__ == "__main__":
    main()
