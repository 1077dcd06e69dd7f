"""The engine of a search: whole steps enqueued without waiting, eagerly or as one CUDA graph for each architecture.

`search_step` is the step, the same for both engines: batch, forward, loss, backward, SGD, validation batch, moving
average, balance, draw. All that depends on an accuracy stays in tensors on the device, `SearchState`; what is trained
at each step is drawn ahead, so the host only enqueues, and looks at losses and counts after many steps.

Source: Javan et al. 2023, section 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmsn.backend import resolve
from bmsn.data import BatchStream
from bmsn.errors import InputError, RunStopped
from bmsn.network import SupernetMixture
from bmsn.ops.cross_entropy import cross_entropy
from bmsn.ops.mixture_step import MixtureTensors, failure, mixture_step
from bmsn.space import Architecture
from bmsn.trainer import device_step

_log = logging.getLogger("bmsn.search")

SCRATCH_ROWS = 2  # not 1: Triton compiles sizes of 1 apart, and nothing must be compiled while a graph is captured


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What stands still during a search.

    Attributes:
        momentum, weight_decay: of SGD.
        ema_decay: beta of a[c,m].
        tol: KL(p(m) || uniform) that a balance reaches.
        balance_every: steps from one balance to the next.
        validates: whether a step has a validation batch; one without changes nothing in a[c,m].
    """

    momentum: float
    weight_decay: float
    ema_decay: float
    tol: float
    balance_every: int
    validates: Callable[[int], bool] = lambda step: True


@dataclass(frozen=True, kw_only=True)
class SearchState:
    """All that a step reads and changes, on one device; T steps in the search.

    Attributes:
        nets: the supernets; their arena is (M, P).
        velocity: (M, P), momentum.
        copies: (M, P) bfloat16 working copies of the weights; None: they are rounded on the way.
        train, validation: where the batches come from.
        mixture: a[c,m], potentials, the next supernet, the draws made ahead.
        step: () int64, steps done.
        lrs: (T,) learning rate of each step, dtype of the arena.
        losses: (T,) dtype of the arena: of each step's training batch, not finite where the step was skipped.
        correct: (T,) int64: validation images classified correctly; -1 where a step has no validation batch.
        supernets: (T,) int64: which supernet each step trained.
        settings: of the steps.
    """

    nets: SupernetMixture
    velocity: Tensor
    copies: Tensor | None
    train: BatchStream
    validation: BatchStream
    mixture: MixtureTensors
    step: Tensor
    lrs: Tensor
    losses: Tensor
    correct: Tensor
    supernets: Tensor
    settings: StepSettings

    @classmethod
    def create(
        cls,
        nets: SupernetMixture,
        velocity: Tensor,
        copies: Tensor | None,
        train: BatchStream,
        validation: BatchStream,
        mixture: MixtureTensors,
        lrs: Sequence[float],
        settings: StepSettings,
    ) -> SearchState:
        """The state at step 0; histories are empty."""
        arena, num_steps = nets.arena.detach(), len(lrs)
        counters = torch.zeros((2, num_steps), dtype=torch.int64, device=arena.device)
        return cls(
            nets=nets, velocity=velocity, copies=copies, train=train, validation=validation, mixture=mixture,
            step=torch.zeros((), dtype=torch.int64, device=arena.device),
            lrs=torch.tensor(lrs, dtype=arena.dtype).to(arena.device),
            losses=torch.full((num_steps,), torch.nan, dtype=arena.dtype, device=arena.device),
            correct=counters[0], supernets=counters[1], settings=settings,
        )  # fmt: skip

    def scratch(self) -> SearchState:
        """A state of its own to warm up on: a few rows of weights, and the same draws and batches, which are read."""
        own = torch.Generator()  # torch's random state belongs to the caller
        nets = SupernetMixture(
            self.nets.space, SCRATCH_ROWS, self.nets.num_classes, self.nets.in_channels, generator=own
        )  # fmt: skip
        with torch.no_grad():
            nets.to(self.nets.arena).arena.copy_(self.nets.arena[:1].expand(SCRATCH_ROWS, -1))
        written = ("scores", "potentials", "visits", "last_visit", "outcome", "supernet")
        return replace(
            self,
            nets=nets,
            velocity=torch.zeros_like(nets.arena.detach()),
            copies=None if self.copies is None else self.copies[:1].repeat(SCRATCH_ROWS, 1),
            mixture=replace(self.mixture, **{name: getattr(self.mixture, name).clone() for name in written}),
            **{name: getattr(self, name).clone() for name in ("step", "losses", "correct", "supernets")},
        )


