"""`SupernetMethod`: supernets with shared weights, of which one trains one architecture a step, as a sampler proposes.

Source: Javan et al. 2023, section 2: SGD on a training batch, then the accuracy on one validation batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from bmsn.adaptation import score_adapted
from bmsn.evaluator import Scores, calibrate, score_architectures, score_one_by_one
from bmsn.methods.base import Method, Outcome, Ranking, Sampler
from bmsn.methods.problem import Problem
from bmsn.network import SupernetMixture
from bmsn.plan import Pair
from bmsn.racing import Race, images_seen, race
from bmsn.rng import torch_seed
from bmsn.trainer import batch_accuracy, train_step
from bmsn.weight_average import WeightAverage

NUM_CALIBRATION = 1024  # training images that calibrated statistics are measured on


class SupernetMethod(Method):
    """M supernets trained by momentum SGD. A subclass names its sampler.

    Attributes:
        nets: the supernets; velocity: (M, P), their momentum.
        average: the mean of the last weights, which is scored once there is one; None: the last weights are.
        sampler: says which architecture trains in which supernet.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "refresh_every",
            "score_every",
            "evaluate_top",
            "race",
            "norm",
            "max_macs",
            "average_last",
            "adapt",
            "adapt_lr",
        }
    )

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        config, data = problem.config, problem.data
        weights = torch.Generator().manual_seed(torch_seed(config.seed, "weights"))
        self.nets = SupernetMixture(
            problem.space, config.supernets, data.num_classes, data.in_channels, generator=weights
        )
        self.nets.pixel_table = problem.table
        self.nets.to(problem.device)
        self.velocity = torch.zeros_like(self.nets.arena.detach())
        self.average: WeightAverage | None = None
        if config.average_last:
            self.average = WeightAverage(self.nets, problem.num_steps, config.average_last)
        self.sampler = self.make_sampler(problem)
        self._done = 0  # steps, where there was one since the search was taken up

    @classmethod
    @abstractmethod
    def make_sampler(cls, problem: Problem) -> Sampler:
        """The sampler at the start of a search."""

    def step(self, step: int) -> Outcome:
        problem, config = self.problem, self.problem.config
        index, supernet = self.sampler.propose(step)
        architecture, macs = problem.space[index], problem.macs[index]
        images, labels = problem.train_batch(step)
        loss = train_step(
            self.nets, self.velocity, architecture, supernet, images, labels,
            lr=problem.learning_rate(step), momentum=config.momentum, weight_decay=config.weight_decay,
        )  # fmt: skip
        self.cost.train(len(labels), macs)
        accuracy: float | None = None
        if math.isfinite(loss) and self._validates(step):
            images, labels = problem.validation_batch(step)
            accuracy = batch_accuracy(self.nets, architecture, supernet, images, labels)
            self.cost.validate(len(labels), macs)
        if config.refresh_every and (step + 1) % config.refresh_every == 0:
            self._refresh(step)
        self.sampler.observe(step, index, supernet, accuracy)
        self._after(step + 1)
        return Outcome(loss, accuracy, f"architecture {architecture} with supernet {supernet}")

    def _validates(self, step: int) -> bool:
        return True

    def _refresh(self, step: int) -> None:
        """All that the sampler knows from one validation batch, scored in one pass."""
        self._stand_in(step + 1)
        images, labels = self.problem.validation_batch(step)
        scores = score_architectures(self.nets, images, labels, self.pairs(), batch_size=len(images))
        self._count(scores)
        self.sampler.refresh(self.sampler.pairs(), scores.accuracy.numpy())

    def _after(self, step: int) -> None:
        """What is due after `step` steps: the split of the supernet, and taking the weights into their mean."""
        self._done = step
        if step == self.problem.num_alone:
            self._split()
        if self.average is not None:
            self._stand_in(step)
            self.average.update(step, self.nets)

    def _stand_in(self, step: int) -> None:
        """Until the split, whoever looks at a supernet sees the one that trains: the others are as they were made."""
        if 0 < step <= self.problem.num_alone:
            rows = self.nets.arena.detach()
            rows[1:] = rows[0]

    def _split(self) -> None:
        """The supernet that has trained alone becomes all of them."""
        for rows in (self.nets.arena.detach(), self.velocity):
            rows[1:] = rows[0]
        self.sampler.split()

    def rank(self) -> Ranking:
        return self.sampler.rank()

    def pairs(self) -> list[Pair]:
        return [(self.problem.space[index], supernet) for index, supernet in self.sampler.pairs()]

    def score(self, pairs: Sequence[Pair], *, watching: bool = False) -> Scores | Race:
        problem, config = self.problem, self.problem.config
        if watching:
            self._stand_in(self._done)
        images, labels = problem.validation_half()
        scorer: Callable[..., Scores] = score_architectures if config.fast_eval else score_one_by_one
        scorer = partial(scorer, after_batch=self.after_batch)
        nets = self.average.nets if self.average is not None and self.average.count else self.nets
        if config.norm == "calibrated":
            known = problem.training_images(NUM_CALIBRATION)
            if config.adapt:  # which changes weights
                scorer = partial(scorer, norm="calibrated", calibration_images=known)
            else:  # once for all batches of a race
                scorer = partial(scorer, norm=calibrate(nets, known, pairs, images.dtype))
        scores: Scores | Race
        if config.adapt:
            scores = score_adapted(
                nets, images, labels, pairs, steps=config.adapt,
                batch=lambda step: problem.train_batch(problem.num_steps + step),  # those that would come next
                lr=config.adapt_lr, momentum=config.momentum, weight_decay=config.weight_decay,
                batch_size=config.batch_size, score=scorer,
            )  # fmt: skip
            for architecture, _ in pairs if not watching else ():
                self.cost.train(config.adapt * config.batch_size, problem.macs[architecture.index])
        elif config.race and not watching:
            scores = race(
                nets, images, labels, config.race, confidence=config.confidence, pairs=pairs,
                batch_size=config.batch_size, seed=config.seed, score=scorer,
            )  # fmt: skip
        else:
            scores = scorer(nets, images, labels, pairs, batch_size=config.batch_size)
        if not watching:
            self._count(scores)
        return scores

    def _count(self, scores: Scores | Race) -> None:
        for (architecture, _), images in zip(scores.pairs, images_seen(scores), strict=True):
            self.cost.validate(images, self.problem.macs[architecture.index])

    def metrics(self, step: int) -> dict[str, Any]:
        return self.sampler.metrics(step)

    def snapshot(self, step: int) -> dict[str, Any] | None:
        return self.sampler.snapshot(step)

    def findings(self) -> dict[str, Any]:
        return self.sampler.findings()

    def state_dict(self) -> dict[str, Any]:
        state = {
            "arena": self.nets.arena.detach().cpu().clone(),
            "velocity": self.velocity.cpu().clone(),
            "sampler": self.sampler.state_dict(),
        }
        return state if self.average is None else state | {"average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.nets.arena.copy_(state["arena"])
        self.velocity.copy_(state["velocity"])
        self.sampler.load_state_dict(state["sampler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
