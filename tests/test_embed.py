"""examples/embed: a foreign training loop on the installed wheel, run from outside the repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from installation import REPOSITORY, Environment, run_outside

EXAMPLE = REPOSITORY / "examples" / "embed" / "train_own.py"


def test_own_loop_on_the_installed_wheel(installed_wheel: Environment, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    command = (installed_wheel.python, "-W", "error:::bmsn", "train_own.py")
    printed = run_outside(*command, folder=tmp_path, OMP_NUM_THREADS="1").stdout  # tiny maps: threads only wait
    rows = [re.fullmatch(r"\[(\d),(\d),(\d)\]  (\d\.\d{3})  supernet ([01])", line) for line in printed.splitlines()]
    assert len(rows) == 15, printed  # the ranking and nothing else
    assert all(rows), printed
    depths = {row.groups()[:3] for row in rows if row}
    assert len(depths) == 15
    assert all(sum(map(int, stages)) == 7 for stages in depths)
    accuracies = [float(row[4]) for row in rows if row]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.5  # it learnt: chance is 0.25
    assert list(tmp_path.iterdir()) == [tmp_path / "train_own.py"]  # and left nothing behind
