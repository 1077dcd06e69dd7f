"""Rows that tests list are in the table after all of them, from worker processes too, passed or failed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from installation import REPOSITORY

TESTS = """
def test_passes(summary_row):
    summary_row("b: 8 registers")
    summary_row("a: 9 registers  spills")

def test_fails(summary_row):
    summary_row("c: 7 registers")
    assert False
"""
WORKERS = pytest.param(
    ["-n", "2"], marks=pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="no pytest-xdist")
)


@pytest.mark.parametrize("options", [[], WORKERS], ids=["one process", "workers"])
def test_rows_are_listed_at_the_end(tmp_path: Path, options: list[str]) -> None:
    file = tmp_path / "test_rows.py"
    file.write_text(TESTS)
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests" / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)]
    environment = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment)
    lines = done.stdout.splitlines()
    start = next(place for place, line in enumerate(lines) if "what compiled kernels take" in line)
    assert lines[start + 1 : start + 4] == ["a: 9 registers  spills", "b: 8 registers", "c: 7 registers"], done.stdout
