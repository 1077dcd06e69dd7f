"""Boltzmann exploration: one supernet, architectures drawn in proportion to exp(k a_c) with k rising from 1 to 100.

Source: Javan et al. 2023, section 3, eq. 7; the last value of k is not given there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bmsn.methods.averages import MovingAverages
from bmsn.methods.base import Ranking, Sampler
from bmsn.methods.draws import draw_uniform
from bmsn.methods.problem import Problem
from bmsn.methods.supernet import SupernetMethod
from bmsn.mixture import inverse_temperature
from bmsn.rng import generator
from bmsn.space import SearchSpace


class BoltzmannSampler(Sampler):
    """p(c) = softmax(k a_c), where an architecture not seen yet counts as a_c = 1: it is tried.

    k is 1 at the first step after the warm-up and rises linearly towards 100 at the end. The warm-up draws uniformly;
    what it observes is kept in a_c.

    Args:
        space: the architectures.
        num_steps: of the search.
        seed: of the draws.
        decay: beta of the moving averages a_c.
        warm_up: share of the steps that are drawn uniformly, at the start.
        in_blocks: draw those in shuffled blocks of each once instead of independently.
    """

    def __init__(
        self, space: SearchSpace, num_steps: int, seed: int, *, decay: float, warm_up: float, in_blocks: bool
    ) -> None:
        self._space, self._num_steps = space, num_steps
        self.averages = MovingAverages(len(space), decay)
        self.num_warm_up = round(warm_up * num_steps)
        self._drawn = draw_uniform(len(space), self.num_warm_up, seed, in_blocks=in_blocks)
        self._uniforms = generator(seed, "boltzmann").random(num_steps)

    def inverse_temperature(self, step: int) -> float:
        """k after `step` steps."""
        left = self._num_steps - self.num_warm_up
        progress = max(0, step - self.num_warm_up) / left if left else 0.0
        return inverse_temperature(progress, "inverse", 1)

    def probabilities(self, step: int) -> NDArray[np.float64]:
        """(C,) p(c) at `step`."""
        number = len(self._space)
        if step < self.num_warm_up:
            return np.full(number, 1 / number)
        values = np.where(np.isnan(self.averages.values), 1.0, self.averages.values)
        weights = np.exp(self.inverse_temperature(step) * (values - values.max()))
        return weights / weights.sum()

    def propose(self, step: int) -> tuple[int, int]:
        if step < self.num_warm_up:
            return int(self._drawn[step]), 0
        cumulative = np.cumsum(self.probabilities(step))
        # Scaled by the last value, which rounding keeps from being 1: the draw is below it.
        return int(np.searchsorted(cumulative, self._uniforms[step] * cumulative[-1], side="right")), 0

    def observe(self, step: int, architecture: int, supernet: int, accuracy: float | None) -> None:
        if accuracy is not None:
            self.averages.observe(architecture, accuracy)

    def refresh(self, pairs: Sequence[tuple[int, int]], accuracy: NDArray[np.float64]) -> None:
        self.averages.values[[c for c, _ in pairs]] = accuracy

    def pairs(self) -> list[tuple[int, int]]:
        return [(c, 0) for c in range(len(self._space))]

    def rank(self) -> Ranking:
        """By a_c; what was never drawn comes last."""
        return Ranking(self.averages.order(), self.averages.values.copy(), np.zeros(len(self._space), np.int64))

    def metrics(self, step: int) -> dict[str, Any]:
        p = self.probabilities(step)
        entropy = -float((p * np.log(np.where(p > 0, p, 1.0))).sum())
        return {"inverse_temperature": self.inverse_temperature(step), "entropy": entropy}

    def snapshot(self, step: int) -> dict[str, Any]:
        return {
            "kind": "boltzmann",
            "scores": self.averages.values,
            "visits": self.averages.visits,
            "probability": self.probabilities(step),
        }

    def findings(self) -> dict[str, Any]:
        return {"visits": {a.slug: int(self.averages.visits[a.index]) for a in self._space}}

    def state_dict(self) -> dict[str, Any]:
        return self.averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averages.load_state_dict(state)


class Boltzmann(SupernetMethod):
    """`--method boltzmann`: picks the architecture of the largest moving average, as the paper does.

    The accuracy of the final scoring stands beside it. With `--warm-up` the first steps are uniform.
    """

    name: ClassVar[str] = "boltzmann"
    by_accuracy: ClassVar[bool] = False
    ranked_by: ClassVar[str] = "the moving average of validation accuracies"
    estimate: ClassVar[str] = "a[c]"
    settings: ClassVar[frozenset[str]] = frozenset(
        {"refresh_every", "score_every", "evaluate_top", "norm", "warm_up", "max_macs"}
    )

    @classmethod
    def make_sampler(cls, problem: Problem) -> BoltzmannSampler:
        config = problem.config
        return BoltzmannSampler(
            problem.space, problem.num_steps, config.seed, decay=config.procedure.ema_decay,
            warm_up=config.warm_up, in_blocks=config.procedure.visits == "blocks",
        )  # fmt: skip
