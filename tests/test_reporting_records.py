"""What records of other methods than the mixture tell: small ones by hand, a tree against the method's own ranking."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bmsn.methods.mcts import MctsSampler
from bmsn.reporting_records import (
    Course,
    TreeNode,
    accuracy_course,
    busiest,
    climbs,
    probability_course,
    share_course,
    tree_course,
    tree_nodes,
)
from bmsn.space import SearchSpace

SPACE = SearchSpace(4, 2, [4] * 4)  # poolings before (1, 2), (1, 3) or (2, 3)


def tree_record(
    visits: list[list[int]], reward: list[list[float | None]], step: int = 1
) -> dict[str, int | str | list]:
    return {"kind": "tree", "step": step, "visits": visits, "reward": reward}


def test_tree_by_hand() -> None:
    """Of 8 visits 3 went to (1, 2), none to (1, 3), 5 to (2, 3). Layer 2's nodes are (1), (2) and (1, 2)."""
    record = tree_record([[8], [5, 3], [0, 5, 3], [3, 0, 5]], [[0.5], [0.8, 0.1], [None, 0.8, 0.1], [0.1, None, 0.8]])
    rest = dict(left=3 / 8, width=5 / 8, visits=5, reward=0.8, picked=True)
    first = dict(left=0.0, width=3 / 8, visits=3, reward=0.1, picked=False)
    assert tree_nodes(SPACE, record) == [
        TreeNode(layer=0, pools=False, left=0.0, width=1.0, visits=8, reward=0.5, picked=True),
        TreeNode(layer=1, pools=False, **rest),  # type: ignore[arg-type]
        TreeNode(layer=1, pools=True, **first),  # type: ignore[arg-type]
        TreeNode(layer=2, pools=True, **rest),  # type: ignore[arg-type]
        TreeNode(layer=2, pools=True, **first),  # type: ignore[arg-type]
        TreeNode(layer=3, pools=False, **first),  # type: ignore[arg-type]
        TreeNode(layer=3, pools=True, **rest),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(("pooling", "keeping", "picked"), [(0.8, 0.1, True), (0.1, 0.8, False), (0.5, 0.5, False)])
def test_of_equal_visits_the_larger_reward_and_then_keep(pooling: float, keeping: float, picked: bool) -> None:
    record = tree_record(
        [[2], [1, 1], [0, 1, 1], [1, 0, 1]],
        [[0.5], [keeping, pooling], [None, keeping, pooling], [pooling, None, keeping]],
    )
    assert next(node for node in tree_nodes(SPACE, record) if node.layer == 1 and node.pools).picked == picked


def test_tree_without_a_visit_has_no_boxes() -> None:
    none: list[list[float | None]] = [[None], [None] * 2, [None] * 3, [None] * 3]
    assert tree_nodes(SPACE, tree_record([[0], [0] * 2, [0] * 3, [0] * 3], none)) == []


@pytest.mark.parametrize("steps", [1, 40, 700])
@pytest.mark.parametrize("limited", [False, True], ids=["all", "max_macs"])
def test_tree_of_the_method_itself(steps: int, limited: bool) -> None:
    """Boxes fill each layer, lie below their parent's, and the picked path is that of the method's first rank."""
    space = SearchSpace.named("resnet20-cifar10")
    if limited:
        space = space.restricted([a for a in space if a.index % 3])
    rng = np.random.default_rng(steps)
    sampler = MctsSampler(space, steps, 0, constant=0.5, warm_up=0.1, in_blocks=True)
    for step in range(steps):
        index, _ = sampler.propose(step)
        sampler.observe(step, index, 0, float(rng.integers(0, 4)) / 4)  # few values: with ties
    nodes = tree_nodes(space, sampler.snapshot(steps))
    by_layer = [[node for node in nodes if node.layer == layer] for layer in range(space.num_layers)]
    for above, here in pairwise(by_layer):
        assert sum(node.width for node in here) == pytest.approx(1)
        ordered = sorted(here, key=lambda node: node.left)
        ends = np.cumsum([node.width for node in ordered])
        assert [node.left for node in ordered] == pytest.approx([0.0, *ends[:-1]])
        for node in here:
            inside = [
                p for p in above if p.left - 1e-9 <= node.left and node.left + node.width <= p.left + p.width + 1e-9
            ]
            assert len(inside) == 1
            assert not node.picked or inside[0].picked
    best = space[int(sampler.rank().order[0])]
    picked = [node for node in nodes if node.picked]
    assert tuple(node.layer for node in picked if node.pools) == best.pool_positions
    assert len(picked) == space.num_layers


def test_courses_by_hand() -> None:
    tree = tree_course([
        tree_record([[4], [3, 1, 0]], [[0.5], [0.2, 0.4, None]], step=4),
        tree_record([[4], [3, 1, 0]], [[0.5], [0.2, 0.4, None]], step=5),  # the update of step 5 was skipped
        tree_record([[8], [3, 3, 2]], [[0.5], [0.2, 0.5, 0.1]], step=9),
    ])  # fmt: skip
    assert tree.steps.tolist() == [4, 5, 9]
    np.testing.assert_equal(tree.weight, [[0.75, 0.25, 0.0], [np.nan] * 3, [0.0, 0.5, 0.5]])
    np.testing.assert_equal(tree.value[[0, 2]], [[0.2, 0.4, np.nan], [0.2, 0.5, 0.1]])

    drawn = probability_course([{"step": 7, "probability": [0.25, 0.75], "scores": [None, 0.5], "visits": [0, 2]}])
    np.testing.assert_equal([drawn.weight[0], drawn.value[0]], [[0.25, 0.75], [np.nan, 0.5]])

    assert share_course([{"step": 7, "shares": [[0.5, 0.5], [1, 0]]}]).values.tolist() == [[[0.5, 0.5], [1, 0]]]
    seen = accuracy_course([{"step": 7, "visits": [[2, 0]], "accuracy": [[0.0, 0.0]]}])
    np.testing.assert_equal(seen.values, [[[0.0, np.nan]]])  # 0 % is a value, no visit is none


def test_busiest_in_their_order_and_the_others_together() -> None:
    course = Course(
        steps=np.array([1, 2]), weight=np.array([[0.1, 0.5, 0.2, 0.2], [0.1, 0.0, 0.2, 0.7]]),
        value=np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
    )  # fmt: skip
    columns, few = busiest(course, 2)
    assert columns == [1, 3]
    np.testing.assert_allclose(few.weight, [[0.5, 0.2, 0.3], [0.0, 0.7, 0.3]])
    np.testing.assert_equal(few.value, [[2, 4, np.nan], [6, 8, np.nan]])
    assert busiest(course, 4) == ([0, 1, 2, 3], course)


def test_where_a_path_goes_up() -> None:
    assert climbs((0, 0, 1, 2, 2)) == []
    assert climbs((0, 2, 1, 1, 0, 2)) == [2, 4]