def train_and_validate(
    state: SearchState, architecture: Architecture, *, validate: bool = True
) -> tuple[Tensor, Tensor]:
    """The first part of a step: trains the drawn supernet, then validates it. Waits for nothing.

    Returns:
        loss: (), not finite where the update was skipped; correct: () int64, of the validation batch, -1 without.
    """
    settings, row = state.settings, state.mixture.supernet
    place = state.step.view(1)
    images, labels = state.train.at(state.step)
    loss, _ = device_step(
        state.nets, state.velocity, state.copies, architecture, row, images, labels,
        lr=state.lrs.index_select(0, place)[0], momentum=settings.momentum, weight_decay=settings.weight_decay,
    )  # fmt: skip
    if validate:
        correct = count_correct(state, architecture, *state.validation.at(state.step))
    else:
        correct = torch.full_like(state.step, -1)
    state.losses.index_copy_(0, place, loss.view(1))
    state.correct.index_copy_(0, place, correct.view(1))
    state.supernets.index_copy_(0, place, row.view(1))
    return loss, correct


@torch.no_grad()
def count_correct(state: SearchState, architecture: Architecture, images: Tensor, labels: Tensor) -> Tensor:
    """() int64: how many images the drawn supernet classifies correctly, as one statistics group."""
    nets, index = state.nets, state.mixture.supernet.view(1)
    convs, head = nets.arena.index_select(0, index)[0].split(nets.part_sizes)
    if state.copies is not None:
        convs = state.copies[:, : nets.part_sizes[0]].index_select(0, index)[0]
    weights = nets.views(convs.to(images.dtype), head.to(torch.promote_types(images.dtype, torch.float32)))
    return cross_entropy(nets.forward_weights(weights, images, architecture), labels)[1]


def observe_and_draw(state: SearchState, loss: Tensor, correct: Tensor) -> None:
    """The second part: tells the mixture, draws the next step's supernet, counts the step. Waits for nothing."""
    settings = state.settings
    mixture_step(
        state.mixture, state.step, correct, loss.isfinite() & (correct >= 0),
        num_images=state.validation.batch_size, ema_decay=settings.ema_decay, tol=settings.tol,
        balance_every=settings.balance_every,
    )  # fmt: skip
    state.step.add_(1)


def search_step(state: SearchState, architecture: Architecture, *, validate: bool = True) -> None:
    """One step of a search."""
    observe_and_draw(state, *train_and_validate(state, architecture, validate=validate))


