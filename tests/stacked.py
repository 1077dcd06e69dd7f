"""What the tests of the evaluator's ops share: stacked states, weights in an arena, guard bands, where Triton runs."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from bmsn.backend import extension

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = bool(torch.cuda.device_count()) and not INTERPRETING
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETING or ON_GPU),
    reason="Triton runs on a GPU or in its interpreter: test_triton_interpreter.py runs these tests there",
)
needs_gpu = pytest.mark.skipif(not HAS_TRITON or not ON_GPU, reason="the interpreter has no bfloat16: needs a GPU")

needs_cpp = pytest.mark.skipif(extension() is None, reason="bmsn._C was not built")
WITHOUT_CPP = ["reference", pytest.param("triton", marks=needs_triton)]  # of ops that have no C++
BACKENDS = [*WITHOUT_CPP, pytest.param("cpp", marks=needs_cpp)]
TRITON_DTYPES = [
    pytest.param(torch.float32, marks=needs_triton, id="triton-float32"),
    pytest.param(torch.bfloat16, marks=needs_gpu, id="triton-bfloat16"),
]
GUARD = 64  # elements before and after a guarded tensor; 64 keeps the alignment that kernels are specialised for


def device_for(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and ON_GPU else "cpu")


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def random_map(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, H, W), channels_last, every channel with a mean and spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = torch.randn((2, shape[1], 1, 1), generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.5 + spread.abs()) + mean
    return channels_last(values.to(dtype))


def random_rows(num_sets: int, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(S, *shape) as rows of an arena, an odd number of elements apart; 4 dimensions lie in (O, kh, kw, I) order."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    arena = torch.randn((num_sets, size + 7), generator=generator, dtype=torch.float64).to(dtype)
    rows = arena[:, 3 : 3 + size]
    if len(shape) == 4:
        o, i, kh, kw = shape
        return rows.unflatten(1, (o, kh, kw, i)).permute(0, 1, 4, 2, 3)
    return rows.unflatten(1, shape)


def guarded(tensor: Tensor, *, poison: bool = False) -> Tensor:
    """A copy with the same sizes and strides between guards of NaN (integers: of -1); `poison`: its values are too."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    bad = torch.nan if tensor.is_floating_point() else -1
    buffer = torch.full((extent + 2 * GUARD,), bad, dtype=tensor.dtype, device=tensor.device)
    copy = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
    return copy if poison else copy.copy_(tensor)


def assert_guards_hold(**tensors: Tensor) -> None:
    """Nothing was written around a tensor that `guarded` made: what lies there is NaN, or -1, still."""
    for name, tensor in tensors.items():
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        buffer = tensor.as_strided((size,), (1,), 0)
        for guard in (buffer[:GUARD], buffer[-GUARD:]):
            whole = guard.isnan() if tensor.is_floating_point() else guard == -1
            assert whole.all(), f"written out of bounds of {name}"
