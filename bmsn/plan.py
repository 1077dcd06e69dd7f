"""`EvaluationPlan`: how to score (architecture, supernet) pairs, each shared prefix computed once. No torch inside.

Two architectures with the same poolings up to a layer have the same activation there, so the pairs of one supernet form
a prefix tree of *states*. The plan walks it layer by layer; the states of a layer and resolution form a *wave*. What
lies in memory between two layers are the maps that the next layer reads: a state writes its map as it is for a child
that keeps the resolution (or strides itself), halved for a child that pools, or both.

All maps lie in one block of memory with a stack growing from each end: a layer's maps are on the side opposite to those
that it reads, so these give their memory back at once. Where a layer's maps do not fit under the memory cap together,
subtrees are walked one after the other, the most pooled and therefore smallest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from bmsn.errors import InputError
from bmsn.space import LARGE_STEM_STRIDE, Architecture, SearchSpace, State

Pair = tuple[Architecture, int]
History = tuple[int, ...]

# These stay in a CPU's cache, and below the 32 MiB from which glibc takes every map as fresh pages (a sixth of the time
# of a scoring on one core).
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class PlannedState:
    """A node of the tree, and the bytes at which its maps begin.

    Attributes:
        source: the map that it reads; None: the images.
        full: where its own map goes; None: no child reads it.
        pooled: where its map goes after 2x2 pooling; None: no child reads it.
        pair: index of the pair that ends here, or None.
    """

    supernet: int
    pool_positions: History
    source: int | None
    full: int | None
    pooled: int | None
    pair: int | None


@dataclass(frozen=True, slots=True)
class Wave:
    """States of one layer and resolution, in the order in which the maps that they read lie in memory.

    Attributes:
        num_pools: poolings up to the states' own maps.
        strides: whether the layer itself halves the resolution.
        map_bytes: of a state's own map; its pooled map has a quarter of them.
        source_bytes: of the map that a state reads.
        chunk: how many states are computed at a time, so that their intermediate maps stay small.
    """

    layer: int
    num_pools: int
    strides: bool
    states: tuple[PlannedState, ...]
    map_bytes: int
    source_bytes: int
    chunk: int


@dataclass(eq=False)
class _Node:
    """A state of one supernet while the plan is being made."""

    supernet: int
    state: State
    pair: int | None
    children: list[_Node] = field(default_factory=list)
    maps: list[_Map] = field(default_factory=list)  # what it writes, made once

    @property
    def layer(self) -> int:
        return self.state.layer

    @property
    def num_pools(self) -> int:
        return self.state.num_pools


@dataclass(eq=False)
class _Map:
    """A map between two layers: who reads it, and where it lies (bytes from the end that its stack grows from)."""

    readers: list[_Node]
    num_pools: int
    bytes: int
    need: int | None = None
    side: int = 0
    end: int = 0


class EvaluationPlan:
    """Waves that score `pairs`, in the order of their execution; `print` it to read them.

    Attributes:
        least_bytes: the smallest `max_bytes` that these pairs, batches and activations allow.

    Args:
        space: whose architectures the pairs name.
        pairs: (architecture, supernet index), each at most once.
        batch_size: images of a state that are computed at once: a batch or, on a GPU, several.
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
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.space, self.num_pairs, self.max_bytes = space, len(pairs), max_bytes
        self.batch_size, self.image_size, self.itemsize = batch_size, image_size, itemsize
        self._workspace_maps, self._chunk_bytes = workspace_maps, chunk_bytes
        self._cap = float("inf") if max_bytes is None else max_bytes
        images = [_Map([root], 0, 0) for root in self._tree(pairs)]
        self._waves: list[tuple[list[_Node], dict[_Node, _Map], Wave]] = []
        self._tops = [0, 0]  # bytes in use on the two sides
        self._arena_bytes = self._peak = 0
        self.least_bytes = max(self._need(image) for image in images)
        if self.least_bytes > self._cap:
            raise InputError(
                f"max_bytes must be at least {self.least_bytes} for this space, batch size and dtype; got {max_bytes}"
            )
        self._descend(images, 0)
        self.waves = tuple(self._placed(*wave) for wave in self._waves)

    # What a reader asks of a plan. ------------------------------------------------------------------------------------

    @property
    def arena_bytes(self) -> int:
        """Size of the one block that all maps between layers lie in."""
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
            f"maps {self.arena_bytes / 2**20:.1f} MiB, peak {self.peak_bytes / 2**20:.1f} MiB"
        ]
        for number, wave in enumerate(self.waves):
            channels, height, width = self.map_shape(wave.layer, wave.num_pools)
            full, pooled, ends = (
                sum(getattr(state, name) is not None for state in wave.states) for name in ("full", "pooled", "pair")
            )
            lines.append(
                f"wave {number}: layer {wave.layer}{' strides' if wave.strides else ''}, {len(wave.states)} states of "
                f"{channels}x{height}x{width}, {wave.chunk} at a time; {full} full and {pooled} pooled maps written, "
                f"{ends} pairs end"
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
        ends: dict[int, dict[History, int]] = {}  # of each supernet, where its architectures stand in `pairs`
        for index, (architecture, supernet) in enumerate(pairs):
            self.space.check(architecture)
            first = ends.setdefault(supernet, {}).setdefault(architecture.pool_positions, index)
            if first != index:
                raise InputError(f"pairs[{index}] repeats pairs[{first}]: {architecture} with supernet {supernet}")
        roots: list[_Node] = []
        for supernet, places in sorted(ends.items()):
            above: list[_Node] = []
            for states in self.space.prefix_tree([pairs[index][0] for index in places.values()]):
                last = states[0].layer == self.space.num_layers - 1
                nodes = [_Node(supernet, s, places[s.pool_positions] if last else None) for s in states]
                for node in nodes:
                    (above[node.state.parent].children if above else roots).append(node)
                above = nodes
        return roots

    def _maps(self, node: _Node) -> list[_Map]:
        """What a state writes for its children: one map for both where they stride themselves, else one for each."""
        if not node.maps and node.children:
            children = sorted(node.children, key=lambda child: child.num_pools)
            groups = [children] if self.space.pool == "stride" else [[child] for child in children]
            for readers in groups:
                num_pools = node.num_pools if self.space.pool == "stride" else readers[0].num_pools
                node.maps.append(_Map(readers, num_pools, self._map_bytes(node.layer, num_pools)))
        return node.maps

    def _map_bytes(self, layer: int, num_pools: int) -> int:
        channels, height, width = self.map_shape(layer, num_pools)
        return self.batch_size * channels * height * width * self.itemsize

    def _workspace(self, layer: int, num_pools: int, states: int) -> int:
        """Upper bound of a layer's intermediate maps for so many states at a time, with its pooled or strided input."""
        biggest = self._map_bytes(layer, num_pools)
        if (
            layer == 0 and self.space.stem == "large"
        ):  # the stem's 7x7/2 map is four times its pooled output, per channel
            biggest = max(biggest, 4 * biggest * self.space.stem_width // self.space.layers[0].out_channels)
        elif layer > 0:
            inner = self.space.layers[layer].main[0].out_channels * biggest // self.space.layers[layer].out_channels
            before = self.space.block == "bottleneck" and self.space.pool == "stride" and num_pools > 0
            biggest = max(biggest, 4 * inner if before else inner)
            biggest = max(biggest, self._map_bytes(layer - 1, num_pools))
        return self._workspace_maps * biggest * states

    def _chunk(self, layer: int, num_pools: int, available: float) -> int:
        one = self._workspace(layer, num_pools, 1)
        wanted = max(1, self._chunk_bytes // self._map_bytes(layer, num_pools))
        return int(max(1, min(wanted, available // one if available != float("inf") else wanted)))

    def _need(self, source: _Map) -> int:
        """Bytes beyond what is alive, `source` included, that its readers and all below need, one map at a time."""
        if source.need is None:
            written = self._written([source])
            own = sum(m.bytes for m in written)
            workspace = max(self._workspace(node.layer, node.num_pools, 1) for node in source.readers)
            source.need = max(own + workspace, own - source.bytes + self._below(written))
        return source.need

    def _below(self, maps: list[_Map]) -> int:
        """The same for maps that are all alive and are read one by one, the last one first."""
        most = freed = 0
        for one in reversed(maps):
            most = max(most, self._need(one) - freed)
            freed += one.bytes
        return most

    def _written(self, sources: Iterable[_Map]) -> list[_Map]:
        """All that the readers of `sources` write, in the order of their stack: the most pooled on top."""
        return sorted(
            (m for source in sources for node in source.readers for m in self._maps(node)), key=lambda m: m.num_pools
        )

    def _fits(self, part: list[_Map]) -> bool:
        """Whether `part` can be read at once, and what is below it one by one, under the cap."""
        written = self._written(part)
        used = sum(self._tops) + sum(m.bytes for m in written)
        workspace = max(self._workspace(node.layer, node.num_pools, 1) for m in part for node in m.readers)
        return used + workspace <= self._cap and used - sum(m.bytes for m in part) + self._below(written) <= self._cap

    def _descend(self, maps: list[_Map], side: int) -> None:
        """Lays down the waves that read `maps`, alive on `side` and the last one on top, and all that is below them."""
        while maps:
            # As many at a time as fit; one always does, by the check at the start.
            count = next((n for n in range(len(maps), 1, -1) if self._fits(maps[-n:])), 1)
            part, maps = maps[-count:], maps[:-count]
            written = self._lay(part if side == 0 else part[::-1], 1 - side)
            self._tops[side] -= sum(m.bytes for m in part)
            self._descend(written, 1 - side)

    def _lay(self, part: list[_Map], side: int) -> list[_Map]:
        """One wave for each kind of step among the readers of `part`, in memory order; returns what they write."""
        written = self._written(part if side == 0 else part[::-1])  # so that addresses ascend along a wave
        for one in written:
            self._tops[side] += one.bytes
            one.side, one.end = side, self._tops[side]
        used, workspace = sum(self._tops), 0
        sources = {node: source for source in part for node in source.readers}
        strides = self.space.pool == "stride"
        for kind in sorted({(node.num_pools, strides and node.state.pools) for node in sources}, reverse=True):
            nodes = [node for node in sources if (node.num_pools, strides and node.state.pools) == kind]
            layer, num_pools = nodes[0].layer, kind[0]
            chunk = min(len(nodes), self._chunk(layer, num_pools, self._cap - used))
            workspace = max(workspace, self._workspace(layer, num_pools, chunk))
            bytes_ = self._map_bytes(layer, num_pools)
            self._waves.append((nodes, sources, Wave(layer, *kind, (), bytes_, sources[nodes[0]].bytes, chunk)))
        self._arena_bytes = max(self._arena_bytes, used)
        self._peak = max(self._peak, used + workspace)
        return written

    def _placed(self, nodes: list[_Node], sources: dict[_Node, _Map], wave: Wave) -> Wave:
        """`wave` with its states, now that the size of the block is known."""

        def address(one: _Map) -> int:
            return one.end - one.bytes if one.side == 0 else self._arena_bytes - one.end

        states = []
        for node in nodes:
            places = {m.num_pools - node.num_pools: address(m) for m in node.maps}
            source = None if wave.layer == 0 else address(sources[node])
            states.append(
                PlannedState(node.supernet, node.state.pool_positions, source, places.get(0), places.get(1), node.pair)
            )
        return replace(wave, states=tuple(states))
