"""Triton kernels compile ahead of time, without a GPU, and what is tuned for (bfloat16 on sm_90) does not spill."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install 'bmsn[triton]')", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the interpreter has no compiler", allow_module_level=True)

import aot

CASES = [case for case in aot.cases() if case.ordinary]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was compiled by another version of the kernels or of Triton is not what is tested, nor left behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_configuration_for_sm_90(case: aot.Case, summary_row: Callable[[str], None]) -> None:
    for launch in aot.record(case.launch):
        usage = aot.compile_launch(launch, 90)
        summary_row(aot.row(case, 90, usage))
        assert usage.registers > 0
        assert usage.shared <= 227 * 1024  # what a block can have
        assert aot.may_spill(case, 90) or usage.local == usage.stack == 0, aot.row(case, 90, usage)


@pytest.mark.parametrize("architecture", [80, 100])
def test_every_kernel_for_other_architectures(architecture: int, summary_row: Callable[[str], None]) -> None:
    seen = set()
    for case in CASES:
        for launch in aot.record(case.launch):
            if (launch.kernel, case.dtype) not in seen:
                seen.add((launch.kernel, case.dtype))
                usage = aot.compile_launch(launch, architecture)
                summary_row(aot.row(case, architecture, usage))
                assert usage.shared <= 163 * 1024  # an A100's block
    assert len({kernel for kernel, _ in seen}) == 13


def test_every_tuned_configuration_is_compiled() -> None:
    """With statistics, with and without a shortcut's convolution; without that also scaled."""
    configs = aot.kernels("conv_bn").CONFIGS
    table = {(*key, scaled, *c) for key in configs for c in configs[key] for scaled in {False, not key[1]}}
    compiled = set()
    for case in CASES:
        for launch in aot.record(case.launch):
            if launch.kernel.__name__ == "_conv_kernel":
                options = launch.options
                blocks = (options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"])
                given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
                variant = (given["shortcut_weight_ptr"] is not None, given["scale_ptr"] is not None)
                compiled.add((case.dtype.itemsize, *variant, *blocks, options["num_warps"], options["num_stages"]))
    assert compiled >= table
