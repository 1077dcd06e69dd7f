"""Few-shot: the supernet is split by the position of the first pooling, one supernet for each.

Source: Zhao et al. 2021, "Few-shot neural architecture search" (a supernet split by one choice, its parts beginning as
copies of it: `split_after`); Javan et al. 2023, section 3, splits by the first pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bmsn.methods.averages import MovingAverages
from bmsn.methods.base import Ranking, Sampler
from bmsn.methods.draws import draw_by_group, pooling_groups
from bmsn.methods.problem import Problem
from bmsn.methods.supernet import SupernetMethod
from bmsn.space import SearchSpace


class FewShotSampler(Sampler):
    """Supernets equally often, and within one its architectures equally often.

    Drawing architectures uniformly instead would give the supernet of a single late pooling a C-th of the steps, and
    its accuracy, compared with those of the others, would tell of that.

    Args:
        space: the architectures.
        num_steps: of the search.
        seed: of the draws.
        decay: beta of the moving averages.
        in_blocks: draw in shuffled blocks of each once instead of independently.
        num_alone: steps, the first ones, in which supernet 0 trains what is drawn for any of them.
    """

    def __init__(
        self, space: SearchSpace, num_steps: int, seed: int, *, decay: float, in_blocks: bool, num_alone: int = 0
    ) -> None:
        self.group = pooling_groups(space, 0)
        self.averages = MovingAverages(len(space), decay)
        self._architectures = draw_by_group(self.group, num_steps, seed, in_blocks=in_blocks, purpose="few-shot")
        self._supernets = self.group[self._architectures]
        self._supernets[:num_alone] = 0

    def propose(self, step: int) -> tuple[int, int]:
        return int(self._architectures[step]), int(self._supernets[step])

    def observe(self, step: int, architecture: int, supernet: int, accuracy: float | None) -> None:
        if accuracy is not None:
            self.averages.observe(architecture, accuracy)

    def refresh(self, pairs: Sequence[tuple[int, int]], accuracy: NDArray[np.float64]) -> None:
        self.averages.values[[c for c, _ in pairs]] = accuracy

    def split(self) -> None:
        """Accuracies are of architectures, whichever supernet they were seen in."""

    def pairs(self) -> list[tuple[int, int]]:
        return list(enumerate(self.group.tolist()))

    def rank(self) -> Ranking:
        return Ranking(self.averages.order(), self.averages.values.copy(), self.group)

    def metrics(self, step: int) -> dict[str, Any]:
        visits = np.bincount(self.group, weights=self.averages.visits)
        return {"load": visits / max(1, visits.sum())}

    def snapshot(self, step: int) -> dict[str, Any]:
        return {
            "kind": "few-shot",
            "scores": self.averages.values,
            "visits": self.averages.visits,
            "supernet": self.group,
        }

    def state_dict(self) -> dict[str, Any]:
        return self.averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averages.load_state_dict(state)


class FewShot(SupernetMethod):
    """`--method few-shot`: as many supernets as there are positions of the first pooling, L - p."""

    name: ClassVar[str] = "few-shot"
    estimate: ClassVar[str] = "a[c]"
    settings: ClassVar[frozenset[str]] = SupernetMethod.settings | {"split_after"}

    @classmethod
    def num_supernets(cls, space: SearchSpace) -> int:
        return int(pooling_groups(space, 0).max()) + 1

    @classmethod
    def make_sampler(cls, problem: Problem) -> FewShotSampler:
        config = problem.config
        return FewShotSampler(
            problem.space, problem.num_steps, config.seed,
            decay=config.procedure.ema_decay, in_blocks=config.procedure.visits == "blocks",
            num_alone=problem.num_alone,
        )  # fmt: skip