class Graph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Enqueues it."""


class GraphBackend(Protocol):
    """Where graphs come from."""

    def capture(self, warm_up: Callable[[], None], step: Callable[[], None]) -> Graph:
        """Runs `warm_up`, records `step` without running it. Raises GraphMemoryError where memory does not suffice."""


class GraphMemoryError(Exception):
    """The device has too little memory for a graph; says what was needed."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What some steps did, in order.

    Attributes:
        losses: float64, not finite where the update was skipped.
        accuracies: float64, on each validation batch; NaN: there was none.
        supernets: int64, trained.
    """

    losses: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    supernets: NDArray[np.int64]


class Engine:
    """Runs the steps of one search.

    Args:
        state: of the search, at any step.
        architectures: of the space, by index.
        graphs: records and replays the steps; None: they run eagerly.
    Raises:
        InputError: an architecture that is not in the space of the supernets.
    """

    def __init__(self, state: SearchState, architectures: Sequence[Architecture], graphs: GraphBackend | None) -> None:
        for architecture in architectures:
            state.nets.space.check(architecture)
        self.state = state
        self._architectures, self._backend = architectures, graphs
        self._drawn = state.mixture.architectures.tolist()
        self._graphs: dict[tuple[int, bool], Graph] = {}  # by architecture and `validate`, all kept to the end
        self._scratch: SearchState | None = None

    @property
    def uses_graphs(self) -> bool:
        return self._backend is not None

    def run(self, start: int, stop: int, refresh: Callable[[], None] | None = None) -> Steps:
        """Runs steps start to stop - 1 and waits for them.

        Args:
            start: steps done so far.
            refresh: called inside the last step, between validation and balance, with the state as it is there.
        Raises:
            RunStopped: a balance failed.
        """
        state = self.state
        for step in range(start, stop):
            state.train.prepare(step)
            validate = state.settings.validates(step)
            if validate:
                state.validation.prepare(step)
            index = self._drawn[step]
            if refresh is not None and step == stop - 1:
                measured = train_and_validate(state, self._architectures[index], validate=validate)
                refresh()
                observe_and_draw(state, *measured)
            else:
                self._step(index, validate)
        return self._look(start, stop)

    def _step(self, index: int, validate: bool) -> None:
        if self._backend is not None and (index, validate) not in self._graphs:
            self._capture(index, validate)
        if self._backend is None:
            search_step(self.state, self._architectures[index], validate=validate)
        else:
            self._graphs[index, validate].replay()

    def _capture(self, index: int, validate: bool) -> None:
        """Records a graph of an architecture, or gives graphs up for the rest of the run."""
        assert self._backend is not None
        architecture = self._architectures[index]
        try:
            if self._scratch is None:
                self._scratch = self.state.scratch()
            step = partial(search_step, architecture=architecture, validate=validate)
            warm_up = partial(_warm_up, self._scratch, step)
            self._graphs[index, validate] = self._backend.capture(warm_up, partial(step, self.state))
        except (GraphMemoryError, torch.OutOfMemoryError) as error:
            _log.warning("no memory for CUDA graphs, going on eagerly: %s", str(error).splitlines()[0])
            self.state.step.item()  # waits: no graph may go while it runs
            self._graphs.clear()
            self._backend = self._scratch = None

    def _look(self, start: int, stop: int) -> Steps:
        """The only place where the host waits for the device."""
        state = self.state
        losses, correct, supernets = (
            history[start:stop].cpu().numpy() for history in (state.losses, state.correct, state.supernets)
        )
        failed = failure(state.mixture.outcome.cpu(), state.settings.tol)
        if failed is not None:
            step, error = failed
            pair = f"architecture {self._architectures[self._drawn[step]]}, supernet {supernets[step - start]}"
            raise RunStopped(f"step {step}, {pair}: {error}") from error
        accuracies = np.where(correct < 0, np.nan, correct / state.validation.batch_size)
        return Steps(losses.astype(np.float64), accuracies, supernets)


def _warm_up(scratch: SearchState, step: Callable[[SearchState], None]) -> None:
    scratch.step.zero_()
    scratch.mixture.supernet.zero_()
    step(scratch)


def choose_engine(engine: str, device: torch.device) -> str:
    """ "eager" or "graphs" for `--engine`; "auto" is graphs where they can run.

    Raises:
        InputError: graphs are asked for without CUDA, or without Triton, whose kernels keep the host out of a step.
    """
    if device.type != "cuda":
        missing = f"needs a CUDA GPU, the device is {device}"
    elif resolve("mixture_step", device=device) != "triton":
        missing = "needs Triton's kernels, which do not run here (bmsn.backend_report() says why)"
    else:
        return "graphs" if engine == "auto" else engine
    if engine == "graphs":
        raise InputError(f"engine graphs {missing}; accepted here: eager, auto")
    if engine == "auto" and device.type == "cuda":
        _log.warning("steps run eagerly, and slower than as CUDA graphs: engine graphs %s", missing)
    return "eager"


def graph_backend(engine: str, device: torch.device) -> GraphBackend | None:
    """What records the steps of `choose_engine`'s answer; None: nothing does."""
    if engine != "graphs":
        return None
    from bmsn.cuda_graphs import CudaGraphs

    return CudaGraphs(device)


def tensors_of(state: SearchState) -> dict[str, Tensor]:
    """Every tensor that steps change, by name: for checkpoints and comparisons."""
    written = ("scores", "potentials", "visits", "last_visit", "outcome", "supernet")
    own = {field.name: getattr(state, field.name) for field in fields(state)}
    found = {name: value for name, value in own.items() if isinstance(value, Tensor) and name != "lrs"}
    return found | {"arena": state.nets.arena.detach()} | {name: getattr(state.mixture, name) for name in written}
