"""`MovingAverages`: one moving average of validation accuracy for each architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmsn.errors import InputError


class MovingAverages:
    """a[c]: the first accuracy of an architecture, then a <- beta a + (1 - beta) accuracy.

    Args:
        num_architectures: C.
        decay: beta.
    Attributes:
        values: (C,) float64, NaN before the first accuracy.
        visits: (C,) int64, accuracies observed.
    """

    def __init__(self, num_architectures: int, decay: float) -> None:
        self.values: NDArray[np.float64] = np.full(num_architectures, np.nan)
        self.visits: NDArray[np.int64] = np.zeros(num_architectures, np.int64)
        self._decay = decay

    def observe(self, architecture: int, accuracy: float) -> None:
        """Takes one accuracy in. Raises InputError where it is not finite."""
        if not np.isfinite(accuracy):
            raise InputError(f"accuracy of architecture {architecture} must be finite; got {accuracy}")
        before = self.values[architecture]
        self.values[architecture] = (
            accuracy if np.isnan(before) else self._decay * before + (1 - self._decay) * accuracy
        )
        self.visits[architecture] += 1

    def order(self) -> NDArray[np.int64]:
        """(C,) architectures from the largest average to the smallest; equal ones by index, unknown ones last."""
        return np.argsort(-self.values, kind="stable")

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values.copy(), "visits": self.visits.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values[...], self.visits[...] = state["values"], state["visits"]
