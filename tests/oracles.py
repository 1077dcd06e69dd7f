"""What the tests of several modules measure with: error bounds against a float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(actual: Tensor, *, eager: Tensor, oracle: Tensor, factor: float = 2, units: float = 1) -> None:
    """Asserts that `actual` is at most `factor` times as far from the oracle as plain torch is, plus some units.

    A unit in the last place (of the largest value, in the dtype of `actual`) is there because eager's error can be 0.

    Args:
        actual: the result under test.
        eager: the reference, run in the dtype of `actual`.
        oracle: the reference, run in float64.
        factor: how many times eager's largest error is allowed.
        units: how many units on top.
    """
    assert oracle.dtype == torch.float64, f"the oracle is {oracle.dtype}, not float64"
    assert actual.dtype == eager.dtype, f"{actual.dtype} is compared with eager's {eager.dtype}"
    assert actual.shape == eager.shape == oracle.shape, f"{actual.shape}, eager {eager.shape}, oracle {oracle.shape}"
    wide, plain, oracle = (t.detach().cpu().double() for t in (actual, eager, oracle))
    assert torch.equal(wide.isfinite(), oracle.isfinite()), "not finite where the oracle is, or the reverse"
    finite = oracle.isfinite()
    if not finite.any():
        return
    unit = torch.finfo(actual.dtype).eps * oracle[finite].abs().max().item()
    error = (wide - oracle)[finite].abs().max().item()
    eager_error = (plain - oracle)[finite].abs().max().item()
    bound = factor * eager_error + units * unit
    assert error <= bound, (
        f"error {error:.3g} is above {factor} x eager's {eager_error:.3g} + {units} x one unit {unit:.3g}"
    )
