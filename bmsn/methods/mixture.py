"""The balanced mixture of supernets: c by `draw`, m ~ p(m|c), balanced so that all supernets train equally often.

Source: Javan et al. 2023, section 2 (algorithm 1). `bmsn.mixture` has the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bmsn.config import Procedure
from bmsn.engine_mixture import MixtureEngine, runs_ahead
from bmsn.errors import RunStopped
from bmsn.methods.base import Outcome, Ranking, Sampler
from bmsn.methods.draws import draw_architectures, draw_weights
from bmsn.methods.problem import Problem
from bmsn.methods.supernet import SupernetMethod
from bmsn.mixture import BalancedMixture, inverse_temperature, mean_entropy
from bmsn.ops.balance import BalanceError
from bmsn.rng import generator
from bmsn.space import SearchSpace


class MixtureSampler(Sampler):
    """Draws c for all steps ahead, and m by the balanced mixture.

    Args:
        space: the architectures.
        num_supernets: M.
        num_steps: of the search.
        seed: of the draws.
        procedure: ema_decay, tol and visits.
        balance_every: steps from one balance to the next.
        temperature: 1/tau after a number of steps, 0 to `num_steps`.
        draw: what is drawn equally often, see `draw_architectures`.
        start_accuracy: a[c,m] before the first visit.
        num_alone: steps, the first ones, in which supernet 0 trains alone.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_supernets: int,
        num_steps: int,
        seed: int,
        *,
        procedure: Procedure,
        balance_every: int,
        temperature: Callable[[int], float],
        draw: str | None = None,
        start_accuracy: float = 1.0,
        num_alone: int = 0,
    ) -> None:
        self._space, self._num_steps, self.temperature = space, num_steps, temperature
        self.balance_every = balance_every
        self.mixture = BalancedMixture(
            num_architectures=len(space),
            num_supernets=num_supernets,
            ema_decay=procedure.ema_decay,
            initial_score=start_accuracy,
            tol=procedure.tol,
            balance_every=balance_every,
            weights=draw_weights(space, draw),
        )
        # What is trained at each step depends on (seed, step) alone: drawn ahead for all steps.
        in_blocks = procedure.visits == "blocks"
        self.drawn = draw_architectures(space, num_steps + 1, seed, draw=draw, in_blocks=in_blocks)
        self.uniforms = generator(seed, "supernets").random(num_steps + 1)
        self.uniforms[:num_alone] = 0.0  # draws the first supernet: all have a probability until 1/tau has grown
        self.supernet = self.mixture.draw(int(self.drawn[0]), temperature(0), float(self.uniforms[0]))

    def propose(self, step: int) -> tuple[int, int]:
        return int(self.drawn[step]), self.supernet

    def observe(self, step: int, architecture: int, supernet: int, accuracy: float | None) -> None:
        try:
            # One call for moving average, balance and the next step's draw: that is what is fast.
            self.supernet = self.mixture.observe_and_draw(
                architecture, supernet, accuracy, self.temperature(step + 1),
                int(self.drawn[step + 1]), float(self.uniforms[step + 1]),
            )  # fmt: skip
        except BalanceError as error:
            pair = f"architecture {self._space[architecture]}, supernet {supernet}"
            raise RunStopped(f"step {step}, {pair}: {error}") from error

    def refresh(self, pairs: Sequence[tuple[int, int]], accuracy: NDArray[np.float64]) -> None:
        self.mixture.refresh(accuracy.reshape(self.mixture.scores.shape), ema=False)

    def split(self) -> None:
        """All supernets become copies of the first, and what is known of it is known of them."""
        first = self.mixture.scores[:, :1]
        self.mixture.refresh(first.repeat(self.mixture.num_supernets, axis=1), ema=False)

    def pairs(self) -> list[tuple[int, int]]:
        rows, cols = self.mixture.scores.shape
        return [(c, m) for c in range(rows) for m in range(cols)]

    def rank(self) -> Ranking:
        """By a[c, m*], m* = argmax_m p(m|c) at the last temperature."""
        assignment = self.mixture.assignment(self.temperature(self._num_steps))
        best = likeliest(assignment, self.mixture.visits)
        estimate = self.mixture.scores[np.arange(len(best)), best]
        return Ranking(np.argsort(-estimate, kind="stable"), estimate, best, assignment)

    def metrics(self, step: int) -> dict[str, Any]:
        temperature = self.temperature(step)
        p = self.mixture.assignment(temperature)
        return {
            "inverse_temperature": temperature,
            "entropy": mean_entropy(p),
            "load": (self.mixture.weights[:, None] * p).mean(0),
            "mean_score": float(self.mixture.scores.mean()),
        }

    def snapshot(self, step: int) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "weights": self.mixture.weights,
            "scores": self.mixture.scores,
            "visits": self.mixture.visits,
            "assignment": self.mixture.assignment(self.temperature(step)),
            "last_visit": self.mixture.last_visit,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"supernet": self.supernet, "mixture": self.mixture.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.supernet = state["supernet"]
        self.mixture.load_state_dict(state["mixture"])


