"""`EvaluationPlan`: how to score (architecture, supernet) pairs, each shared prefix computed once. No torch inside.

Two architectures with the same poolings up to a layer have the same activation there, so the pairs of one supernet form
a prefix tree. The plan walks it layer by layer; the states of a (layer, resolution) form one *wave*, stacked in one
buffer. Where a layer's states do not fit under the memory cap together, it walks subtrees one after the other and
reuses their memory.

All buffers lie in one block of memory with a stack growing from each end: a layer's states are written on the side
opposite to their parents', so parents whose last child has been computed are on top of their stack and give their
memory back at once. Children that pool come first, the one that keeps its resolution last: by then the parent can go,
and a long unpooled chain needs no more than two of its maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from bmsn.errors import InputError
from bmsn.space import LARGE_STEM_STRIDE, Architecture, SearchSpace

Pair = tuple[Architecture, int]
History = tuple[int, ...]


class Slot(NamedTuple):
    """Where a state's map lies: the `place`-th of wave number `wave`."""

    wave: int
    place: int


@dataclass(frozen=True, slots=True)
class PlannedState:
    supernet: int
    pool_positions: History
    parent: Slot | None  # None: the images
    pools: bool  # whether the parent's map is halved on the way in


@dataclass(frozen=True, slots=True)
class Wave:
    """States of one (layer, resolution), computed together: `states[i]` is written to bytes `offset + i * state_bytes`.

    Attributes:
        chunk: how many states are computed at a time, so that their intermediate maps stay small.
        heads: (place in this wave, index of the pair) for each pair that ends here.
    """

    layer: int
    num_pools: int
    states: tuple[PlannedState, ...]
    offset: int
    state_bytes: int
    chunk: int
    heads: tuple[tuple[int, int], ...]


@dataclass
class _Node:
    """A state of the tree while the plan is being made; `slot` is set when its wave has been laid down."""

    supernet: int
    pool_positions: History
    layer: int
    parent: _Node | None
    children: dict[History, _Node] = field(default_factory=dict)
    pairs: list[int] = field(default_factory=list)
    needs: dict[bool, int] = field(default_factory=dict)
    slot: Slot | None = None

    @property
    def num_pools(self) -> int:
        return len(self.pool_positions)

    @property
    def pools(self) -> bool:
        return bool(self.pool_positions) and self.pool_positions[-1] == self.layer


