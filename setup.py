"""Builds bmsn._C from csrc/ (C++20 and pybind11, no torch headers) and maps bmsn.kernels to kernels/triton.

Everything else is in pyproject.toml. Environment variables:
    BMSN_BUILD_EXT  1: a failed build of the extension fails the installation; 0: it is not built.
                    Otherwise a failed build is a warning, and bmsn runs on its reference backend.
    BMSN_WERROR     1: C++ warnings are errors.
    MAX_JOBS        compile at most so many files at a time (default: the cores this process may use).
    CXX, CXXFLAGS, LDFLAGS  as usual.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


def flags() -> list[str]:
    import pybind11  # here, so that an environment without it installs like one without a compiler

    includes = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    system = [word for folder in dict.fromkeys(includes) for word in ("-isystem", folder)]  # their warnings aren't ours
    return FLAGS + (["-Werror"] if os.environ.get("BMSN_WERROR") == "1" else []) + system


def find_ninja() -> str | None:
    """The ninja beside this Python (pip's, in an environment that is not activated), or the one on the PATH."""
    return shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def ninja_file(sources: list[str], objects: Path, library: Path) -> str:
    """The text of a build.ninja that compiles `sources` and links them; ninja keeps track of headers and flags."""

    def path(name: Path | str) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    compile_line = command(*compiler, "-fPIC", *flags(), *shlex.split(os.environ.get("CXXFLAGS", "")))
    link_line = command(*compiler, "-shared", "-fopenmp", *shlex.split(os.environ.get("LDFLAGS", "")))
    built = {source: objects.resolve() / f"{Path(source).stem}.o" for source in sources}
    lines = [
        "rule compile",
        f"  command = {compile_line} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_line} $in -o $out",
        *(f"build {path(target)}: compile {path(Path(source).resolve())}" for source, target in built.items()),
        f"build {path(library.resolve())}: link {' '.join(path(target) for target in built.values())}",
    ]
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("BMSN_BUILD_EXT", "")
        if wanted == "0":
            self.extensions = []
            return
        try:
            super().run()
        except Exception as error:  # whatever went wrong (no compiler, no C++20, no Python.h), the reference still runs
            if wanted == "1":
                raise
            self.extensions = []  # nothing to install or to copy
            print(
                f"WARNING: bmsn._C could not be built ({error}); bmsn installs without it and runs on its slow "
                "reference backend. Install a C++20 compiler and reinstall; BMSN_BUILD_EXT=1 makes this an error.",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        ninja = find_ninja()
        if ninja is None or sys.platform != "linux":
            ext.extra_compile_args, ext.extra_link_args = flags(), ["-fopenmp"]
            super().build_extension(ext)
            return
        objects, library = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(ext.sources, objects, library))
        cores = len(os.sched_getaffinity(0))
        jobs = min(cores, int(os.environ.get("MAX_JOBS") or cores))
        subprocess.run([ninja, "-C", str(objects), "-j", str(jobs)], check=True)


setup(
    packages=[*find_packages(include=["bmsn", "bmsn.*"]), "bmsn.kernels"],
    package_dir={"bmsn.kernels": "kernels/triton"},
    package_data={"bmsn": ["py.typed", "**/*.csv", "templates/*.j2"]},
    ext_modules=[
        Extension(
            "bmsn._C",
            sorted(str(source) for source in Path("csrc").glob("*.cpp")),
            depends=sorted(str(header) for header in Path("csrc").glob("*.h")),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
