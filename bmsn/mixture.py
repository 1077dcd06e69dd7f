"""The balanced mixture of supernets: which supernet trains which architecture next. No torch, no weights.

A search draws an architecture c, trains it in supernet m ~ p(m|c), and tells the mixture the validation accuracy;
`BalancedMixture` keeps the moving averages a[c,m] and balances softmax(a / temperature) so that all supernets train
equally often (Javan et al. 2023, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmsn.errors import InputError, did_you_mean
from bmsn.ops.balance import MAX_ITERATIONS, Outcome, check_tol, mean_one, solve, solver
from bmsn.ops.mixture_step import BAD_ACCURACY, UNSOLVED, host_step

SCHEDULES = ("inverse", "temperature")


def inverse_temperature(progress: float, schedule: str, num_supernets: int) -> float:
    """1/tau after a share of the search.

    Args:
        progress: 0 at the first step, 1 at the last.
        schedule: "inverse" (the authors' code): 1/tau linear from 1 to 100. "temperature" (the paper): tau linear from
            1 to 1 / (100 M), which stays warm until late and then cools abruptly.
        num_supernets: M; only "temperature" depends on it.
    """
    if schedule not in SCHEDULES:
        hint = did_you_mean(schedule, SCHEDULES)
        raise InputError(f"schedule is {schedule!r}{hint}; accepted: {', '.join(SCHEDULES)}")
    _require(0 <= progress <= 1, "progress", "0 to 1", progress)
    _require(num_supernets >= 1, "num_supernets", ">= 1", num_supernets)
    if schedule == "inverse":
        return 1 + 99 * progress
    return 1 / ((1 - progress) + progress / (100 * num_supernets))


def mean_entropy(assignment: NDArray[np.float64]) -> float:
    """Mean over the rows of p(m|c), (C, M), of their entropy in nats; 0 log 0 = 0."""
    negative = (assignment * np.log(np.where(assignment > 0, assignment, 1.0))).sum(axis=1).mean()
    return 0.0 - float(negative)  # and not -0.0 where there is one supernet


class BalancedMixture:
    """Scores a[c,m], potentials and visits of a search, and the draws made from them.

    Args:
        num_architectures: C, >= 1.
        num_supernets: M, >= 1.
        ema_decay: beta of a <- beta a + (1 - beta) accuracy, 0 to below 1.
        initial_score: a[c,m] before the first visit; 1.0 is optimistic: unvisited pairs are tried.
        tol: KL(p(m) || uniform) that a balance reaches, 1e-14 to 1. At the default p depends on the scores alone, not
            on warm starts; at the paper's 1e-4 probabilities are up to 0.06 off.
        balance_every: steps from one balance to the next; in between, the potentials stand still.
        weights: (C,), positive: how often each architecture is drawn, in any unit, so that supernets train equally
            often; None: equally often.
        backend: "auto", "cpp" or "reference".

    Copies, pickles and `state_dict` round trips continue bit-exactly.
    """

    def __init__(
        self,
        *,
        num_architectures: int,
        num_supernets: int,
        ema_decay: float = 0.9,
        initial_score: float = 1.0,
        tol: float = 1e-12,
        balance_every: int = 1,
        weights: ArrayLike | None = None,
        backend: str = "auto",
    ) -> None:
        _require(num_architectures >= 1, "num_architectures", ">= 1", num_architectures)
        _require(num_supernets >= 1, "num_supernets", ">= 1", num_supernets)
        _require(0 <= ema_decay < 1, "ema_decay", "0 to below 1", ema_decay)
        _require(math.isfinite(initial_score), "initial_score", "finite", initial_score)
        _require(balance_every >= 1, "balance_every", ">= 1", balance_every)
        check_tol(tol)
        self._settings: dict[str, Any] = {
            "num_architectures": num_architectures,
            "num_supernets": num_supernets,
            "ema_decay": ema_decay,
            "initial_score": initial_score,
            "tol": tol,
            "balance_every": balance_every,
            "weights": mean_one(weights, num_architectures),
            "backend": backend,
        }
        shape = (num_architectures, num_supernets)
        self._columns = np.full(shape[::-1], initial_score, dtype=np.float64)  # a[c,m] at [m, c]: SIMD runs along c
        self._potentials = np.zeros(num_supernets)
        self._visits = np.zeros(shape, dtype=np.int64)
        self._last_visit = np.full(shape, -1, dtype=np.int64)
        arrays = self._columns, self._potentials, self._visits, self._last_visit  # worked on in place
        self._step = host_step(backend, ema_decay, tol, balance_every, MAX_ITERATIONS, self.weights, *arrays)

    @property
    def num_architectures(self) -> int:
        return int(self._settings["num_architectures"])

    @property
    def num_supernets(self) -> int:
        return int(self._settings["num_supernets"])

    @property
    def weights(self) -> NDArray[np.float64]:
        """How often each architecture is drawn, (C,), relative to the mean; a read-only view."""
        return _read_only(self._settings["weights"])

    @property
    def scores(self) -> NDArray[np.float64]:
        """a[c,m], (C, M); a read-only view that follows the steps."""
        return _read_only(self._columns.T)

    @property
    def potentials(self) -> NDArray[np.float64]:
        """g[m] of the latest balance, (M,), mean zero; a read-only view."""
        return _read_only(self._potentials)

    @property
    def visits(self) -> NDArray[np.int64]:
        """How often each pair was observed, (C, M); a read-only view."""
        return _read_only(self._visits)

    @property
    def last_visit(self) -> NDArray[np.int64]:
        """The step of each pair's latest observation, (C, M), counted from 0; -1: never. A read-only view."""
        return _read_only(self._last_visit)

    @property
    def steps(self) -> int:
        """Calls of `observe_and_draw` so far."""
        return int(self._step.steps)

    def draw(self, architecture: int, inverse_temperature: float, uniform: float) -> int:
        """Balances and draws the supernet of `architecture`, without a step: for the first step of a search."""
        drawn = self._step.balance_and_draw(inverse_temperature, architecture, uniform)
        if drawn < 0:
            raise self._failure(drawn, 0, 0, 0.0, inverse_temperature, architecture, uniform)
        return drawn

    def observe_and_draw(
        self,
        architecture: int,
        supernet: int,
        accuracy: float | None,
        inverse_temperature: float,
        next_architecture: int,
        uniform: float,
    ) -> int:
        """One step: moves a[c,m] towards `accuracy`, balances where it is due, draws the next step's supernet.

        Args:
            architecture, supernet: the pair (c, m) that was trained.
            accuracy: of that pair on a validation batch; None: the step was skipped; it counts, but updates nothing.
            inverse_temperature: 1/tau, positive.
            next_architecture: the architecture of the next step.
            uniform: in [0, 1); the draw is the inverse of p(.|next_architecture)'s distribution function there.
        Returns:
            The supernet of the next step.
        Raises:
            InputError: a NaN accuracy (names the pair) or an argument out of range; nothing has changed then.
            BalanceError: the balance did not reach its tolerance; potentials are as before.
        """
        if accuracy is None:
            drawn = self._step.skip_and_draw(inverse_temperature, next_architecture, uniform)
        else:
            drawn = self._step.observe_and_draw(
                architecture, supernet, accuracy, inverse_temperature, next_architecture, uniform
            )
        if drawn < 0:
            raise self._failure(
                drawn, architecture, supernet, accuracy, inverse_temperature, next_architecture, uniform
            )
        return drawn

    def refresh(self, table: ArrayLike, mask: ArrayLike | None = None, *, ema: bool = True) -> None:
        """Feeds scores of many pairs at once; visits don't change. Takes effect with the next balance.

        Args:
            table: (C, M) accuracies.
            mask: (C, M) bool, the pairs to update; None means all. The others may be NaN.
            ema: True: a <- beta a + (1 - beta) table, as a visit would; False: a <- table.
        """
        accuracies = np.asarray(table, dtype=np.float64)
        shape = self._visits.shape
        chosen = np.ones(shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        for name, array in (("table", accuracies), ("mask", chosen)):
            _require(array.shape == shape, f"shape of {name}", f"{shape}", array.shape)
        bad = np.argwhere(chosen & ~np.isfinite(accuracies))
        if len(bad):
            row, col = bad[0]
            raise InputError(
                f"table[{row}, {col}] (architecture, supernet) is {accuracies[row, col]}; accepted: finite"
            )
        decay = self._settings["ema_decay"] if ema else 0.0
        scores = self._columns.T
        scores[chosen] = decay * scores[chosen] + (1 - decay) * accuracies[chosen]

    def assignment(self, inverse_temperature: float) -> NDArray[np.float64]:
        """p(m|c), (C, M), balanced to the tolerance at the current scores; the mixture itself doesn't change."""
        bound = 0 < inverse_temperature < math.inf
        _require(bound, "inverse_temperature", "positive and finite", inverse_temperature)
        table = np.ascontiguousarray(self._columns.T)
        tol = self._settings["tol"]
        run = solver(self._settings["backend"])
        return solve(run, table, inverse_temperature, tol, MAX_ITERATIONS, self._potentials, self.weights).probabilities

    def entropy(self, inverse_temperature: float) -> float:
        """Mean over c of the entropy of p(.|c), in nats: log(M) undecided, 0 assigned."""
        return mean_entropy(self.assignment(inverse_temperature))

    def best_supernet(self, inverse_temperature: float) -> NDArray[np.int64]:
        """argmax_m p(m|c) of each architecture, (C,); of equal ones the first."""
        return self.assignment(inverse_temperature).argmax(axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that changes during a search: numpy arrays and one int."""
        arrays = {"scores": self._columns.T, "potentials": self._potentials}
        counters = {"visits": self._visits, "last_visit": self._last_visit}
        return {name: array.copy(order="C") for name, array in {**arrays, **counters}.items()} | {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; InputError where a field is missing, unknown or of another shape."""
        targets = {
            "scores": self._columns.T,
            "potentials": self._potentials,
            "visits": self._visits,
            "last_visit": self._last_visit,
        }
        wrong = sorted({*targets, "steps"} ^ set(state))
        _require(not wrong, "mixture state", "exactly the fields of state_dict()", f"missing or unknown: {wrong}")
        arrays = {name: np.asarray(state[name]) for name in targets}
        for name, target in targets.items():
            found, wanted = (arrays[name].shape, arrays[name].dtype), (target.shape, target.dtype)
            _require(found == wanted, f"mixture state {name!r}", f"{wanted}", found)
        for name, target in targets.items():
            target[...] = arrays[name]
        self._step.steps = int(state["steps"])

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["settings"])  # type: ignore[misc]  # a new step object on new arrays
        self.load_state_dict(state["state"])

    def _failure(
        self,
        code: int,
        architecture: int,
        supernet: int,
        accuracy: float | None,
        inverse_temperature: float,
        next_architecture: int,
        uniform: float,
    ) -> Exception:
        """The exception for a step that returned `code` on these arguments."""
        if code == UNSOLVED:
            return Outcome(*self._step.last).error(self._settings["tol"])
        if code == BAD_ACCURACY:
            return InputError(
                f"accuracy of (architecture {architecture}, supernet {supernet}) is {accuracy}; accepted: finite"
            )
        rows, cols = self._visits.shape
        checks: list[tuple[bool, str, str, object]] = [
            (0 <= architecture < rows, "architecture", f"0 to {rows - 1}", architecture),
            (0 <= supernet < cols, "supernet", f"0 to {cols - 1}", supernet),
            (0 < inverse_temperature < math.inf, "inverse_temperature", "positive and finite", inverse_temperature),
            (0 <= next_architecture < rows, "next_architecture", f"0 to {rows - 1}", next_architecture),
            (0 <= uniform < 1, "uniform", "0 to below 1", uniform),
        ]
        return next(_out_of_range(field, bound, value) for holds, field, bound, value in checks if not holds)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _require(holds: bool, field: str, bound: str, value: object) -> None:
    if not holds:
        raise _out_of_range(field, bound, value)


def _out_of_range(field: str, bound: str, value: object) -> InputError:
    return InputError(f"{field} is {value}; accepted: {bound}")
