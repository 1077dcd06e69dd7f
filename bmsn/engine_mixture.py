"""The balanced mixture on the engine: builds its state on the device, and keeps the host's mixture in step with it.

The host's `BalancedMixture` is what metrics, snapshots, scoring and checkpoints read; it is brought up to date after
each run of steps, and written to the device where something else than a step has changed it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bmsn.engine import Engine, SearchState, Steps, StepSettings, choose_engine, graph_backend
from bmsn.methods.problem import Problem
from bmsn.mixture import BalancedMixture
from bmsn.network import SupernetMixture
from bmsn.ops.mixture_step import MixtureTensors
from bmsn.trainer import working_copies

_log = logging.getLogger("bmsn.search")

LARGEST_SHARE = 0.5  # of a GPU's free memory that images may take; the rest is for training


class MixtureEngine:
    """Trains a mixture of supernets.

    Args:
        problem: images, schedule, device.
        nets, velocity: the supernets and their momentum, trained in place.
        mixture: a[c,m], potentials and visits, at any step.
        drawn: (T + 1,) int64, the architecture of each step.
        uniforms: (T + 1,) float64 in [0, 1), that each step's supernet is drawn with.
        temperature: 1/tau before each step, 0 to T.
    Raises:
        InputError: CUDA graphs without CUDA, or draws out of range.
    """

    def __init__(
        self,
        problem: Problem,
        nets: SupernetMixture,
        velocity: Tensor,
        mixture: BalancedMixture,
        drawn: np.ndarray,
        uniforms: np.ndarray,
        temperature: Callable[[int], float],
        *,
        balance_every: int,
    ) -> None:
        config, self._mixture = problem.config, mixture
        tensors = MixtureTensors.create(
            len(problem.space), mixture.num_supernets, drawn,
            np.array([temperature(step) for step in range(len(drawn))]), uniforms, problem.device,
            mixture.weights,
        )  # fmt: skip
        settings = StepSettings(
            momentum=config.momentum, weight_decay=config.weight_decay, ema_decay=config.procedure.ema_decay,
            tol=config.procedure.tol, balance_every=balance_every, validates=problem.validates,
        )  # fmt: skip
        state = SearchState.create(
            nets, velocity, working_copies(nets, problem.dtype), problem.train, problem.validation, tensors,
            [problem.learning_rate(step) for step in range(problem.num_steps)], settings,
        )  # fmt: skip
        engine = choose_engine(config.engine, problem.device)
        self._engine = Engine(state, list(problem.space), graph_backend(engine, problem.device))

    def load(self, supernet: int) -> None:
        """Brings weights and mixture, which something else than a step has changed, and the next supernet in."""
        state, host = self._engine.state, self._mixture.state_dict()
        if state.copies is not None:
            state.copies.copy_(state.nets.arena.detach())
        self._write(host)
        state.mixture.supernet.fill_(supernet)
        state.step.fill_(host["steps"])

    def _write(self, host: dict[str, np.ndarray]) -> None:
        mixture = self._engine.state.mixture
        mixture.scores.copy_(torch.from_numpy(host["scores"].T))
        for name in ("potentials", "visits", "last_visit"):
            getattr(mixture, name).copy_(torch.from_numpy(host[name]))

    def _read(self, steps: int) -> None:
        mixture = self._engine.state.mixture
        names = ("potentials", "visits", "last_visit")
        host = {name: getattr(mixture, name).cpu().numpy() for name in names}
        self._mixture.load_state_dict(host | {"scores": mixture.scores.T.cpu().numpy(), "steps": steps})

    def run(self, start: int, stop: int, refresh: Callable[[], None] | None = None) -> tuple[Steps, int]:
        """Runs steps start to stop - 1; returns what they did and the supernet that comes next.

        Args:
            start: steps done so far.
            refresh: changes the host's mixture inside the last step, before its accuracies are averaged in.
        Raises:
            RunStopped: a balance failed.
        """

        def refresh_both() -> None:
            self._read(stop - 1)
            assert refresh is not None
            refresh()
            self._write(self._mixture.state_dict())

        done = self._engine.run(start, stop, None if refresh is None else refresh_both)
        self._read(stop)
        return done, int(self._engine.state.mixture.supernet)


def runs_ahead(device: torch.device) -> bool:
    """Whether many steps are enqueued before the host looks at one; on a CPU nothing is gained by it."""
    return device.type != "cpu"


def image_device(num_bytes: int, device: torch.device) -> torch.device:
    """Where images should lie whose batches are trained on `device`: there, unless they take too much of its memory."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes <= LARGEST_SHARE * free:
        return device
    _log.warning(
        "the images take %.1f GiB and the GPU has %.1f GiB free: batches are made on the host, steps run eagerly",
        num_bytes / 2**30,
        free / 2**30,
    )
    return torch.device("cpu")
