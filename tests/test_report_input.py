"""Folders and flags that a report cannot be made of: the error says what is wrong, the exit code is 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmsn.errors import InputError
from bmsn.report import main
from bmsn.reporting import write_report
from bmsn.result import SCHEMA_VERSION
from bmsn.space import SearchSpace
from run_folders import write_run

SPACE = SearchSpace.named("resnet14-cifar10")


def damage(run: Path, how: str) -> None:
    result = run / "result.json"
    if how == "newer":
        result.write_text(json.dumps(json.loads(result.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    elif how == "torn":
        result.write_text(result.read_text()[:500])
    elif how == "other":
        result.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "rows": []}))
    elif how == "metrics":
        (run / "metrics.jsonl").write_text('{"kind": "step"}\n')
    elif how == "space":
        result.unlink()
        (run / "config.yaml").write_text("space: resnet99\n")
    elif how == "config":
        (run / "config.yaml").write_text("- 1\n")
    elif how == "nothing yet":
        result.unlink()
        (run / "metrics.jsonl").write_text("")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("newer", f"schema_version must be at most {SCHEMA_VERSION}.*got {SCHEMA_VERSION + 1}"),
        ("torn", "result.json: not a result of bmsn.search"),
        ("other", "not a run of bmsn.search: KeyError"),
        ("metrics", 'line 1 has no integer "step"'),
        ("space", "space 'resnet99' is unknown"),
        ("config", "its config.yaml names no space"),
        ("nothing yet", "the run is unfinished and has recorded nothing yet"),
    ],
)
def test_damaged_run(how: str, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE)
    damage(run, how)
    with pytest.raises(InputError, match=message):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", SPACE)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report' / 'report.html'}\n"
    assert main([str(tmp_path)]) == 2
    assert "holds no run of bmsn.search" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(run), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main([str(run), "--truth", "paper"]) == 2  # of another space
    for wrong in ([], [str(run), "--epochs", "3"], [str(run), "--interference"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra_it_says_what_to_install(missing: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPACE)
    code = f"import sys; sys.modules[{missing!r}] = None; from bmsn.report import main; sys.exit(main(sys.argv[1:]))"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, env=one_thread)
    assert done.returncode == 2
    assert "pip install 'bmsn[report]'" in done.stderr
