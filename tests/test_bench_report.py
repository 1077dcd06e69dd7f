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
            "name": "test_c",
            "fullname": "benchmarks/bench_c.py::test_c",
            "group": "exact",
            "stats": {"median": 0.002},
            "extra_info": {
                "ours (ms)": 2.0,
                "ours (logit error)": "0.01 of 3",
                "ours (twice eager's)": "0.02",
                "ours (count error)": "1 of 96",
                "a peer (ms)": 8.5,
                "a peer (logit error)": "0.01 of 3",
                "a floor (ms)": 1.5,
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


def printed(folder: Path) -> list[str]:
    file = folder / "measured.json"
    file.write_text(json.dumps(MEASURED))
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "report.py"), str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_peer_has_its_time_and_the_ratio_with_its_spread(tmp_path: Path) -> None:
    lines = printed(tmp_path)
    assert lines[0] == "## a processor, 2026-01-02T03:04:05, Python 3.11.7, commit 0123456"
    assert "### a group: test_a" in lines
    assert "| ours | 2 |  |" in lines
    assert "| a peer | 8.5 | 4.25x (4.00 to 4.50) |" in lines
    assert "floor / bmsn: 0.8" in lines
    assert "### benchmarks/bench_b.py::test_b: test_b" in lines
    assert "| median | 3 |  |" in lines


def test_a_side_has_its_speed_and_its_errors_in_one_row(tmp_path: Path) -> None:
    lines = printed(tmp_path)
    start = lines.index("### exact: test_c")
    assert lines[start + 2 : start + 7] == [
        "| what | ms | ours against it | logit error | twice eager's | count error |",
        "|---|---|---|---|---|---|",
        "| ours | 2 |  | 0.01 of 3 | 0.02 | 1 of 96 |",
        "| a peer | 8.5 |  | 0.01 of 3 |  |  |",
        "| a floor | 1.5 |  |  |  |  |",
    ]


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
