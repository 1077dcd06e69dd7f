"""Random search without training: a seeded permutation of the architectures."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bmsn.methods.untrained import UntrainedMethod
from bmsn.rng import generator


class Random(UntrainedMethod):
    """`--method random`."""

    name: ClassVar[str] = "random"
    ranked_by: ClassVar[str] = "chance"

    def order(self) -> NDArray[np.int64]:
        return generator(self.problem.config.seed, "random").permutation(len(self.problem.space))
