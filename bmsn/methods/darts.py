"""DARTS over resolutions: every layer works at all of them at once, and learns how much of each it takes.

Alternating, first order: SGD on the weights with a training batch, then Adam on alpha with a validation batch. At the
end each layer keeps the resolution of its largest share. That path may go up again and so lie outside the space; it is
what the method found, and `bmsn.retrain` trains it as it is.

Source: Javan et al. 2023, eq. 4 and 5, section 3 and table 2; Liu et al. 2019, "DARTS: Differentiable architecture
search".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.evaluator import Scores
from bmsn.methods.base import Method, Outcome, Ranking
from bmsn.methods.found import in_words, path_findings
from bmsn.methods.mixing import Mixing, Softmax
from bmsn.methods.multires import forward_mixed
from bmsn.methods.problem import Problem
from bmsn.network import SupernetMixture
from bmsn.paths import architecture_path, check_resolutions, mixed_macs, num_resolutions
from bmsn.plan import Pair
from bmsn.rng import torch_seed
from bmsn.trainer import descend


class Darts(Method):
    """`--method darts`: all resolutions of a layer share its weights.

    An architecture is ranked by sum over l >= 1 of log s[l, r_l], the shares along its path: alpha is all that the
    method learns about it, for a network whose layers mix all resolutions says nothing of one whose layers do not. The
    estimate is the geometric mean of those shares.

    Class attributes:
        shares_weights: one set of weights a layer, or one for each resolution.
        same_start: whether those begin alike.
        alpha_lr: learning rate of alpha where the setting is not given.

    Attributes:
        nets: one row, or R (`bmsn.methods.multires`); velocity: of the same shape, their momentum.
        mixing: alpha.
    """

    name: ClassVar[str] = "darts"
    by_accuracy: ClassVar[bool] = False
    ranked_by: ClassVar[str] = "the shares of its resolutions"
    estimate: ClassVar[str] = "mean share"
    settings: ClassVar[frozenset[str]] = frozenset({"alpha_lr", "score_every"})
    shares_weights: ClassVar[bool] = True
    same_start: ClassVar[bool] = True
    alpha_lr: ClassVar[float] = 1e-2
    mixing_kind: ClassVar[type[Mixing]] = Softmax

    def __init__(self, problem: Problem) -> None:
        space, config, data = problem.space, problem.config, problem.data
        check_resolutions(space, f"method {self.name}")
        super().__init__(problem)
        weights = torch.Generator().manual_seed(torch_seed(config.seed, "weights"))
        rows = 1 if self.shares_weights else num_resolutions(space)
        self.nets = SupernetMixture(space, rows, data.num_classes, data.in_channels, generator=weights)
        if self.same_start:
            with torch.no_grad():
                self.nets.arena[1:] = self.nets.arena[0]
        self.nets.pixel_table = problem.table
        self.nets.to(problem.device)
        self.velocity = torch.zeros_like(self.nets.arena.detach())
        lr = self.alpha_lr if config.alpha_lr is None else config.alpha_lr
        self.mixing = self.mixing_kind(space.num_layers, num_resolutions(space), lr=lr, device=problem.device)
        self._macs = mixed_macs(space, num_classes=data.num_classes, in_channels=data.in_channels)

    def step(self, step: int) -> Outcome:
        problem, config, weights = self.problem, self.problem.config, self.nets.arena.detach()
        images, labels = problem.train_batch(step)
        shares = self.mixing.shares
        loss = descend(
            weights, self.velocity,
            lambda rows: F.cross_entropy(forward_mixed(self.nets, rows, images, shares), labels),
            lr=problem.learning_rate(step), momentum=config.momentum, weight_decay=config.weight_decay,
        )  # fmt: skip
        self.cost.train(len(labels), self._macs)
        accuracy = None
        if math.isfinite(loss):
            accuracy = self._learn_alpha(weights, *problem.validation_batch(step))
        return Outcome(loss, accuracy, "the network of all resolutions")

    def _learn_alpha(self, weights: Tensor, images: Tensor, labels: Tensor) -> float | None:
        """One update of alpha; the accuracy of the mixed network on the batch before it, None where none was made."""
        right = torch.zeros((), dtype=torch.double)

        def loss_of(shares: Tensor) -> Tensor:
            logits = forward_mixed(self.nets, weights, images, shares)
            right.copy_((logits.argmax(1) == labels).double().mean())
            return F.cross_entropy(logits, labels)

        loss = self.mixing.descend(loss_of)
        # A gradient of alpha passes back through every map, but needs none of the weights: twice the forward pass.
        self.cost.validate(len(labels), 2 * self._macs)
        return right.item() if math.isfinite(loss) else None

    def rank(self) -> Ranking:
        space = self.problem.space
        estimate = np.array([self.mixing.mean_share(architecture_path(space, a)) for a in space])
        return Ranking(np.argsort(-estimate, kind="stable"), estimate, np.full(len(space), -1))

    def pairs(self) -> list[Pair]:
        return []

    def score(self, pairs: Sequence[Pair], *, watching: bool = False) -> Scores:
        """Nothing: no architecture has a network of its own here."""
        return Scores((), torch.zeros(0, dtype=torch.int64), len(self.problem.validation.indices))

    def metrics(self, step: int) -> dict[str, Any]:
        shares = self.mixing.shares.cpu().numpy()[1:]
        entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(1).mean()
        return {"resolution_path": str(self.mixing.path), "entropy": float(entropy)}

    def snapshot(self, step: int) -> dict[str, Any]:
        return {"kind": "alpha", "shares": self.mixing.shares.cpu().numpy(), "resolution_path": str(self.mixing.path)}

    def findings(self) -> dict[str, Any]:
        return path_findings(self.problem, self.mixing.path) | {"shares": self.mixing.shares.cpu().tolist()}

    def notes(self) -> tuple[str, ...]:
        return (f"Largest share in each layer: {in_words(self.findings())}.",)

    def state_dict(self) -> dict[str, Any]:
        return {
            "arena": self.nets.arena.detach().cpu().clone(), "velocity": self.velocity.cpu().clone(),
            "mixing": self.mixing.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.nets.arena.copy_(state["arena"])
        self.velocity.copy_(state["velocity"])
        self.mixing.load_state_dict(state["mixing"])


class DartsUnsharedSame(Darts):
    """`--method darts-unshared-same`: weights for each (layer, resolution), the same at the start."""

    name: ClassVar[str] = "darts-unshared-same"
    shares_weights: ClassVar[bool] = False


class DartsUnsharedRandom(Darts):
    """`--method darts-unshared-random`: weights for each (layer, resolution), each drawn on its own."""

    name: ClassVar[str] = "darts-unshared-random"
    shares_weights: ClassVar[bool] = False
    same_start: ClassVar[bool] = False
