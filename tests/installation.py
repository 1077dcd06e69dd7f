"""How the tests install bmsn and run it from outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("bmsn", "csrc", "kernels", "setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "LICENSE")
# offline, with what is installed: what has to work on a cluster's node
PIP_OPTIONS = ("--no-index", "--no-build-isolation", "--no-deps")


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own that sees the packages of the one that runs the tests, but no editable bmsn."""

    python: Path
    site: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=False)
        (site,) = folder.glob("lib/python*/site-packages")
        # a folder that a .pth file names is searched, but the .pth files in it, an editable install's hook, are not run
        (site / "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
        return cls(folder / "bin" / "python", site)

    def pip(self, *words: str | Path, folder: Path, check: bool = True, **environment: str) -> str:
        """Runs pip in this environment and returns what it printed."""
        return run_outside(self.python, "-m", "pip", *words, folder=folder, check=check, **environment).stdout


def copy_sources(folder: Path, *, real_extension: bool = True) -> Path:
    """Copies what a build reads, and nothing that was built, so that it leaves no trace in the working tree.

    Where only the way of building is tested, an empty extension instead of the real one saves most of the time.
    """
    folder.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    if not real_extension:
        shutil.rmtree(folder / "csrc")
        (folder / "csrc").mkdir()
        (folder / "csrc" / "bindings.cpp").write_text("#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) {}\n")
    return folder


def run_outside(
    *command: str | Path, folder: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, without the caller's BMSN_* and PYTHON* variables; a failure shows its output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BMSN_", "PYTHON"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=inherited | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0 or not check, f"{command} failed:\n{done.stdout}"
    return done