def likeliest(assignment: NDArray[np.float64], visits: NDArray[np.int64]) -> NDArray[np.int64]:
    """The supernet of each architecture, (C,) int64, of (C, M): argmax_m p(m|c), or the first while it alone trains."""
    return assignment.argmax(1) if visits[:, 1:].any() else np.zeros(len(assignment), np.int64)


class Mixture(SupernetMethod):
    """`--method mixture`: M supernets, each architecture ranked by its accuracy in its best one."""

    name: ClassVar[str] = "mixture"
    settings: ClassVar[frozenset[str]] = SupernetMethod.settings | {
        "engine",
        "draw",
        "rank_by",
        "start_accuracy",
        "split_after",
    }
    sampler: MixtureSampler

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        sampler = self.sampler
        self._engine: MixtureEngine | None = None
        if problem.train.device == problem.device:  # else the images did not fit there, and each batch has to be sent
            self._engine = MixtureEngine(
                problem, self.nets, self.velocity, sampler.mixture, sampler.drawn, sampler.uniforms,
                sampler.temperature, balance_every=sampler.balance_every,
            )  # fmt: skip
            self._engine.load(sampler.supernet)

    @classmethod
    def num_supernets(cls, space: SearchSpace) -> int | None:
        return None

    @classmethod
    def make_sampler(cls, problem: Problem) -> MixtureSampler:
        config = problem.config
        every = config.balance_every

        def temperature(step: int) -> float:
            """The schedule begins where all supernets train."""
            progress, split = problem.progress(step), config.split_after
            since = (progress - split) / (1 - split) if progress > split else 0.0
            return inverse_temperature(since, config.schedule, config.supernets)

        return MixtureSampler(
            problem.space, config.supernets, problem.num_steps, config.seed,
            procedure=config.procedure,
            balance_every=problem.train.steps_per_epoch if every == "epoch" else every,
            temperature=temperature,
            draw=config.draw,
            start_accuracy=config.start_accuracy,
            num_alone=problem.num_alone,
        )  # fmt: skip

    def steps(self, step: int, stop: int) -> list[Outcome]:
        problem, every = self.problem, self.problem.config.refresh_every
        if self._engine is None:
            return super().steps(step, stop)
        if not runs_ahead(problem.device):
            stop = step + 1
        if self.average is not None:
            stop = min(stop, self.average.next_after(step))
        if step < problem.num_alone:
            stop = min(stop, problem.num_alone)
        refresh = partial(self._refresh, stop - 1) if every and stop % every == 0 else None  # in the last of them
        done, self.sampler.supernet = self._engine.run(step, stop, refresh)
        self._after(stop)
        outcomes = []
        for index, supernet, loss, accuracy in zip(
            self.sampler.drawn[step:stop].tolist(), done.supernets, done.losses, done.accuracies, strict=True
        ):
            macs, images = problem.macs[index], problem.config.batch_size
            validated = math.isfinite(loss) and not math.isnan(accuracy)
            self.cost.train(images, macs)
            self.cost.validate(images if validated else 0, macs)
            trained = f"architecture {problem.space[index]} with supernet {supernet}"
            outcomes.append(Outcome(float(loss), float(accuracy) if validated else None, trained))
        return outcomes

    def _validates(self, step: int) -> bool:
        return self.problem.validates(step)

    def _split(self) -> None:
        super()._split()
        if self._engine is not None:
            self._engine.load(self.sampler.supernet)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._engine is not None:
            self._engine.load(self.sampler.supernet)
