"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from installation import PIP_OPTIONS, Environment, copy_sources

hypothesis.settings.register_profile("bmsn", deadline=None)  # no test asserts a wall-clock time
hypothesis.settings.load_profile("bmsn")


SUMMARY_ROW = "a row of the table at the end"


@pytest.fixture
def summary_row(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Lists a row after all tests, of failed ones too; as a property of the report it comes from a worker process."""
    return lambda row: record_property(SUMMARY_ROW, row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == SUMMARY_ROW
    ]
    if rows:
        terminalreporter.section("what compiled kernels take")
        for row in sorted(rows):
            terminalreporter.line(row)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.device_count(), reason="no GPU"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """The folder of CIFAR-10's parquet files that BMSN_CIFAR10 names."""
    folder = os.environ.get("BMSN_CIFAR10")
    if not folder:
        pytest.skip("BMSN_CIFAR10 is not set: it names a folder with CIFAR-10 as parquet files (Hugging Face layout)")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"BMSN_CIFAR10 names {path}, which is no folder")
    return path


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which bmsn was installed from a wheel, built from this working tree, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = Environment.create(folder / "venv")
    built = {"BMSN_BUILD_EXT": "1", "CXXFLAGS": "-O0"}  # -O0: compiles in half the time
    sources = copy_sources(folder / "sources")
    environment.pip("wheel", *PIP_OPTIONS, "--wheel-dir", "wheels", sources, folder=folder, **built)
    (wheel,) = (folder / "wheels").iterdir()
    environment.pip("install", *PIP_OPTIONS, wheel, folder=folder)
    return environment
