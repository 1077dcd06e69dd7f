"""alpha[l, r]: how much of each resolution a multi-resolution layer takes, and how that is learnt.

`Softmax` is DARTS' (Adam on logits), `Simplex` GAEA's (exponentiated gradient on the shares themselves). Both are
updated from a loss on validation images, first order: the weights of the network stand still.

Source: Javan et al. 2023, eq. 4 and 5; Liu et al. 2019 (DARTS); Li et al. 2021 (GAEA).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmsn.paths import ResolutionPath


class Mixing(ABC):
    """Shares s[l, r] of R resolutions in each of L layers, equal at first: the softmax of `logits` over r.

    Attributes:
        logits: (L, R) float64, on the device of the training.

    Args:
        num_layers: L; layer 0 has a row as well, which no network looks at.
        num_resolutions: R.
        lr: of the update.
        device: where.
    """

    def __init__(self, num_layers: int, num_resolutions: int, *, lr: float, device: torch.device) -> None:
        self.lr = lr
        self.logits = torch.zeros(num_layers, num_resolutions, dtype=torch.float64, device=device)

    @property
    def shares(self) -> Tensor:
        """(L, R) float64, rows sum to 1."""
        return self.logits.detach().softmax(1)

    @property
    def path(self) -> ResolutionPath:
        """The resolution of the largest share in each layer, of equal ones the highest; layer 0 keeps the full one."""
        return ResolutionPath((0, *self.logits[1:].argmax(1).tolist()))

    def mean_share(self, path: ResolutionPath) -> float:
        """Geometric mean over the layers from 1 on of s[l, path[l]]: as the path's likelihood if layers are drawn one
        by one.
        """
        logs = self.logits.detach().log_softmax(1).cpu()[range(1, len(path.resolutions)), path.resolutions[1:]]
        return math.exp(float(logs.mean()))

    @abstractmethod
    def descend(self, loss_of: Callable[[Tensor], Tensor]) -> float:
        """One update from the gradient of `loss_of` (shares to a scalar); returns the loss, NaN where none was made."""

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self.logits.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])


class Softmax(Mixing):
    """DARTS: Adam on the logits, with torch's usual decay rates and no weight decay."""

    def __init__(self, num_layers: int, num_resolutions: int, *, lr: float, device: torch.device) -> None:
        super().__init__(num_layers, num_resolutions, lr=lr, device=device)
        self.logits.requires_grad_()
        self._adam = torch.optim.Adam([self.logits], lr=lr)

    def descend(self, loss_of: Callable[[Tensor], Tensor]) -> float:
        loss = loss_of(self.logits.softmax(1))
        (gradient,) = torch.autograd.grad(loss, self.logits)
        if not _finite(loss, gradient):
            return math.nan
        self.logits.grad = gradient
        self._adam.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._adam.load_state_dict(state["adam"])


class Simplex(Mixing):
    """GAEA: s <- s exp(-lr gradient), renormalised; kept as logarithms, so that no share is ever lost to rounding."""

    def descend(self, loss_of: Callable[[Tensor], Tensor]) -> float:
        shares = self.shares.requires_grad_()
        loss = loss_of(shares)
        (gradient,) = torch.autograd.grad(loss, shares)
        if not _finite(loss, gradient):
            return math.nan
        self.logits = (self.logits - self.lr * gradient).log_softmax(1)
        return loss.item()


def _finite(loss: Tensor, gradient: Tensor) -> bool:
    return math.isfinite(loss.item()) and bool(gradient.isfinite().all())
