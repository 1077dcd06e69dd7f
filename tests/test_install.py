"""Installation: as a wheel, editable, and without a compiler; always offline, and used from outside the repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from installation import PIP_OPTIONS, REPOSITORY, Environment, copy_sources, run_outside

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools", "pybind11")),
    reason="pip, setuptools or pybind11 is not installed",
)

WHERE = """
import sys
import bmsn, bmsn.kernels, bmsn.backend
print(bmsn.__file__, bmsn.kernels.__file__, getattr(bmsn.backend.extension(), "__file__", None), sep="\\n")
"""


def where(environment: Environment, folder: Path) -> list[str]:
    """The files of bmsn, bmsn.kernels and bmsn._C (or "None") as a program in `folder` sees them."""
    return run_outside(environment.python, "-c", WHERE, folder=folder).stdout.splitlines()


def test_wheel(installed_wheel: Environment, tmp_path: Path) -> None:
    site = installed_wheel.site
    package, kernels, extension = where(installed_wheel, tmp_path)
    assert package == str(site / "bmsn" / "__init__.py")
    assert kernels == str(site / "bmsn" / "kernels" / "__init__.py")
    assert Path(extension).parent == site / "bmsn"
    # nothing beside bmsn: a top-level `kernels` or `tests` would shadow other packages
    assert {path.name for path in site.iterdir()} == {"bmsn", "bmsn-0.1.0.dist-info", "outer.pth"}


def test_wheel_has_every_file_of_the_package(installed_wheel: Environment) -> None:
    expected = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "bmsn").rglob("*") if path.is_file()}
    expected = {path for path in expected if path.suffix not in (".pyc", ".so")}
    installed = {path.relative_to(installed_wheel.site) for path in installed_wheel.site.rglob("bmsn/**/*")}
    assert Path("bmsn/py.typed") in expected
    assert expected - installed == set()


def test_editable(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources", real_extension=False)
    environment = Environment.create(tmp_path / "venv")
    built = {"BMSN_BUILD_EXT": "1", "CXXFLAGS": "-O0"}
    environment.pip("install", *PIP_OPTIONS, "--editable", sources, folder=tmp_path, **built)

    package, kernels, extension = where(environment, tmp_path)
    assert package == str(sources / "bmsn" / "__init__.py")
    assert kernels == str(sources / "kernels" / "triton" / "__init__.py")
    assert Path(extension).parent == sources / "bmsn"


def test_without_a_compiler_it_installs_with_a_warning_and_runs_on_the_reference(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources", real_extension=False)
    environment = Environment.create(tmp_path / "venv")
    printed = environment.pip("install", "-v", *PIP_OPTIONS, sources, folder=tmp_path, CXX="/nonexistent")
    assert printed.count("WARNING: bmsn._C could not be built") == 1

    assert where(environment, tmp_path)[-1] == "None"
    code = "import bmsn.backend as b; print(b.resolve('balance'), b.resolve('balance')); b.resolve('balance', 'cpp')"
    run = run_outside(environment.python, "-c", code, folder=tmp_path, check=False).stdout
    assert run.count("bmsn runs on its slow reference backend") == 1  # said once, to who runs it
    assert "reference reference\n" in run
    assert "InputError: balance: backend asks for 'cpp', which cannot run: bmsn._C was not built" in run


@pytest.mark.parametrize(("wanted", "compiler", "succeeds"), [("1", "/nonexistent", False), ("0", "c++", True)])
def test_build_ext_variable(wanted: str, compiler: str, succeeds: bool, tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources", real_extension=False)
    environment = Environment.create(tmp_path / "venv")
    command = ["install", *PIP_OPTIONS, sources]
    environment.pip(*command, folder=tmp_path, check=False, BMSN_BUILD_EXT=wanted, CXX=compiler)
    assert (environment.site / "bmsn").is_dir() == succeeds
    assert not list(environment.site.glob("bmsn/_C*"))


def test_setuptools_compiles_where_there_is_no_ninja(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources", real_extension=False)
    code = (
        "import runpy, shutil, sys; shutil.which = lambda *_, **__: None; "
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    optimised_less = {"CFLAGS": "-O0", "CXXFLAGS": "-O0"}
    run_outside(sys.executable, "-c", code, folder=sources, BMSN_BUILD_EXT="1", **optimised_less)
    assert list(sources.glob("bmsn/_C*.so"))
    assert not list(sources.rglob("build.ninja"))
