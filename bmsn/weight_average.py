"""The mean of the supernets' weights over the last steps of a search, which may be scored instead of the last ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from bmsn.network import SupernetMixture

# Weights that the mean is over, at most: a step changes one supernet by a little, so neighbours add next to nothing,
# while a look after every step would keep the host from running ahead of a GPU.
NUM_AVERAGED = 100


class WeightAverage:
    """Running mean, each with equal weight, of all supernets' rows after every k-th step of the last share of a search.

    k = max(1, steps in that share // 100), counted back from the last step, which is always one of them. BatchNorm has
    batch statistics in scoring too, so there are none to measure again.

    Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".

    Args:
        nets: the supernets that train; not changed.
        num_steps: of the search.
        share: of the steps, the last ones, in (0, 1].

    Attributes:
        nets: supernets of their own, whose arena is the mean: one arena more in memory.
        count: weights it is over so far; 0: the share has not begun, and `nets` are those of the start.
        every: k.
    """

    def __init__(self, nets: SupernetMixture, num_steps: int, share: float) -> None:
        window = max(1, round(share * num_steps))
        self.nets, self.count = copy.deepcopy(nets), 0
        self.every = max(1, window // NUM_AVERAGED)
        self._last, self._before = num_steps, num_steps - window

    def next_after(self, step: int) -> int:
        """The number of steps done, larger than `step`, at which the next weights are taken in."""
        first = self._before + 1 + (self._last - self._before - 1) % self.every
        return first if step < first else step + self.every - (step - first) % self.every

    @torch.no_grad()
    def update(self, step: int, nets: SupernetMixture) -> None:
        """Takes the weights after `step` steps in, where it is their turn."""
        if self.next_after(step - 1) == step:
            self.count += 1
            self.nets.arena.lerp_(nets.arena, 1 / self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"arena": self.nets.arena.detach().cpu().clone(), "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.nets.arena.copy_(state["arena"])
        self.count = state["count"]