class EvaluationPlan:
    """Waves that score `pairs`, in the order of their execution; `print` it to read them.

    Args:
        space: whose architectures the pairs name.
        pairs: (architecture, supernet index), each at most once.
        batch_size: images in a batch, which is one statistics group of each state.
        image_size: (height, width) of the images.
        itemsize: bytes of one activation.
        max_bytes: bound on the activations alive at one time, intermediate maps of a layer included; None: no bound.
        workspace_maps: how many maps of its own size, at the most, the computation of a state holds beside its result.
        chunk_bytes: intermediate maps of about this size are computed at a time.
    Raises:
        InputError: no pairs, a pair twice, an architecture of another space, or `max_bytes` too small for one state
            (the message says how much is needed).
    """

    def __init__(
        self,
        space: SearchSpace,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        image_size: tuple[int, int],
        itemsize: int,
        max_bytes: int | None = None,
        workspace_maps: int = 4,
        chunk_bytes: int = 32 * 2**20,
    ) -> None:
        self.space, self.num_pairs, self.max_bytes = space, len(pairs), max_bytes
        self.batch_size, self.image_size, self.itemsize = batch_size, image_size, itemsize
        self._workspace_maps, self._chunk_bytes = workspace_maps, chunk_bytes
        self._cap = float("inf") if max_bytes is None else max_bytes
        roots = self._tree(pairs)
        self._waves: list[Wave] = []
        self._tops = [0, 0]  # bytes in use on the two sides
        self._arena_bytes = self._peak = 0
        self._ends: list[tuple[int, int, int]] = []  # of each wave: side, start and end on that side
        needs = [
            self._state_bytes(0, 0) + max(self._workspace(0, 0, 1), self._need(node, alone=True)) for node in roots
        ]
        if max(needs) > self._cap:
            raise InputError(
                f"max_bytes must be at least {max(needs)} for this space, batch size and dtype; got {max_bytes}"
            )
        self._descend(roots, 0, 0)
        self.waves = tuple(
            Wave(w.layer, w.num_pools, w.states, self._offset(i), w.state_bytes, w.chunk, w.heads)
            for i, w in enumerate(self._waves)
        )

    # What a reader asks of a plan. ------------------------------------------------------------------------------------

    @property
    def arena_bytes(self) -> int:
        """Size of the one block that all waves' buffers lie in."""
        return self._arena_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes of activations alive at one time, intermediate maps included."""
        return self._peak

    @cached_property
    def num_states(self) -> int:
        return sum(len(wave.states) for wave in self.waves)

    def __str__(self) -> str:
        lines = [
            f"{self.num_pairs} pairs of {self.space.name}: {self.num_states} states in {len(self.waves)} waves, "
            f"{self.num_pairs * self.space.num_layers} evaluations one by one; batches of {self.batch_size}, "
            f"buffers {self.arena_bytes / 2**20:.1f} MiB, peak {self.peak_bytes / 2**20:.1f} MiB"
        ]
        for number, wave in enumerate(self.waves):
            channels, height, width = self.map_shape(wave.layer, wave.num_pools)
            pooling = sum(state.pools for state in wave.states)
            lines.append(
                f"wave {number}: layer {wave.layer}, {len(wave.states)} states ({pooling} pool) of "
                f"{channels}x{height}x{width}, {wave.chunk} at a time, "
                f"at byte {wave.offset}, {len(wave.heads)} pairs end"
            )
        return "\n".join(lines)

    def map_shape(self, layer: int, num_pools: int) -> tuple[int, int, int]:
        """(C, H, W) of a state's map."""
        stride = 2**num_pools * (LARGE_STEM_STRIDE if self.space.stem == "large" else 1)
        return (self.space.layers[layer].out_channels, self.image_size[0] // stride, self.image_size[1] // stride)

    # Making it. -------------------------------------------------------------------------------------------------------

    def _tree(self, pairs: Sequence[Pair]) -> list[_Node]:
        """The roots (layer 0) of each supernet's prefix tree."""
        if not pairs:
            raise InputError("pairs is empty: there is nothing to score")
        roots: dict[tuple[int, History], _Node] = {}
        for index, (architecture, supernet) in enumerate(pairs):
            self.space.check(architecture)
            node = roots.setdefault((supernet, ()), _Node(supernet, (), 0, None))
            for layer in range(1, self.space.num_layers):
                history = tuple(p for p in architecture.pool_positions if p <= layer)
                node = node.children.setdefault(history, _Node(supernet, history, layer, node))
            if node.pairs:
                raise InputError(
                    f"pairs[{index}] repeats pairs[{node.pairs[0]}]: {architecture} with supernet {supernet}"
                )
            node.pairs.append(index)
        return [roots[key] for key in sorted(roots)]

    def _state_bytes(self, layer: int, num_pools: int) -> int:
        channels, height, width = self.map_shape(layer, num_pools)
        return self.batch_size * channels * height * width * self.itemsize

    def _workspace(self, layer: int, num_pools: int, states: int) -> int:
        """Upper bound of a layer's intermediate maps for so many states at a time, with its pooled or strided input."""
        biggest = self._state_bytes(layer, num_pools)
        if (
            layer == 0 and self.space.stem == "large"
        ):  # the stem's 7x7/2 map is four times its pooled output, per channel
            biggest = max(biggest, 4 * biggest * self.space.stem_width // self.space.layers[0].out_channels)
        elif layer > 0:
            inner = self.space.layers[layer].main[0].out_channels * biggest // self.space.layers[layer].out_channels
            before = self.space.block == "bottleneck" and self.space.pool == "stride" and num_pools > 0
            biggest = max(biggest, 4 * inner if before else inner)
            biggest = max(biggest, self._state_bytes(layer - 1, num_pools))
        return self._workspace_maps * biggest * states

    def _chunk(self, layer: int, num_pools: int, available: float) -> int:
        one = self._workspace(layer, num_pools, 1)
        wanted = max(1, self._chunk_bytes // self._state_bytes(layer, num_pools))
        return int(max(1, min(wanted, available // one if available != float("inf") else wanted)))

    def _need(self, node: _Node, *, alone: bool) -> int:
        """Bytes beyond what is alive that the subtree below `node` needs, one state at a time.

        A state that is `alone` in its layer gives its own memory back as soon as its last child is computed.
        """
        if alone in node.needs:
            return node.needs[alone]
        need, children = 0, _ordered(node.children.values())
        for child in children:
            own = self._state_bytes(child.layer, child.num_pools)
            freed = self._state_bytes(node.layer, node.num_pools) if alone and child is children[-1] else 0
            below = own + self._need(child, alone=True) - freed
            need = max(need, own + self._workspace(child.layer, child.num_pools, 1), below)
        node.needs[alone] = need
        return need

    def _fits(self, part: list[_Node], freed: int) -> bool:
        """Whether `part`, then its subtrees fit under the cap; `freed` bytes of parents go once `part` is computed."""
        own = sum(self._tops) + sum(self._state_bytes(node.layer, node.num_pools) for node in part)
        workspace = max(self._workspace(node.layer, node.num_pools, 1) for node in part)
        below = max(self._need(node, alone=len(part) == 1) for node in part)
        return own + workspace <= self._cap and own - freed + below <= self._cap

    def _descend(self, children: list[_Node], frontier_bytes: int, side: int) -> None:
        """Lays down the waves of `children` (one layer, parents alive on the other side) and all that is below them."""
        children = _ordered(children)
        while children:
            # As many at a time as fit; one always does, by the check at the start.
            count = next(
                (
                    n
                    for n in range(len(children), 1, -1)
                    if self._fits(children[:n], frontier_bytes * (n == len(children)))
                ),
                1,
            )
            part, children = children[:count], children[count:]
            start = self._tops[side]
            self._lay(part, side)
            if not children:
                self._tops[1 - side] -= frontier_bytes
            grandchildren = [grandchild for child in part for grandchild in child.children.values()]
            if grandchildren:
                self._descend(grandchildren, self._tops[side] - start, 1 - side)
            self._tops[side] = start

    def _lay(self, part: list[_Node], side: int) -> None:
        """One wave for each resolution among `part`."""
        total = sum(self._state_bytes(node.layer, node.num_pools) for node in part)
        workspace = 0
        for num_pools in sorted({node.num_pools for node in part}, reverse=True):
            nodes = [node for node in part if node.num_pools == num_pools]
            layer, size = nodes[0].layer, self._state_bytes(nodes[0].layer, num_pools)
            chunk = min(len(nodes), self._chunk(layer, num_pools, self._cap - sum(self._tops) - total))
            workspace = max(workspace, self._workspace(layer, num_pools, chunk))
            states, heads = [], []
            for place, node in enumerate(nodes):
                parent = None if node.parent is None else node.parent.slot
                states.append(PlannedState(node.supernet, node.pool_positions, parent, node.pools))
                node.slot = Slot(len(self._waves), place)
                heads += [(place, pair) for pair in node.pairs]
            start = self._tops[side]
            self._tops[side] = start + size * len(nodes)
            total -= size * len(nodes)
            self._ends.append((side, start, self._tops[side]))
            self._waves.append(Wave(layer, num_pools, tuple(states), 0, size, chunk, tuple(heads)))
        self._arena_bytes = max(self._arena_bytes, sum(self._tops))
        self._peak = max(self._peak, sum(self._tops) + workspace)

    def _offset(self, wave: int) -> int:
        side, start, end = self._ends[wave]
        return start if side == 0 else self._arena_bytes - end


def _ordered(nodes: Iterable[_Node]) -> list[_Node]:
    """Most pooled first, so that the child that keeps its parent's resolution comes last; then as their parents lie."""
    return sorted(nodes, key=lambda node: (-node.num_pools, node.supernet, node.pools, node.pool_positions))
