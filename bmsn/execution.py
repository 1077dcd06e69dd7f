"""Running an `EvaluationPlan` on one batch: which states go together, and what a layer computes of them.

A *run* of states lies one behind the other in memory: what it reads, and each kind of map that it writes, is one tensor
of stacked batches. Statistics of BatchNorm come from the batch, or were measured before (`Norm`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.backend import resolve
from bmsn.network import Weights
from bmsn.ops.bn_add_relu_pool import bn_add_relu_pool
from bmsn.ops.checks import accumulator_dtype
from bmsn.ops.conv_bn import ConvBn, batch_statistics, conv_bn
from bmsn.ops.conv_scale import conv_scale
from bmsn.ops.convolution import has_cpp_convolution, output_shape, without_tf32
from bmsn.ops.head import head
from bmsn.plan import EvaluationPlan, PlannedState, Wave
from bmsn.space import Convolution, Layer, SearchSpace

_Key = tuple[int, tuple[int, ...], int, str]  # supernet, pool positions so far, layer, convolution


class Norm:
    """Where statistics come from: every batch, which `kept` may remember state by state, or what was remembered."""

    def __init__(self, kept: dict[_Key, Tensor] | None = None, frozen: dict[_Key, Tensor] | None = None) -> None:
        self.kept, self._frozen = kept, frozen

    @property
    def is_frozen(self) -> bool:
        return self._frozen is not None

    def keep(self, run: Sequence[PlannedState], layer: int, name: str, stats: Tensor | None) -> None:
        if self.kept is not None and stats is not None:
            for state, own in zip(run, stats.unbind(1), strict=True):
                self.kept[state.supernet, state.pool_positions, layer, name] = own

    def known(self, run: Sequence[PlannedState], layer: int, name: str) -> Tensor:
        assert self._frozen is not None
        return torch.stack([self._frozen[state.supernet, state.pool_positions, layer, name] for state in run], 1)


class Memory:
    """What a plan computes in: its block of maps between layers, and maps within a layer, kept from one to the next.

    A CPU writes to pages that were never touched at a fraction of its speed, so none are given back in between.
    """

    def __init__(self, plan: EvaluationPlan, device: torch.device) -> None:
        self.block = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=device)
        self._beside = plan.peak_bytes - plan.arena_bytes
        self._kept: dict[str, Tensor] = {}

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An NCHW map, channels_last; the next one of that name lies where this one does."""
        images, channels, height, width = shape
        size = images * channels * height * width * dtype.itemsize
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept.pop(name, None)
            if size + sum(map(len, self._kept.values())) > self._beside:  # what the plan promises to stay below
                self._kept.clear()
            self._kept[name] = torch.empty(size, dtype=torch.uint8, device=self.block.device)
        return self._kept[name][:size].view(dtype).view(images, height, width, channels).permute(0, 3, 1, 2)


