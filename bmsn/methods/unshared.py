"""Single path one-shot with weights of their own for each (layer, resolution), which no other resolution shares.

`spos-unshared` trains the architectures of the space, `spos-unshared-all` all R^(L-1) resolution paths, also those that
go up again (nearest upsampling); both rank the architectures by their accuracy on the validation half. The second also
looks for the best path: too many to score, so uphill from the best architecture (`bmsn.methods.climbing`).

Source: Javan et al. 2023, section 3 and table 2 (SPOS without weight sharing between resolutions, 36 or 19,683 paths).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bmsn.evaluator import Scores
from bmsn.methods.averages import MovingAverages
from bmsn.methods.base import Method, Outcome, Ranking
from bmsn.methods.climbing import climb
from bmsn.methods.draws import draw_architectures
from bmsn.methods.found import in_words, path_findings
from bmsn.methods.multires import count_correct_paths, forward_path, gather_path, scatter_path
from bmsn.methods.problem import Problem
from bmsn.network import SupernetMixture
from bmsn.paths import (
    ResolutionPath,
    architecture_path,
    check_resolutions,
    num_paths,
    num_resolutions,
    path_by_index,
    path_macs,
)
from bmsn.plan import Pair
from bmsn.rng import generator, torch_seed
from bmsn.trainer import descend


class UnsharedPaths(Method):
    """One path a step: SGD on its weights alone, then its accuracy on a validation batch.

    Attributes:
        nets: R rows: what row r says of layer l is what that layer does at resolution r (`bmsn.methods.multires`).
        velocity: (R, P), their momentum.
        visits: (L, R) int64, steps that trained layer l at resolution r.
        accuracy: (L, R) float64, moving average of the validation accuracies of the paths that pass there, from the
            first one on; 0 where none did.
    """

    estimate: ClassVar[str] = "moving average"
    settings: ClassVar[frozenset[str]] = frozenset({"score_every", "evaluate_top"})

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        config, data, space = problem.config, problem.data, problem.space
        weights = torch.Generator().manual_seed(torch_seed(config.seed, "weights"))
        rows = num_resolutions(space)
        self.nets = SupernetMixture(space, rows, data.num_classes, data.in_channels, generator=weights)
        self.nets.pixel_table = problem.table
        self.nets.to(problem.device)
        self.velocity = torch.zeros_like(self.nets.arena.detach())
        self.visits = np.zeros((space.num_layers, rows), np.int64)
        self.accuracy = np.zeros((space.num_layers, rows))

    @abstractmethod
    def propose(self, step: int) -> ResolutionPath:
        """The path that `step` trains."""

    def observe(self, step: int, path: ResolutionPath, accuracy: float) -> None:
        """Takes the validation accuracy of what `step` trained."""
        places = (np.arange(len(path.resolutions)), np.array(path.resolutions))
        decay = np.where(self.visits[places] == 0, 0.0, self.problem.config.procedure.ema_decay)
        self.accuracy[places] = decay * self.accuracy[places] + (1 - decay) * accuracy
        self.visits[places] += 1

    def step(self, step: int) -> Outcome:
        problem, config, path = self.problem, self.problem.config, self.propose(step)
        macs = self._macs(path)
        images, labels = problem.train_batch(step)
        rows = self.nets.arena.detach()
        row, velocity = (gather_path(self.nets, tensor, path) for tensor in (rows, self.velocity))
        loss = descend(
            row, velocity, lambda weights: F.cross_entropy(forward_path(self.nets, weights, images, path), labels),
            lr=problem.learning_rate(step), momentum=config.momentum, weight_decay=config.weight_decay,
        )  # fmt: skip
        self.cost.train(len(labels), macs)
        accuracy: float | None = None
        if math.isfinite(loss):
            scatter_path(self.nets, rows, path, row)
            scatter_path(self.nets, self.velocity, path, velocity)
            accuracy = self._batch_accuracy(row, path, *problem.validation_batch(step))
            self.cost.validate(len(labels), macs)
            self.observe(step, path, accuracy)
        return Outcome(loss, accuracy, f"path {path}")

    @torch.no_grad()
    def _batch_accuracy(self, row: Tensor, path: ResolutionPath, images: Tensor, labels: Tensor) -> float:
        return float((forward_path(self.nets, row, images, path).argmax(1) == labels).double().mean())

    def _macs(self, path: ResolutionPath) -> int:
        data = self.problem.data
        return path_macs(self.problem.space, path, num_classes=data.num_classes, in_channels=data.in_channels)

    def rank(self) -> Ranking:
        estimate = self.estimates()
        return Ranking(np.argsort(-estimate, kind="stable"), estimate, np.zeros(len(estimate), np.int64))

    @abstractmethod
    def estimates(self) -> NDArray[np.float64]:
        """(C,): what each architecture is worth by the validation batches seen so far."""

    def pairs(self) -> list[Pair]:
        return [(architecture, 0) for architecture in self.problem.space]

    def score(self, pairs: Sequence[Pair], *, watching: bool = False) -> Scores:
        images, labels = (tensor.to(self.problem.device) for tensor in self.problem.validation_half())
        paths = [architecture_path(self.problem.space, architecture) for architecture, _ in pairs]
        correct = self._count(paths, images, labels, watching=watching)
        return Scores(tuple(pairs), correct, len(labels))

    def _count(self, paths: Sequence[ResolutionPath], images: Tensor, labels: Tensor, *, watching: bool) -> Tensor:
        if not watching:
            for path in paths:
                self.cost.validate(len(labels), self._macs(path))
        batch_size = self.problem.config.batch_size
        return count_correct_paths(self.nets, images, labels, paths, batch_size, self.after_batch)

    def snapshot(self, step: int) -> dict[str, Any]:
        return {"kind": "resolutions", "visits": self.visits, "accuracy": self.accuracy}

    def state_dict(self) -> dict[str, Any]:
        return {
            "arena": self.nets.arena.detach().cpu().clone(), "velocity": self.velocity.cpu().clone(),
            "visits": self.visits.copy(), "accuracy": self.accuracy.copy(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.nets.arena.copy_(state["arena"])
        self.velocity.copy_(state["velocity"])
        self.visits[:], self.accuracy[:] = state["visits"], state["accuracy"]


class UnsharedSpos(UnsharedPaths):
    """`--method spos-unshared`: over the architectures of the space, which it draws as `spos` does."""

    name: ClassVar[str] = "spos-unshared"
    settings: ClassVar[frozenset[str]] = UnsharedPaths.settings | {"max_macs", "draw"}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        space, config = problem.space, problem.config
        self._paths = [architecture_path(space, architecture) for architecture in space]
        in_blocks = config.procedure.visits == "blocks"
        self._drawn = draw_architectures(space, problem.num_steps, config.seed, draw=config.draw, in_blocks=in_blocks)
        self._averages = MovingAverages(len(space), config.procedure.ema_decay)

    def propose(self, step: int) -> ResolutionPath:
        return self._paths[self._drawn[step]]

    def observe(self, step: int, path: ResolutionPath, accuracy: float) -> None:
        super().observe(step, path, accuracy)
        self._averages.observe(int(self._drawn[step]), accuracy)

    def estimates(self) -> NDArray[np.float64]:
        """Moving average of the accuracies of each architecture; NaN before the first."""
        return self._averages.values.copy()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"averages": self._averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._averages.load_state_dict(state["averages"])


class UnsharedSposAll(UnsharedPaths):
    """`--method spos-unshared-all`: over all R^(L-1) paths, drawn uniformly, hardly any of them twice.

    Findings: the best path met by going uphill from the best architecture. It was chosen by the accuracy that is given
    with it, so that is optimistic.
    """

    name: ClassVar[str] = "spos-unshared-all"

    def __init__(self, problem: Problem) -> None:
        check_resolutions(problem.space, f"method {self.name}")
        super().__init__(problem)
        numbers = generator(problem.config.seed, "paths")
        self._drawn = numbers.integers(num_paths(problem.space), size=problem.num_steps)
        self._found: dict[str, Any] = {}

    def propose(self, step: int) -> ResolutionPath:
        return path_by_index(self.problem.space, int(self._drawn[step]))

    def estimates(self) -> NDArray[np.float64]:
        """Mean over the layers of `accuracy` at the architecture's resolutions: no path comes often enough for its own
        average.
        """
        layers = np.arange(self.problem.space.num_layers)
        paths = (architecture_path(self.problem.space, architecture) for architecture in self.problem.space)
        return np.array([self.accuracy[layers, path.resolutions].mean() for path in paths])

    def score(self, pairs: Sequence[Pair], *, watching: bool = False) -> Scores:
        scores = super().score(pairs, watching=watching)
        if not watching:
            self._climb(scores)
        return scores

    def _climb(self, scores: Scores) -> None:
        space = self.problem.space
        images, labels = (tensor.to(self.problem.device) for tensor in self.problem.validation_half())
        best = scores.pairs[int(scores.correct.argmax())][0]
        path, correct, scored = climb(
            architecture_path(space, best),
            lambda paths: self._count(paths, images, labels, watching=False).tolist(),
            num_resolutions(space),
        )
        self._found = path_findings(self.problem, path) | {
            "resolution_path_accuracy": correct / len(labels), "paths_scored": scored,
        }  # fmt: skip

    def findings(self) -> dict[str, Any]:
        return self._found

    def notes(self) -> tuple[str, ...]:
        found = self._found
        accuracy, scored = 100 * found["resolution_path_accuracy"], found["paths_scored"]
        return (
            f"Best of {scored} paths, uphill from the best architecture: {in_words(found)}; {accuracy:.2f} % of the "
            "validation half.",
        )
