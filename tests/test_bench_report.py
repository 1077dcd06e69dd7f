"""What turns measurements into tables, and the command for a GPU machine where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from installation import REPOSITORY

MEASURED = {
    "machine_info": {"machine": "x86_64", "python_version": "3.11.7", "cpu": {"brand_raw": "a processor"}},
    "commit_info": {"id": "0123456789abcdef"},
    "datetime": "2026-01-02T03:04:05.678",
    "benchmarks": [
        {
            "name": "test_a",
            "fullname": "benchmarks/bench_a.py::test_a",
            "group": "a group",
            "stats": {"median": 0.002},
            "extra_info": {
                "ours (ms)": 2.0,
                "a peer (ms)": 8.5,
                "ours against a peer": "4.25x (4.00 to 4.50)",
                "floor / bmsn": 0.8,
            },
        },
        {
            "name": "test_b",
            "fullname": "benchmarks/bench_b.py::test_b",
            "group": None,
            "stats": {"median": 0.003},
            "extra_info": {},
        },
    ],
}


def test_every_peer_has_its_time_and_the_ratio_with_its_spread(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(MEASURED))
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "report.py"), str(file)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[0] == "## a processor, 2026-01-02T03:04:05, Python 3.11.7, commit 0123456"
    assert "### a group: test_a" in lines
    assert "| ours | 2 |  |" in lines
    assert "| a peer | 8.5 | 4.25x (4.00 to 4.50) |" in lines
    assert "floor / bmsn: 0.8" in lines
    assert "### benchmarks/bench_b.py::test_b: test_b" in lines
    assert "| median | 3 |  |" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run for minutes")
def test_without_a_gpu_the_gpu_command_says_so(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "gpu.sh"
    for arguments, words in (([], "usage: "), ([str(tmp_path / "out")], "no GPU: ")):
        done = subprocess.run(
            ["bash", str(script), *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHON": sys.executable},
        )
        assert done.returncode == 2
        assert done.stderr.startswith(words)
