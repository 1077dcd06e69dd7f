"""The interface of a search method: `Sampler` says what is trained next, `Method` owns the networks and their step.

The loop (`bmsn.loop`) calls a `Method` alone. Most methods differ in their sampler only and are a
`bmsn.methods.supernet.SupernetMethod`; one with other networks, or another step, is a `Method` of its own. `darts` and
`gaea` are: each of their steps trains all resolutions of every layer at once, so there is no architecture to propose,
and what they learn from is the gradient of the validation loss with respect to alpha, not an accuracy to observe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bmsn.config import SearchConfig
from bmsn.errors import InputError
from bmsn.evaluator import Scores
from bmsn.methods.problem import Problem
from bmsn.plan import Pair
from bmsn.racing import Race
from bmsn.space import SearchSpace

# Settings that do not fit every method: each lists those it takes in `Method.settings`.
OPTIONAL_SETTINGS = (
    "refresh_every", "score_every", "evaluate_top", "race", "norm", "engine", "warm_up", "ucb_constant",
    "alpha_lr", "max_macs", "rank_by", "average_last", "adapt", "adapt_lr", "start_accuracy",
    "split_after", "draw",
)  # fmt: skip
_FITS_ALL = {"rank_by": "assigned", "split_after": 0.0}  # beside the default


@dataclass
class Cost:
    """What a search has computed so far; the rankings of `score_every`, which only watch, are not counted.

    Attributes:
        training_images: images in training steps, those of `adapt` included.
        validation_images: images predicted to learn an accuracy, once for each network they went through.
        training_macs: multiply-accumulates of the training steps: three times those of the forward pass.
        validation_macs: those of the predictions, each network by itself (scoring in one pass needs fewer).
    """

    training_images: int = 0
    validation_images: int = 0
    training_macs: int = 0
    validation_macs: int = 0

    def train(self, images: int, macs: int) -> None:
        """Counts a step on `images` images with a network of `macs` multiply-accumulates for one image."""
        self.training_images += images
        self.training_macs += 3 * images * macs

    def validate(self, images: int, macs: int) -> None:
        """Counts predictions of `images` images."""
        self.validation_images += images
        self.validation_macs += images * macs

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step did.

    Attributes:
        loss: of the training batch; not finite: the update was skipped, and nothing has changed.
        accuracy: on the validation batch, in [0, 1]; None: not measured.
        trained: what was trained, for messages.
    """

    loss: float
    accuracy: float | None
    trained: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """A method's own view of all C architectures.

    Attributes:
        order: (C,) int64: architecture indices, best first.
        estimate: (C,) float64: what the method thinks an architecture is worth, larger is better; NaN: nothing.
        supernet: (C,) int64: the supernet that scores it; -1: none.
        assignment: (C, M) float64, p(m|c), of a method whose every supernet trains every architecture; None: it is not
            such a one.
    """

    order: NDArray[np.int64]
    estimate: NDArray[np.float64]
    supernet: NDArray[np.int64]
    assignment: NDArray[np.float64] | None = None


