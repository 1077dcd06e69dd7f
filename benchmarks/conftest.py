"""Options and fixtures of the benchmarks: `--full` runs the long ones; what has a GPU to run on runs there."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the benchmarks that take minutes")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def needs_full(full: bool) -> None:
    if not full:
        pytest.skip("takes minutes: --full")


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one. Float32 is IEEE's on both sides: cuDNN's default is TF32."""
    if not torch.cuda.device_count():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")
