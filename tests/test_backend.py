"""The choice of backend, its report, and that importing bmsn changes nothing in the process."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bmsn import backend
from bmsn.errors import InputError
from installation import REPOSITORY, run_outside


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BMSN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def install_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Pretends that Triton is installed in a version, and nothing else with it; None: without metadata."""

    def install(version: str | None) -> None:
        def version_of(name: str) -> str:
            if version is None:
                raise backend.importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(backend.importlib.metadata, "version", version_of)
        backend._find_triton.cache_clear()

    backend._find_triton.cache_clear()
    yield install
    backend._find_triton.cache_clear()


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_load_extension", lambda: (None, "bmsn._C does not load: a reason"))
    monkeypatch.setattr(backend, "_warn_once", lambda reason: None)


@pytest.fixture
def fake_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_load_extension", lambda: (json, "bmsn._C is loaded"))


@pytest.mark.usefixtures("fake_extension")
def test_auto_takes_the_best_that_can_run() -> None:
    assert backend.resolve("balance") == "cpp"
    assert backend.resolve("balance", available=("reference",)) == "reference"
    assert backend.resolve("balance", device="cuda") == "reference"  # cpp takes no CUDA tensors


@pytest.mark.usefixtures("no_extension")
def test_auto_falls_back_and_says_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(backend, "_warn_once", told.append)
    assert backend.resolve("balance") == "reference"
    assert told == ["bmsn._C does not load: a reason"]


@pytest.mark.usefixtures("no_extension")
def test_asked_for_by_name_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.resolve("balance", "reference") == "reference"
    with pytest.raises(InputError, match=r"backend asks for 'cpp', which cannot run: bmsn\._C does not load: a reason"):
        backend.resolve("balance", "cpp")
    monkeypatch.setenv("BMSN_BACKEND", "cpp")
    with pytest.raises(InputError, match=r"BMSN_BACKEND asks for 'cpp'"):
        backend.resolve("balance")


@pytest.mark.usefixtures("fake_extension")
def test_environment_chooses_where_the_argument_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMSN_BACKEND", "reference")
    assert backend.resolve("balance") == "reference"
    assert backend.resolve("balance", "cpp") == "cpp"
    monkeypatch.setenv("BMSN_BACKEND", "")  # set but empty, as a shell script may leave it
    assert backend.resolve("balance") == "cpp"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"backend is 'cp' \(did you mean 'cpp'\?\); accepted: auto, reference"):
        backend.resolve("balance", "cp")
    with pytest.raises(InputError, match="backend is 'triton', but balance has only: cpp, reference"):
        backend.resolve("balance", "triton")
    monkeypatch.setenv("BMSN_BACKEND", "fast")
    with pytest.raises(InputError, match="BMSN_BACKEND is 'fast'; accepted"):
        backend.resolve("balance")


def test_triton_is_for_cuda_tensors_and_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, install_triton: Callable[[str | None], None]
) -> None:
    choices = ("triton", "reference")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'bmsn\[triton\]'"):
        backend.resolve("balance", "triton", choices, "cuda")
    install_triton("3.6.0")
    assert backend.resolve("balance", "auto", choices, "cuda") == "triton"
    assert backend.resolve("balance", "auto", choices, "cpu") == "reference"
    with pytest.raises(InputError, match="Triton needs CUDA tensors"):
        backend.resolve("balance", "triton", choices, "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.resolve("balance", "triton", choices, "cpu") == "triton"


@pytest.mark.parametrize("version", ["2.1.0", "3.5.1", "3.5.0+git1234"])
def test_a_triton_that_is_too_old_is_not_taken(version: str, install_triton: Callable[[str | None], None]) -> None:
    install_triton(version)
    assert backend.resolve("sgd", device="cuda") == "reference"
    with pytest.raises(InputError, match=rf"Triton {re.escape(version)} is too old, bmsn\.kernels needs 3\.6 "):
        backend.resolve("sgd", "triton", device="cuda")
    assert "is too old" in backend.backend_report().backends["triton"]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.10.0a1", "4.0", None, "unknown"])
def test_every_other_triton_is_taken(version: str | None, install_triton: Callable[[str | None], None]) -> None:
    """Also one whose version nobody can tell: it is for its kernels to fail, not for us to guess."""
    install_triton(version)
    assert backend.resolve("sgd", "triton", device="cuda") == backend.resolve("sgd", device="cuda") == "triton"


def test_the_oldest_triton_is_that_of_the_requirements() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["triton"]
    assert f">={'.'.join(map(str, backend.OLDEST_TRITON))}," in requirement


@pytest.mark.usefixtures("fake_extension")
def test_report_names_what_auto_takes() -> None:
    report = backend.backend_report()
    assert set(report.ops) == set(backend.OPS)
    assert report.ops["balance"].startswith("cpp (cpu)")
    assert report.machine["threads"] == str(torch.get_num_threads())
    text = str(report)
    assert "bmsn._C is loaded" in text
    assert all(op in text for op in backend.OPS)


def test_report_names_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMSN_CONVOLUTION", "library")
    assert backend.backend_report().backends["convolution"] == "BMSN_CONVOLUTION=library on Triton"
    monkeypatch.setenv("BMSN_CONVOLUTION", "cudnn")  # as below, it doesn't raise
    assert "error: BMSN_CONVOLUTION is 'cudnn'; accepted" in backend.backend_report().backends["convolution"]


@pytest.mark.usefixtures("no_extension")
def test_report_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.backend_report().backends["cpp"] == "bmsn._C does not load: a reason"
    monkeypatch.setenv("BMSN_BACKEND", "cpp")  # a report is what someone with this error asks for: it doesn't raise
    assert "error: balance: BMSN_BACKEND asks for 'cpp'" in backend.backend_report().ops["balance"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.skipif(backend.extension() is None, reason="bmsn._C is not built")
def test_one_libgomp_in_the_process(tmp_path: Path) -> None:
    code = """
import bmsn.backend
bmsn.backend.extension()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(len(paths), *paths)
"""
    done = run_outside(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert done.stdout.split()[0] == "1", done.stdout


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import sys
import torch
from global_state import unchanged

with unchanged():
    import bmsn
assert not torch.cuda.is_initialized()
imported = {name.split(".")[0] for name in sys.modules}
assert not imported & {"triton", "matplotlib", "pyarrow", "tensorboard", "onnx"}, imported
assert not any(name.startswith("bmsn.kernels") for name in sys.modules)
"""
    path = f"{REPOSITORY}:{Path(__file__).parent}"
    done = run_outside(sys.executable, "-W", "error:::bmsn", "-c", code, folder=tmp_path, PYTHONPATH=path)
    assert done.stdout == ""
