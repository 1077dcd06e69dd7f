"""One step of the mixture where the networks are trained: moving average, balance, draw of the next supernet.

    a[c,m] <- beta a[c,m] + (1 - beta) correct / num_images  where `trained`;  c = architectures[step], m = supernet
    g <- balanced potentials, every `balance_every` steps;  supernet <- the first m with
    uniforms[step+1] < sum over n <= m of p(n|architectures[step+1])

Nothing is returned and nothing waits: what fails is written to `outcome`, stays there, and stops all later steps.
On the CPU this is the step of `BalancedMixture` (csrc/balance.h or `ReferenceStep`), on a GPU one Triton program.

Source: Javan et al. 2023, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bmsn.backend import extension, resolve
from bmsn.errors import InputError
from bmsn.ops.balance import MAX_ITERATIONS, SOLVED, Outcome, balance_reference, check_tol, mean_one, softmax_rows

MAX_SUPERNETS = 64  # on a GPU; as in bmsn.kernels.balance
BAD_ACCURACY, UNSOLVED, BAD_ARGUMENT = -1, -2, -3  # what a host step returns instead of a supernet; csrc/balance.h

torch.library.define(
    "bmsn::mixture_step",
    "(Tensor(a!) scores, Tensor(b!) potentials, Tensor(c!) visits, Tensor(d!) last_visit, Tensor(e!) outcome, "
    "Tensor(f!) supernet, Tensor weights, Tensor step, Tensor architectures, Tensor inverse_temperatures, "
    "Tensor uniforms, Tensor correct, Tensor trained, int num_images, float ema_decay, float tol, int balance_every, "
    "int max_iterations, str backend) -> ()",
)


@dataclass(frozen=True, kw_only=True)
class MixtureTensors:
    """A mixture's state and the draws made ahead for all T steps, on one device.

    Attributes:
        scores: (M, C) float64, a[c,m] at [m, c].
        potentials: (M,) float64.
        visits, last_visit: (C, M) int64.
        outcome: (7,) float64: the fields of `Outcome` after the latest balance, and its step.
        supernet: () int64, of the step that comes.
        weights: (C,) float64 of mean 1, how often each architecture is drawn.
        architectures: (T + 1,) int64, of each step.
        inverse_temperatures: (T + 1,) float64, 1/tau before each step.
        uniforms: (T + 1,) float64 in [0, 1), that each step's supernet is drawn with.
    """

    scores: Tensor
    potentials: Tensor
    visits: Tensor
    last_visit: Tensor
    outcome: Tensor
    supernet: Tensor
    weights: Tensor
    architectures: Tensor
    inverse_temperatures: Tensor
    uniforms: Tensor

    @classmethod
    def create(
        cls,
        num_architectures: int,
        num_supernets: int,
        architectures: NDArray[np.int64],
        inverse_temperatures: NDArray[np.float64],
        uniforms: NDArray[np.float64],
        device: torch.device | str = "cpu",
        weights: ArrayLike | None = None,
    ) -> MixtureTensors:
        """Zeros for the state, the draws as given, checked once for all steps; `weights` as those of `BalancedMixture`.

        Raises:
            InputError: a draw or weight out of range, or more supernets than a device program takes.
        """
        device = torch.device(device)
        if device.type == "cuda" and num_supernets > MAX_SUPERNETS:
            raise InputError(f"num_supernets must be at most {MAX_SUPERNETS} on a GPU; got {num_supernets}")
        drawn: dict[str, tuple[NDArray[Any], bool, str]] = {
            "architectures": (
                architectures,
                bool(((architectures >= 0) & (architectures < num_architectures)).all()),
                f"0 to {num_architectures - 1}",
            ),
            "inverse_temperatures": (
                inverse_temperatures,
                bool((inverse_temperatures > 0).all() and np.isfinite(inverse_temperatures).all()),
                "positive and finite",
            ),
            "uniforms": (uniforms, bool(((uniforms >= 0) & (uniforms < 1)).all()), "0 to below 1"),
        }
        for name, (array, holds, bound) in drawn.items():
            if array.shape != architectures.shape or array.ndim != 1 or len(array) < 2:
                raise InputError(f"{name} must be (T + 1,) with T >= 1, as architectures; got {array.shape}")
            if not holds:
                raise InputError(f"{name} is {array.min()} to {array.max()}; accepted: {bound}")
        shape = (num_architectures, num_supernets)
        return cls(
            scores=torch.zeros(shape[::-1], dtype=torch.float64, device=device),
            potentials=torch.zeros(num_supernets, dtype=torch.float64, device=device),
            visits=torch.zeros(shape, dtype=torch.int64, device=device),
            last_visit=torch.full(shape, -1, dtype=torch.int64, device=device),
            outcome=torch.zeros(7, dtype=torch.float64, device=device),
            supernet=torch.zeros((), dtype=torch.int64, device=device),
            weights=torch.from_numpy(mean_one(weights, num_architectures)).to(device),
            architectures=torch.from_numpy(architectures).to(device),
            inverse_temperatures=torch.from_numpy(inverse_temperatures).to(device),
            uniforms=torch.from_numpy(uniforms).to(device),
        )


def failure(outcome: Tensor, tol: float) -> tuple[int, Exception] | None:
    """The step at which a balance failed and why, from `outcome` on the host; None: none has."""
    status, kl, iterations, spread, row, col, step = outcome.tolist()
    if status == SOLVED:
        return None
    return int(step), Outcome(int(status), kl, int(iterations), spread, int(row), int(col)).error(tol)


def mixture_step(
    state: MixtureTensors,
    step: Tensor,
    correct: Tensor,
    trained: Tensor,
    *,
    num_images: int,
    ema_decay: float,
    tol: float,
    balance_every: int,
    max_iterations: int = MAX_ITERATIONS,
    backend: str = "auto",
) -> None:
    """One step on `state`, in place.

    Args:
        state: of the mixture, on the device.
        step: () int64, 0 to T - 1: the step that was trained.
        correct: () int64, validation images that the pair classified correctly.
        trained: () bool; False: the step was skipped, or had no validation batch: it counts, but updates nothing.
        num_images: of the validation batch.
        ema_decay: beta.
        tol: KL(p(m) || uniform) that a balance reaches.
        balance_every: steps from one balance to the next.
        max_iterations: evaluations of the table in one balance.
        backend: auto, reference, cpp or triton.
    Raises:
        InputError: a tensor of another dtype, shape or device, or a setting out of range.
    """
    device = state.scores.device
    given = (("step", step, torch.int64), ("correct", correct, torch.int64), ("trained", trained, torch.bool))
    for name, tensor, dtype in given:
        if tensor.shape != () or tensor.dtype != dtype or tensor.device != device:
            raise InputError(f"{name} must be () {dtype} on {device}; got {tensor.dtype} {tuple(tensor.shape)}")
    if num_images < 1 or balance_every < 1 or max_iterations < 1 or not 0 <= ema_decay < 1:
        raise InputError(
            "num_images, balance_every and max_iterations must be at least 1, ema_decay in [0, 1); "
            f"got {num_images}, {balance_every}, {max_iterations}, {ema_decay}"
        )
    check_tol(tol)
    torch.ops.bmsn.mixture_step(
        state.scores, state.potentials, state.visits, state.last_visit, state.outcome, state.supernet,
        state.weights, step, state.architectures, state.inverse_temperatures, state.uniforms, correct, trained,
        num_images, ema_decay, tol, balance_every, max_iterations, resolve("mixture_step", backend, device=device),
    )  # fmt: skip


@torch.library.impl("bmsn::mixture_step", "CompositeExplicitAutograd")
def _mixture_step_impl(
    scores: Tensor,
    potentials: Tensor,
    visits: Tensor,
    last_visit: Tensor,
    outcome: Tensor,
    supernet: Tensor,
    weights: Tensor,
    step: Tensor,
    architectures: Tensor,
    inverse_temperatures: Tensor,
    uniforms: Tensor,
    correct: Tensor,
    trained: Tensor,
    num_images: int,
    ema_decay: float,
    tol: float,
    balance_every: int,
    max_iterations: int,
    backend: str,
) -> None:
    if backend == "triton":
        from bmsn.kernels.balance import launch_mixture_step

        launch_mixture_step(
            scores, potentials, visits, last_visit, outcome, supernet, weights, step, architectures,
            inverse_temperatures, uniforms, correct, trained, num_images, ema_decay, tol, balance_every, max_iterations,
        )  # fmt: skip
        return
    written = (scores, potentials, visits, last_visit, outcome, supernet)
    if scores.is_cuda:  # the reference on a GPU: through the host, which waits
        host = tuple(tensor.cpu() for tensor in written)
        read = (weights, step, architectures, inverse_temperatures, uniforms, correct, trained)
        settings = num_images, ema_decay, tol, balance_every, max_iterations
        torch.ops.bmsn.mixture_step(*host, *(tensor.cpu() for tensor in read), *settings, backend)
        for tensor, changed in zip(written, host, strict=True):
            tensor.copy_(changed)
        return
    if outcome[0] != SOLVED:
        return
    arrays = (tensor.numpy() for tensor in written[:4])
    mixture = host_step(backend, ema_decay, tol, balance_every, max_iterations, weights.numpy(), *arrays)
    now = mixture.steps = int(step)
    inverse, following, uniform = (
        tensor[now + 1].item() for tensor in (inverse_temperatures, architectures, uniforms)
    )  # fmt: skip
    if trained:
        drawn = mixture.observe_and_draw(
            int(architectures[now]), int(supernet), int(correct) / num_images, inverse, following, uniform
        )
    else:
        drawn = mixture.skip_and_draw(inverse, following, uniform)
    if (now + 1) % balance_every == 0:
        outcome.copy_(torch.tensor([*mixture.last, now], dtype=torch.float64))
    if drawn >= 0:
        supernet.fill_(drawn)


@torch.library.register_fake("bmsn::mixture_step")
def _mixture_step_fake(*arguments: object) -> None:
    return None


def host_step(
    backend: str,
    ema_decay: float,
    tol: float,
    balance_every: int,
    max_iterations: int,
    weights: NDArray[np.float64],
    scores: NDArray[np.float64],
    potentials: NDArray[np.float64],
    visits: NDArray[np.int64],
    last_visit: NDArray[np.int64],
) -> Any:
    """The step on numpy arrays, which it changes in place: csrc/balance.h's MixtureStep, or `ReferenceStep`."""
    module = extension() if resolve("balance", backend) == "cpp" else None
    step_type = ReferenceStep if module is None else module.MixtureStep
    return step_type(ema_decay, tol, balance_every, max_iterations, weights, scores, potentials, visits, last_visit)


