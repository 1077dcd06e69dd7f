"""`engines.assert_curves_agree`, which decides on a GPU whether graphs train as eager steps do."""

from __future__ import annotations

import pytest
import torch

from bmsn.engine import Engine, Steps
from engines import SPACE, assert_curves_agree, make_state


def curves(**settings: object) -> list[Steps]:
    return [Engine(make_state(seed=seed, **settings), list(SPACE), None).run(0, 200) for seed in range(3)]


def test_what_rounds_differently_agrees_and_what_trains_differently_does_not() -> None:
    eager = curves()
    assert_curves_agree(eager, curves(dtype=torch.bfloat16))
    for lr in (0.005, 0.2):
        with pytest.raises(AssertionError):
            assert_curves_agree(eager, curves(lr=lr))
