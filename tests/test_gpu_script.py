"""benchmarks/gpu.sh selects every test and benchmark that needs a GPU, as collected where torch says there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from installation import REPOSITORY

# Stands for Python: says yes to all that the script asks of it, and writes down what it would have pytest do, each call
# in a file of its own: the script runs several at once.
RECORDER = """#!/bin/sh
if [ "$1 $2" = "-m pytest" ]; then
    shift 2
    "{python}" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >"$(mktemp "{calls}/XXXXXXXX")"
    for word in "$@"; do case $word in --benchmark-json=*) echo x >"${{word#*=}}" ;; esac; done
    exit {code}
fi
"""
ALL = [["tests"], ["benchmarks", "--full", "--benchmark-only"]]


def run_script(folder: Path, code: int = 0) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script with a Python that only writes down, every pytest ending with `code`; the arguments of each."""
    recorder, calls = folder / "python", folder / "calls"
    calls.mkdir()
    recorder.write_text(RECORDER.format(python=sys.executable, calls=calls, code=code))
    recorder.chmod(0o755)
    done = subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), str(folder / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(recorder)},
    )
    return done, [json.loads(call.read_text()) for call in calls.iterdir()]


def start_collecting(gpu: bool, commands: list[list[str]]) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "tests" / "gpu_collection.py"), str(int(gpu)), json.dumps(commands)]
    # pytest-benchmark takes what pytest-xdist leaves there for a sign that it must not measure
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=own)


@dataclass(frozen=True)
class Selection:
    """What the script has pytest do, what that collects with a GPU, and what all there is collects with and without."""

    commands: list[list[str]]
    collected: list[dict[str, Any]]
    with_gpu: list[dict[str, Any]]
    without: list[dict[str, Any]]

    def selected(self, *options: str) -> set[str]:
        """What is selected by the commands that have all `options`."""
        pairs = zip(self.commands, self.collected, strict=True)
        return {name for command, found in pairs if {*options} <= {*command} for name in found["runs"]}


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    done, commands = run_script(tmp_path_factory.mktemp("gpu"))
    assert done.returncode == 0, done.stdout + done.stderr
    processes = [start_collecting(True, [*ALL, *commands]), start_collecting(False, ALL)]
    with_gpu, without = (json.loads(process.communicate()[0]) for process in processes)
    return Selection(commands, with_gpu[len(ALL) :], with_gpu[: len(ALL)], without)


def test_every_command_selects_something(selection: Selection) -> None:
    for command, found in zip(selection.commands, selection.collected, strict=True):
        assert found["code"] == 0, command
        assert found["runs"], command


def test_every_test_that_runs_on_a_gpu_alone_is_selected(selection: Selection) -> None:
    needed = {*selection.with_gpu[0]["runs"]} - {*selection.without[0]["runs"]}
    assert len({name.split("::")[0] for name in needed}) >= 10
    assert needed <= selection.selected()


def test_every_benchmark_with_a_gpu_part_is_selected(selection: Selection) -> None:
    needed = {*selection.with_gpu[1]["runs"]} - {*selection.without[1]["runs"]} | {*selection.with_gpu[1]["on_device"]}
    assert len({name.split("::")[0] for name in needed}) >= 7
    assert needed <= selection.selected("--benchmark-only")


def test_long_benchmarks_of_the_evaluator_are_selected_as_such(selection: Selection) -> None:
    file, chosen = "benchmarks/bench_evaluator.py", selection.selected("--full")
    assert {f"{file}::test_scoring_large_batches", f"{file}::test_scoring_560_architectures"} <= chosen


def test_what_selects_nothing_has_failed(tmp_path: Path) -> None:
    done, commands = run_script(tmp_path, code=5)
    assert done.returncode == 1
    parts = [line for line in (tmp_path / "out" / "summary.txt").read_text().splitlines() if "FAILED" in line]
    benches = [command for command in commands if "--benchmark-only" in command]
    assert len(parts) == len(benches) + 2  # all the tests are one part, the choice of a convolution another
    assert "nothing there to run" in parts[-1]
