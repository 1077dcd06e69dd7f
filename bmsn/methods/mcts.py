"""Monte-Carlo tree search over the poolings: one supernet, a binary tree over its layers, descended by UCB.

Source: Javan et al. 2023, section 3, eq. 6; Auer et al. 2002 (UCB1) for the constant, which is not given there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bmsn.errors import InputError
from bmsn.methods.base import Ranking, Sampler
from bmsn.methods.draws import draw_uniform
from bmsn.methods.problem import Problem
from bmsn.methods.supernet import SupernetMethod
from bmsn.rng import generator
from bmsn.space import Architecture, SearchSpace


class MctsSampler(Sampler):
    """At each layer the child (keep, or pool before the layer) with the largest  a/n + c sqrt(ln n_parent / n).

    a is the sum of the rewards below a node, n their number; the reward is the validation accuracy on a minibatch,
    added to all nodes from the leaf up to the root. A child without a visit comes first; equal ones are drawn. Only
    children with a valid architecture below them exist. The warm-up draws leaves uniformly; its rewards are kept.

    Attributes:
        visits: n of each node, (num_nodes,) int64; rewards: a of each, (num_nodes,) float64. Nodes are the states of
            `SearchSpace.prefix_tree`, layer after layer; the first is the root, the last C are the architectures.

    Args:
        space: the architectures.
        num_steps: of the search.
        seed: of the draws.
        constant: c.
        warm_up: share of the steps that are drawn uniformly, at the start.
        in_blocks: draw those in shuffled blocks of each once instead of independently.
    """

    def __init__(
        self, space: SearchSpace, num_steps: int, seed: int, *, constant: float, warm_up: float, in_blocks: bool
    ) -> None:
        self._space, self._seed, self._constant = space, seed, constant
        waves = space.prefix_tree()
        self._sizes = [len(wave) for wave in waves]
        starts = np.concatenate([[0], np.cumsum(self._sizes)]).tolist()
        self._first_leaf = starts[-2]
        self._pools = [state.pools for wave in waves for state in wave]
        self._parent = [-1] * starts[-1]
        self._children: list[list[int]] = [[] for _ in self._parent]  # keep before pool
        for layer, wave in enumerate(waves[1:], start=1):
            for place, state in enumerate(wave):
                node, parent = starts[layer] + place, starts[layer - 1] + state.parent
                self._parent[node] = parent
                self._children[parent].append(node)
        self.visits = np.zeros(len(self._parent), np.int64)
        self.rewards = np.zeros(len(self._parent))
        self.num_warm_up = round(warm_up * num_steps)
        self._drawn = draw_uniform(len(space), self.num_warm_up, seed, in_blocks=in_blocks)

    def propose(self, step: int) -> tuple[int, int]:
        if step < self.num_warm_up:
            return int(self._drawn[step]), 0
        uniforms = generator(self._seed, "mcts", step).random(self._space.num_layers)
        node = 0
        for uniform in uniforms:
            children = self._children[node]
            if not children:
                break
            values = [self._upper_bound(child) for child in children]
            best = [child for child, value in zip(children, values, strict=True) if value == max(values)]
            node = best[int(uniform * len(best))]
        return node - self._first_leaf, 0

    def _upper_bound(self, node: int) -> float:
        """Eq. 6; infinite without a visit."""
        n = int(self.visits[node])
        if n == 0:
            return math.inf
        parent = int(self.visits[self._parent[node]])
        return float(self.rewards[node]) / n + self._constant * math.sqrt(math.log(parent) / n)

    def observe(self, step: int, architecture: int, supernet: int, accuracy: float | None) -> None:
        if accuracy is None:
            return
        if not math.isfinite(accuracy):
            raise InputError(f"accuracy of architecture {architecture} must be finite; got {accuracy}")
        node = self._first_leaf + architecture
        while node >= 0:
            self.visits[node] += 1
            self.rewards[node] += accuracy
            node = self._parent[node]

    def pairs(self) -> list[tuple[int, int]]:
        return [(c, 0) for c in range(len(self._space))]

    def rank(self) -> Ranking:
        """Depth first, at each node the child with more visits before the other (of equal ones the larger mean reward).

        So the best is the path of the most visited children. The estimate is the mean reward of the leaf.
        """
        order, waiting = [], [0]
        while waiting:
            node = waiting.pop()
            if node >= self._first_leaf:
                order.append(node - self._first_leaf)
            # the last is taken first: of equal ones "keep"
            waiting += sorted(self._children[node][::-1], key=lambda child: (self.visits[child], self._mean(child)))
        leaves = range(self._first_leaf, len(self._parent))
        estimate = np.array([self._mean(leaf) if self.visits[leaf] else math.nan for leaf in leaves])
        return Ranking(np.array(order, np.int64), estimate, np.zeros(len(order), np.int64))

    def _mean(self, node: int) -> float:
        return float(self.rewards[node]) / max(1, int(self.visits[node]))

    def metrics(self, step: int) -> dict[str, Any]:
        pick = self._pick()
        visits = int(self.visits[self._first_leaf + pick.index])
        return {"pick": pick.slug, "pick_share": visits / max(1, int(self.visits[0])), "mean_reward": self._mean(0)}

    def snapshot(self, step: int) -> dict[str, Any]:
        """Visits and mean rewards (None: no visit) of the tree's nodes, one list a layer, as `prefix_tree` has them."""
        means = np.where(self.visits > 0, self.rewards / np.maximum(1, self.visits), np.nan)
        bounds = np.cumsum(self._sizes)[:-1]
        return {
            "kind": "tree",
            "visits": [part.tolist() for part in np.split(self.visits, bounds)],
            "reward": [part.tolist() for part in np.split(means, bounds)],
        }

    def findings(self) -> dict[str, Any]:
        """The path of the most visited children: at each layer the visits of "keep" and "pool"; null: no such child."""
        positions = self._pick().pool_positions
        path, node = [], 0
        for layer in range(1, self._space.num_layers):
            children = {"pool" if self._pools[child] else "keep": child for child in self._children[node]}
            counts = {name: int(self.visits[children[name]]) if name in children else None for name in ("keep", "pool")}
            path.append({"layer": layer, **counts})
            node = children["pool" if layer in positions else "keep"]
        return {"path": path}

    def _pick(self) -> Architecture:
        pick: Architecture = self._space[int(self.rank().order[0])]
        return pick

    def state_dict(self) -> dict[str, Any]:
        return {"visits": self.visits.copy(), "rewards": self.rewards.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.visits[...], self.rewards[...] = state["visits"], state["rewards"]


class Mcts(SupernetMethod):
    """`--method mcts`: picks the path of the most visited children; the accuracy of the final scoring stands beside it.

    `--ucb-constant` is c; with `--warm-up` the first steps are uniform.
    """

    name: ClassVar[str] = "mcts"
    by_accuracy: ClassVar[bool] = False
    ranked_by: ClassVar[str] = "visits in the tree, from its root down"
    estimate: ClassVar[str] = "reward"
    settings: ClassVar[frozenset[str]] = frozenset(
        {"score_every", "evaluate_top", "norm", "warm_up", "ucb_constant", "max_macs"}
    )

    @classmethod
    def make_sampler(cls, problem: Problem) -> MctsSampler:
        config = problem.config
        return MctsSampler(
            problem.space, problem.num_steps, config.seed, constant=config.ucb_constant,
            warm_up=config.warm_up, in_blocks=config.procedure.visits == "blocks",
        )  # fmt: skip
