"""Runs the tests of the Triton kernels in Triton's interpreter, where there is no GPU to run them on.

TRITON_INTERPRET=1 has to be there before Triton is imported: hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

from installation import REPOSITORY
from stacked import HAS_TRITON, INTERPRETING

MODULES = (
    "conv_bn",
    "conv_scale",
    "bn_add_relu_pool",
    "head",
    "evaluator",
    "triton_addresses",
    "affine_norm_relu",
    "norm_relu_triton",
    "cross_entropy",
    "sgd",
    "batches",
    "mixture_step",
)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (pip install 'bmsn[triton]')")
@pytest.mark.skipif(
    HAS_TRITON and version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter takes int() of arrays of one element, which NumPy refuses from 2.4 on",
)
@pytest.mark.skipif(INTERPRETING, reason="TRITON_INTERPRET=1: the tests themselves run")
@pytest.mark.parametrize("module", [f"test_{name}" for name in MODULES])
def test_in_the_interpreter(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", f"tests/{module}.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("BMSN_BACKEND", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