def run_batches(
    plan: EvaluationPlan,
    weights: Weights,
    memory: Memory,
    images: Tensor,
    num_groups: int,
    labels: Tensor,
    correct: Tensor,
    norm: Norm,
    backend: str,
) -> None:
    """Adds each pair's correct classifications of `images` (channels_last) to `correct`.

    In every state they are `num_groups` statistics groups, at most `plan.batch_size` images in all.
    """
    in_cpp = resolve("conv_bn", backend, device=images.device) == "cpp"
    for wave in plan.waves:
        source_shape = plan.map_shape(wave.layer - 1, wave.num_pools - wave.strides) if wave.layer else images.shape[1:]
        shape = channels, height, width = plan.map_shape(wave.layer, wave.num_pools)
        for run in _runs(wave, mixed=_mixes(images, backend)):
            state, num_states = run[0], len(run)
            rows = _Rows(weights, [state.supernet for state in run], num_groups, images.device)

            def stacked(offset: int | None, shape: tuple[int, ...], num_states: int = num_states) -> Tensor | None:
                return None if offset is None else _maps(plan, memory.block, offset, num_states, shape, images)

            source = images if state.source is None else stacked(state.source, source_shape)
            assert source is not None
            full, pooled = stacked(state.full, shape), stacked(state.pooled, (channels, height // 2, width // 2))
            work = _Work(plan.space, wave, run, rows, norm, memory, backend)
            ends = _layer(work, source, full, pooled)
            if state.pair is not None:
                places = [state.pair for state in run]
                correct[places] += head(
                    ends, labels, rows(weights.head_weight), rows(weights.head_bias), num_states,
                    weight_index=rows.of_states,
                    backend="reference" if in_cpp else backend,  # too little work for a C++ version of its own
                )  # fmt: skip


class _Rows:
    """The weight sets of a run's states: `rows(w)`, and which of them each takes if that is not the same one.

    Attributes:
        num_groups: statistics groups of the run, those of a state one behind the other.
        of_states, of_groups: (states,) and (num_groups,) int32, or None: all take the one that `rows(w)` is.
    """

    def __init__(self, weights: Weights, supernets: list[int], groups_of_state: int, device: torch.device) -> None:
        self.weights, self._first, self.num_groups = weights, supernets[0], len(supernets) * groups_of_state
        self.of_states = self.of_groups = None
        if len(set(supernets)) > 1:
            self.of_states = torch.tensor(supernets, dtype=torch.int32, device=device)
            self.of_groups = self.of_states.repeat_interleave(groups_of_state)

    def __call__(self, weight: Tensor) -> Tensor:
        return weight[self._first : self._first + 1] if self.of_states is None else weight


def _maps(
    plan: EvaluationPlan, block: Tensor, offset: int, num_states: int, shape: tuple[int, ...], images: Tensor
) -> Tensor:
    """The maps of states that begin at byte `offset`, as (num_states * N, C, H, W), channels_last."""
    channels, height, width = shape
    start = offset // plan.batch_size * len(images)  # the last batch may be smaller
    size = num_states * len(images) * height * width * channels * images.element_size()
    maps = block[start : start + size].view(images.dtype).view(num_states * len(images), height, width, channels)
    return maps.permute(0, 3, 1, 2)


def _mixes(images: Tensor, backend: str) -> bool:
    """Whether states of several supernets go together: our kernels take all weight sets, a library's conv one."""
    return images.is_cuda or backend == "triton"


def _runs(wave: Wave, *, mixed: bool) -> Iterator[tuple[PlannedState, ...]]:
    """Runs of at most `chunk` states that read, and write, maps which lie one behind the other.

    They are of one supernet, unless `mixed`.
    """
    run: list[PlannedState] = []
    for state in wave.states:
        if run and (len(run) == wave.chunk or not _follows(run[-1], state, wave, mixed)):
            yield tuple(run)
            run = []
        run.append(state)
    yield tuple(run)


def _follows(before: PlannedState, state: PlannedState, wave: Wave, mixed: bool) -> bool:
    def one_behind(a: int | None, b: int | None, step: int) -> bool:
        return b is None if a is None else b == a + step

    return (
        (mixed or state.supernet == before.supernet)
        and one_behind(before.source, state.source, wave.source_bytes)
        and one_behind(before.full, state.full, wave.map_bytes)
        and one_behind(before.pooled, state.pooled, wave.map_bytes // 4)
        and (before.pair is None) == (state.pair is None)
    )


@dataclass(frozen=True)
class _Work:
    """One layer of the stacked states of a run, each a statistics group, and what computes it."""

    space: SearchSpace
    wave: Wave
    run: Sequence[PlannedState]
    rows: _Rows
    norm: Norm
    memory: Memory
    backend: str

    @property
    def layer(self) -> Layer:
        return self.space.layers[self.wave.layer]

    def weight(self, name: str) -> Tensor:
        return self.rows(self.rows.weights.layers[self.wave.layer][name])

    def stride(self, conv: Convolution) -> int:
        return 1 + self.wave.strides if conv.stage == "at" else 1

    def known(self, name: str) -> Tensor:
        return self.norm.known(self.run, self.wave.layer, name)

    def keep(self, name: str, stats: Tensor | None) -> None:
        self.norm.keep(self.run, self.wave.layer, name, stats)


def _layer(work: _Work, x: Tensor, full: Tensor | None, pooled: Tensor | None) -> Tensor:
    """Writes the states' maps, and returns them where no child wants them."""
    rows, backend = work.rows, work.backend
    if work.wave.layer == 0:
        # A state of every supernet reads the same images; kernels find what they read one state behind the other.
        maps = [x] * len(work.run) if rows.weights.stem is None else [_stem(work, x, state) for state in work.run]
        x = maps[0] if len(maps) == 1 else torch.cat(maps)
    if work.norm.is_frozen and (_mixes(x, backend) or _is_cpp(work, "conv_scale", x, work.layer.convolutions)):
        return _scaled(work, x, full, pooled)
    y, stats, shortcut, shortcut_stats = _normed(work, x)
    if full is None and pooled is None:
        full = y
    bn_add_relu_pool(
        y, stats, shortcut, shortcut_stats,
        full=full, pooled=pooled, pool="avg" if work.space.pool == "avg" else "max", backend=backend,
    )  # fmt: skip
    return y


def _stem(work: _Work, x: Tensor, state: PlannedState) -> Tensor:
    """The large stem of one state: its 7x7 convolution is the library's, which takes one weight set."""
    rows, norm, backend = work.rows, work.norm, work.backend
    assert rows.weights.stem is not None
    with without_tf32(x.device):
        x = F.conv2d(x, rows.weights.stem[state.supernet], stride=2, padding=3)
    if norm.is_frozen:
        stats = norm.known([state], 0, "stem")
    else:
        stats = batch_statistics(x, rows.num_groups // len(work.run), backend=backend)
        norm.keep([state], 0, "stem", stats)
    bn_add_relu_pool(x, stats, full=x, backend=backend)
    return F.max_pool2d(x, 3, 2, 1)


def _normed(work: _Work, x: Tensor) -> ConvBn:
    """The layer's convolutions, each with its statistics, up to what `bn_add_relu_pool` takes."""
    layer, frozen, num_groups = work.layer, work.norm.is_frozen, work.rows.num_groups

    def conv(conv: Convolution, x: Tensor, stats: Tensor | None, rider: Convolution | None = None) -> ConvBn:
        stride, together = work.stride(conv), [conv] if rider is None else [conv, rider]
        weights = [work.weight(one.name) for one in together]
        into = [_scratch(work, one, x) for one in together] if _is_cpp(work, "conv_bn", x, together) else []
        found = conv_bn(
            x, weights[0], num_groups, stats=stats, overwrite=stats is not None, weight_index=work.rows.of_groups,
            stride=stride, shortcut_weight=weights[1] if rider else None, measure=not frozen, into=into,
            backend=work.backend,
        )  # fmt: skip
        if frozen:
            return ConvBn(
                *(found.y, work.known(conv.name)), *(found.shortcut, None if rider is None else work.known(rider.name))
            )
        work.keep(conv.name, found.stats)
        if rider is not None:
            work.keep(rider.name, found.shortcut_stats)
        return found

    first, *others = layer.main
    rider = layer.shortcut if layer.kind == "basic" else None  # the projection, with the first convolution
    y, stats, shortcut, shortcut_stats = conv(first, x, None, rider)
    if layer.shortcut is not None and rider is None:
        shortcut, shortcut_stats, *_ = conv(layer.shortcut, x, None)
    elif layer.shortcut is None and layer.kind != "stem":
        shortcut = _identity(x, 1 + work.wave.strides)
    for step in others:
        y, stats, *_ = conv(step, y, stats)
    return ConvBn(y, stats, shortcut, shortcut_stats)


def _is_cpp(work: _Work, op: str, x: Tensor, convolutions: Sequence[Convolution]) -> bool:
    """Whether our CPU kernel has these convolutions of the layer, and is what `op` shall run on."""
    return resolve(op, work.backend, device=x.device) == "cpp" and all(
        has_cpp_convolution(x, work.weight(conv.name), work.stride(conv)) for conv in convolutions
    )


def _scaled(work: _Work, x: Tensor, full: Tensor | None, pooled: Tensor | None) -> Tensor:
    """The whole layer with frozen statistics: its last convolution adds, ReLUs and writes where the map belongs."""
    layer = work.layer
    shortcut = None
    if layer.shortcut is not None:
        shortcut = _conv_scale(work, layer.shortcut, x)
    elif layer.kind != "stem":
        shortcut = _identity(x, 1 + work.wave.strides)
    *others, last = layer.main
    for step in others:
        x = _conv_scale(work, step, x, relu=True)
    y = _conv_scale(work, last, x, relu=True, shortcut=shortcut, into=full)
    if pooled is not None:
        kind = "avg" if work.space.pool == "avg" else "max"
        bn_add_relu_pool(y, _as_it_is(work, y), pooled=pooled, pool=kind, backend=work.backend)
    return y


def _conv_scale(
    work: _Work,
    conv: Convolution,
    x: Tensor,
    *,
    relu: bool = False,
    shortcut: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    mean, scale = work.known(conv.name)
    return conv_scale(
        x, work.weight(conv.name), work.rows.num_groups, scale=scale, shift=-mean * scale, relu=relu, shortcut=shortcut,
        weight_index=work.rows.of_groups, stride=work.stride(conv),
        into=_scratch(work, conv, x) if into is None else into, backend=work.backend,
    )  # fmt: skip


def _as_it_is(work: _Work, y: Tensor) -> Tensor:
    """Statistics that change nothing: mean 0, rstd 1."""
    stats = torch.zeros(2, work.rows.num_groups, y.shape[1], dtype=accumulator_dtype(y), device=y.device)
    stats[1] = 1
    return stats


def _scratch(work: _Work, conv: Convolution, x: Tensor) -> Tensor:
    """Memory for what a convolution makes of x; the input of one lies where the one before wrote it."""
    layer = work.layer
    name = "shortcut" if conv == layer.shortcut else f"main {layer.main.index(conv) % 2}"
    return work.memory.scratch(name, output_shape(x, work.weight(conv.name), work.stride(conv)), x.dtype)


def _identity(x: Tensor, stride: int) -> Tensor:
    return x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
