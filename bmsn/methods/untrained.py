"""Rankings that need no training: what every search has to beat."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bmsn.evaluator import Scores
from bmsn.methods.base import Method, Outcome, Ranking
from bmsn.plan import Pair


class UntrainedMethod(Method):
    """No networks, no steps, no accuracies: an order alone. Settings of training change nothing."""

    trains: ClassVar[bool] = False
    by_accuracy: ClassVar[bool] = False
    estimate: ClassVar[str] = "own"

    @abstractmethod
    def order(self) -> NDArray[np.int64]:
        """(C,) architectures, best first."""

    def rank(self) -> Ranking:
        order = self.order()
        return Ranking(order, np.full(len(order), np.nan), np.full(len(order), -1))

    def pairs(self) -> list[Pair]:
        return []

    def score(self, pairs: Sequence[Pair], *, watching: bool = False) -> Scores:
        return Scores((), torch.zeros(0, dtype=torch.int64), len(self.problem.validation.indices))

    def step(self, step: int) -> Outcome:
        raise AssertionError(f"method {self.name} takes no steps")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