class ReferenceStep:
    """What csrc/balance.h's MixtureStep does, in numpy."""

    def __init__(
        self,
        ema_decay: float,
        tol: float,
        balance_every: int,
        max_iterations: int,
        weights: NDArray[np.float64],
        scores: NDArray[np.float64],
        potentials: NDArray[np.float64],
        visits: NDArray[np.int64],
        last_visit: NDArray[np.int64],
    ) -> None:
        self.ema_decay, self.tol, self.balance_every, self.max_iterations = (
            ema_decay,
            tol,
            balance_every,
            max_iterations,
        )
        self.weights = weights
        self.scores, self.potentials, self.visits, self.last_visit = scores.T, potentials, visits, last_visit
        self.steps = 0
        self.last: tuple[Any, ...] = ()

    def observe_and_draw(
        self,
        architecture: int,
        supernet: int,
        accuracy: float,
        inverse_temperature: float,
        following: int,
        uniform: float,
    ) -> int:
        rows, cols = self.scores.shape
        inside = 0 <= architecture < rows and 0 <= supernet < cols
        if not (inside and self._is_drawable(inverse_temperature, following, uniform)):
            return BAD_ARGUMENT
        if not math.isfinite(accuracy):
            return BAD_ACCURACY
        pair = architecture, supernet
        self.scores[pair] = self.ema_decay * self.scores[pair] + (1 - self.ema_decay) * accuracy
        self.visits[pair] += 1
        self.last_visit[pair] = self.steps
        return self.skip_and_draw(inverse_temperature, following, uniform)

    def skip_and_draw(self, inverse_temperature: float, following: int, uniform: float) -> int:
        if not self._is_drawable(inverse_temperature, following, uniform):
            return BAD_ARGUMENT
        self.steps += 1
        if self.steps % self.balance_every == 0:
            return self.balance_and_draw(inverse_temperature, following, uniform)
        return self._draw(inverse_temperature, following, uniform)

    def balance_and_draw(self, inverse_temperature: float, following: int, uniform: float) -> int:
        if not self._is_drawable(inverse_temperature, following, uniform):
            return BAD_ARGUMENT
        _, potentials, self.last = balance_reference(
            self.scores, inverse_temperature, self.tol, self.max_iterations, self.potentials, self.weights
        )
        if self.last[0] != SOLVED:
            return UNSOLVED
        self.potentials[:] = potentials
        return self._draw(inverse_temperature, following, uniform)

    def _is_drawable(self, inverse_temperature: float, following: int, uniform: float) -> bool:
        return 0 < inverse_temperature < math.inf and 0 <= following < len(self.scores) and 0 <= uniform < 1

    def _draw(self, inverse_temperature: float, following: int, uniform: float) -> int:
        p = softmax_rows(self.scores[following] * inverse_temperature + self.potentials)
        above = np.flatnonzero(np.cumsum(p) > uniform)
        return int(above[0] if len(above) else np.flatnonzero(p)[-1])