class Sampler(ABC):
    """What is trained at each step, and what its accuracies say of the architectures: numbers alone, no networks.

    Its draws are pure functions of (seed, purpose, step) (`bmsn.rng`) and of what it observed, and `state_dict` has all
    that it observed: so a resumed search proposes the same.

    A sampler needs a space and no images, so it can be driven by hand, with rewards in [0, 1] from anywhere:

        >>> from bmsn.methods.mcts import MctsSampler
        >>> space = bmsn.SearchSpace.named("resnet14-cifar10")
        >>> sampler = MctsSampler(space, num_steps=300, seed=0, constant=0.5, warm_up=0.1, in_blocks=True)
        >>> for step in range(300):
        ...     architecture, supernet = sampler.propose(step)  # their indices; this method has one supernet, 0
        ...     reward = 0.9 if space[architecture].stage_depths == (2, 4, 1) else 0.5
        ...     sampler.observe(step, architecture, supernet, reward)
        >>> ranking = sampler.rank()
        >>> print(space[ranking.order[0]], ranking.estimate[ranking.order[0]].round(3))
        [2,4,1] 0.9

    `bmsn.methods.boltzmann.BoltzmannSampler`, `few_shot.FewShotSampler` and `mixture.MixtureSampler` are driven alike;
    what each of them needs is said there.
    """

    @abstractmethod
    def propose(self, step: int) -> tuple[int, int]:
        """The architecture and the supernet of `step`; called for 0, 1, 2, ... with an `observe` after each."""

    @abstractmethod
    def observe(self, step: int, architecture: int, supernet: int, accuracy: float | None) -> None:
        """Takes the validation accuracy of what `step` trained; None: the step was skipped and says nothing."""

    @abstractmethod
    def rank(self) -> Ranking:
        """The ranking by what was observed so far."""

    @abstractmethod
    def pairs(self) -> list[tuple[int, int]]:
        """Every (architecture, supernet) that can be proposed, architecture-major."""

    def refresh(self, pairs: Sequence[tuple[int, int]], accuracy: NDArray[np.float64]) -> None:
        """Replaces what is known of `pairs` by accuracies on one batch, where the method takes `refresh_every`."""
        raise NotImplementedError(f"{type(self).__name__} takes no refresh_every")

    def split(self) -> None:
        """All supernets have become copies of the first, where the method takes `split_after`."""
        raise NotImplementedError(f"{type(self).__name__} takes no split_after")

    def metrics(self, step: int) -> dict[str, Any]:
        """Numbers for the record of kind "step" in metrics.jsonl, after `step` steps."""
        return {}

    def snapshot(self, step: int) -> dict[str, Any] | None:
        """The record of the whole state, some 50 a search: "kind" and what belongs to it; None: there is none."""
        return None

    def findings(self) -> dict[str, Any]:
        """What this method alone found, plain values for result.json."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that changes during a search: arrays, tensors, numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


class Method(ABC):
    """One way to search: its networks, their training step, and the ranking at the end.

    Class attributes:
        name: as `--method` takes it.
        trains: False: no step is taken, and nothing is scored.
        by_accuracy: the final ranking is by the accuracy of the final scoring; False: it is `rank().order`, with that
            accuracy beside it.
        ranked_by: what the final ranking is by, in words. estimate: what `Ranking.estimate` is, in words.
        settings: which of OPTIONAL_SETTINGS it takes.

    Attributes:
        after_batch: what `score` calls after each batch, see `bmsn.score_architectures`.

    Args:
        problem: space, images, schedule, device.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    by_accuracy: ClassVar[bool] = True
    ranked_by: ClassVar[str] = "validation accuracy"
    estimate: ClassVar[str] = "a[c,m]"
    settings: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cost = Cost()
        self.after_batch: Callable[[int], None] = lambda images: None

    @classmethod
    def num_supernets(cls, space: SearchSpace) -> int | None:
        """M that the method needs in this space; None: any."""
        return 1

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """Raises InputError for a setting that was given and does not fit the method."""
        defaults = {field.name: field.default for field in fields(SearchConfig)}
        for name in OPTIONAL_SETTINGS:
            value, fits = getattr(config, name), _FITS_ALL.get(name, defaults[name])
            if name not in cls.settings and value not in (defaults[name], fits):
                raise InputError(f"{name} does not fit method {cls.name}: it must be {fits}; got {value}")

    @abstractmethod
    def step(self, step: int) -> Outcome:
        """One training step, counted in `cost`. Raises RunStopped where the search cannot go on."""

    def steps(self, step: int, stop: int) -> list[Outcome]:
        """One step or more, up to step `stop` - 1: until then nobody looks."""
        return [self.step(step)]

    @abstractmethod
    def rank(self) -> Ranking:
        """The method's own ranking so far."""

    @abstractmethod
    def pairs(self) -> list[Pair]:
        """Every (architecture, supernet) that there is to score."""

    @abstractmethod
    def score(self, pairs: Sequence[Pair], *, watching: bool = False) -> Scores | Race:
        """Counts of `pairs` on the validation half, in their order or, from a race, the race's.

        Args:
            pairs: with `config.race` in the order that decides between equal counts.
            watching: a ranking on the way (`score_every`): no race, and not counted in `cost`.
        """

    def metrics(self, step: int) -> dict[str, Any]:
        """As `Sampler.metrics`."""
        return {}

    def snapshot(self, step: int) -> dict[str, Any] | None:
        """As `Sampler.snapshot`."""
        return None

    def findings(self) -> dict[str, Any]:
        """As `Sampler.findings`."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """Sentences about what it found, which stand below the table."""
        return ()

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that changes during a search but `cost`: tensors on the host, arrays, numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
