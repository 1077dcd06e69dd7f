"""Ranking by multiply-accumulates alone, the dearest first: a search that does not beat it has learnt nothing."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bmsn.methods.untrained import UntrainedMethod


class Macs(UntrainedMethod):
    """`--method macs`; of equal ones the first in the order of the space."""

    name: ClassVar[str] = "macs"
    ranked_by: ClassVar[str] = "MACs, the dearest first"

    def order(self) -> NDArray[np.int64]:
        return np.argsort(-np.array(self.problem.macs), kind="stable")
