"""The bound that the other tests lean on does refuse what it should."""

from __future__ import annotations

import pytest
import torch

from oracles import assert_no_worse

ORACLE = torch.tensor([1.0, -4.0, 0.1], dtype=torch.float64)
EAGER = torch.tensor([1.0, -4.0 + 1e-5, 0.1])


def test_accepts_up_to_twice_eagers_error() -> None:
    assert_no_worse(torch.tensor([1.0 + 1.9e-5, -4.0, 0.1]), eager=EAGER, oracle=ORACLE)
    assert_no_worse(torch.tensor([1.0 + 2e-7, -4.0, 0.1]), eager=ORACLE.float(), oracle=ORACLE)  # one unit, eager exact


@pytest.mark.parametrize(
    ("actual", "eager"),
    [
        (torch.tensor([1.0 + 3e-5, -4.0, 0.1]), EAGER),  # three times eager's error
        (torch.tensor([1.0 + 2e-6, -4.0, 0.1]), ORACLE.float()),  # eager exact, more than a unit
        (torch.tensor([float("nan"), -4.0, 0.1]), EAGER),
        (torch.tensor([1.0, float("-inf"), 0.1]), EAGER),
        (ORACLE.bfloat16(), EAGER),  # another dtype
        (ORACLE[:2].float(), EAGER),  # another shape
    ],
    ids=["error", "unit", "nan", "inf", "dtype", "shape"],
)
def test_refuses(actual: torch.Tensor, eager: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_no_worse(actual, eager=eager, oracle=ORACLE)
