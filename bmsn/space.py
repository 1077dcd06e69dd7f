"""Search spaces: every way to place p poolings in a CNN of L layers. Knows nothing of torch.

Source: Javan et al. 2023 (arXiv 2306.11982), section 2.1. A *layer* is a residual block; a small stem's convolution
counts as layer 0, a large stem (7x7/2 convolution and 3x3/2 max-pool) is fixed and outside the L layers. Channel widths
belong to the layer and not to the resolution, so all architectures of a space share one set of parameters.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, Literal

from bmsn.errors import InputError, did_you_mean
from bmsn.field_types import fitted

BlockKind = Literal["basic", "bottleneck"]
StemKind = Literal["small", "large"]
PoolKind = Literal["max", "avg", "stride"]

BOTTLENECK_EXPANSION = 4
LARGE_STEM_STRIDE = 4


@dataclass(frozen=True, slots=True)
class Architecture:
    """One pooling configuration.

    Attributes:
        index: place in its space's order (lexicographic in `pool_positions`), from 0; files and tables print index + 1.
        pool_positions: the layers that are preceded by a pooling, increasing, each in 1..L-1.
        stage_depths: number of layers at each resolution, summing to L.
    """

    index: int
    pool_positions: tuple[int, ...]
    stage_depths: tuple[int, ...]

    def __str__(self) -> str:
        return "[" + ",".join(map(str, self.stage_depths)) + "]"

    @property
    def slug(self) -> str:
        """`4-3-3`: the form for CSV files, file names and JSON keys."""
        return "-".join(map(str, self.stage_depths))


@dataclass(frozen=True, slots=True)
class Convolution:
    """One convolution of a layer: no bias, padding kernel // 2, followed by a BatchNorm.

    Attributes:
        stage: which map it writes where its layer strides: "before" the stride (a bottleneck's first 1x1), "at" it, or
            "after".
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stage: Literal["before", "at", "after"]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels, self.kernel, self.kernel)

    @property
    def num_weights(self) -> int:
        return self.out_channels * self.in_channels * self.kernel**2


@dataclass(frozen=True, slots=True)
class Layer:
    """Main path, in order, and projection shortcut (None: identity). The small stem is a layer with one convolution."""

    kind: Literal["stem", "basic", "bottleneck"]
    main: tuple[Convolution, ...]
    shortcut: Convolution | None

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        return self.main if self.shortcut is None else (*self.main, self.shortcut)

    @property
    def out_channels(self) -> int:
        return self.main[-1].out_channels


@dataclass(frozen=True, slots=True)
class State:
    """A node of the prefix tree: the output of `layer` after the poolings at `pool_positions` (all <= layer).

    Attributes:
        parent: index of the state of the layer before among that layer's states; -1 at layer 0.
    """

    layer: int
    pool_positions: tuple[int, ...]
    parent: int

    @property
    def num_pools(self) -> int:
        return len(self.pool_positions)

    @property
    def pools(self) -> bool:
        """Whether this layer itself is preceded by a pooling."""
        return bool(self.pool_positions) and self.pool_positions[-1] == self.layer


def parse_stage_depths(text: str) -> tuple[int, ...]:
    """`4,3,3`, `4-3-3` or `[4,3,3]` as a tuple."""
    if not re.fullmatch(r"\[?\s*\d+(\s*[,-]\s*\d+)*\s*\]?", text.strip()):
        raise InputError(f"architecture {text!r}: expected stage depths such as 4,3,3 or 4-3-3 or [4,3,3]")
    return tuple(int(number) for number in re.findall(r"\d+", text))


class SearchSpace(Sequence[Architecture]):
    """All C(L-1, p) architectures of a CNN, in lexicographic order of their pool positions.

    Args:
        num_layers: L, at least 2.
        num_pools: p, in 1..L-1.
        widths: L channel counts, one a layer; a bottleneck's inner width (its output is 4 times as wide). With a large
            stem the stem has widths[0] channels.
        block: residual block, "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1).
        stem: "small" (3x3 convolution, is layer 0) or "large" (7x7/2 convolution and 3x3/2 max-pool, outside the L
            layers).
        pool: how a layer halves its input: 2x2 "max" or "avg" pooling before it, or a "stride" in it.
        image_size: pixels on a side; a multiple of `total_stride`.
        name: for messages and files.
        default: stage depths of the usual architecture; None: as even as they come, the longer stages first.
    Raises:
        InputError: a value out of range; the message names field, bound and value.
    """

    def __init__(
        self,
        num_layers: int,
        num_pools: int,
        widths: Sequence[int],
        *,
        block: BlockKind = "basic",
        stem: StemKind = "small",
        pool: PoolKind = "max",
        image_size: int = 32,
        name: str = "custom",
        default: Sequence[int] | None = None,
    ) -> None:
        block, stem, pool = (
            fitted(name, value, kind)
            for name, value, kind in (("block", block, BlockKind), ("stem", stem, StemKind), ("pool", pool, PoolKind))
        )
        num_layers, num_pools = fitted("num_layers", num_layers, int), fitted("num_pools", num_pools, int)
        name = fitted("name", name, str)
        image_size, widths = fitted("image_size", image_size, int), fitted("widths", widths, tuple[int, ...])
        if num_layers < 2:
            raise InputError(f"num_layers must be at least 2; got {num_layers}")
        if not 1 <= num_pools <= num_layers - 1:
            raise InputError(f"num_pools must be in 1..num_layers-1 = 1..{num_layers - 1}; got {num_pools}")
        if len(widths) != num_layers or min(widths) < 1:
            raise InputError(f"widths must be {num_layers} positive channel counts, one a layer; got {widths}")
        self.num_layers, self.num_pools, self.widths = num_layers, num_pools, tuple(widths)
        self.block, self.stem, self.pool, self.name = block, stem, pool, name
        self.image_size = self._checked_size(image_size)
        if default is None:
            short, longer = divmod(num_layers, num_pools + 1)
            default = [short + (stage < longer) for stage in range(num_pools + 1)]
        self.default = self.find(default)

    @classmethod
    def named(cls, name: str, width: float = 1.0, *, pool: PoolKind | None = None) -> SearchSpace:
        """A published space (`SPACES`) or one's own, by its `spec`.

        Args:
            name: of `SPACES`, or a JSON object of the arguments of `SearchSpace`.
            width: factor of all widths (rounded, at least 1).
            pool: None: as the space has it.
        Raises:
            InputError: no such space (the message has the nearest), or a value out of range.
        """
        if not 0 < width <= 64:
            raise InputError(f"width must be in (0, 64]; got {width}")
        if name in _NAMED:
            arguments = {"name": name, **_NAMED[name].arguments}
        elif name.startswith("{"):
            try:
                arguments = cls(**json.loads(name)).arguments()
            except (ValueError, TypeError) as error:  # InputError is a ValueError
                raise InputError(f"space {name}: {error}") from error
        else:
            raise InputError(f"space {name!r} is unknown{did_you_mean(name, _NAMED)}; known: {', '.join(_NAMED)}")
        widths = [max(1, round(w * width)) for w in arguments["widths"]]
        return cls(**arguments | {"widths": widths, "pool": pool or arguments["pool"]})

    def arguments(self) -> dict[str, Any]:
        """The arguments that make this space again, as plain values."""
        return {
            "name": self.name, "num_layers": self.num_layers, "num_pools": self.num_pools, "widths": list(self.widths),
            "block": self.block, "stem": self.stem, "pool": self.pool, "image_size": self.image_size,
            "default": list(self.default.stage_depths),
        }  # fmt: skip

    @property
    def spec(self) -> str:
        """Text that `named` makes this space of again, given its `pool`: the name of a published one, else JSON.

        It is what settings and files of runs hold. Raises InputError for a part of a space (`restricted`).
        """
        if len(self) != math.comb(self.num_layers - 1, self.num_pools):
            raise InputError(f"space {self.name}: a whole space is needed; got {len(self)} of its architectures")
        published = _NAMED.get(self.name)
        own = _Named(self.widths, self.default.stage_depths, self.block, self.stem, self.pool, self.image_size)
        if published is not None and own == replace(published, pool=self.pool):
            return self.name
        return json.dumps(self.arguments())

    # A sequence of architectures. -------------------------------------------------------------------------------------

    @cached_property
    def _architectures(self) -> tuple[Architecture, ...]:
        positions = combinations(range(1, self.num_layers), self.num_pools)
        return tuple(Architecture(i, p, self._depths(p)) for i, p in enumerate(positions))

    def _depths(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        bounds = (0, *positions, self.num_layers)
        return tuple(after - before for before, after in pairwise(bounds))

    @cached_property
    def _by_positions(self) -> dict[tuple[int, ...], Architecture]:
        return {a.pool_positions: a for a in self._architectures}

    def restricted(self, architectures: Sequence[Architecture]) -> SearchSpace:
        """The same space with these of its architectures alone, numbered anew from 0.

        `default` stays the one it was, with the number it had, whether it is among them or not.
        """
        space = copy.copy(self)
        vars(space).pop("_by_positions", None)
        vars(space)["_architectures"] = tuple(
            Architecture(index, a.pool_positions, a.stage_depths) for index, a in enumerate(architectures)
        )
        return space

    def resized(self, image_size: int) -> SearchSpace:
        """The same space for images of `image_size` pixels on a side, a multiple of `total_stride`: MACs and maps are
        theirs.
        """
        space = copy.copy(self)
        space.image_size = self._checked_size(image_size)
        return space

    def _checked_size(self, image_size: int) -> int:
        if image_size < 1 or image_size % self.total_stride:
            raise InputError(
                f"image_size must be a positive multiple of the total stride {self.total_stride}; got {image_size}"
            )
        return int(image_size)

    def __len__(self) -> int:
        return len(self._architectures)

    def __iter__(self) -> Iterator[Architecture]:
        return iter(self._architectures)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence's two overloads say no more than this
        return self._architectures[index]

    def __contains__(self, architecture: object) -> bool:
        if not isinstance(architecture, Architecture) or not 0 <= architecture.index < len(self):
            return False
        return self._architectures[architecture.index] == architecture

    def __repr__(self) -> str:
        shape = f"L={self.num_layers}, p={self.num_pools}, pool={self.pool!r}"
        return f"SearchSpace({self.name!r}, {len(self)} architectures, {shape})"

    def find(self, stage_depths: Sequence[int] | str) -> Architecture:
        """The architecture with these stage depths, given as numbers or as `4,3,3`, `4-3-3` or `[4,3,3]`."""
        depths = parse_stage_depths(stage_depths) if isinstance(stage_depths, str) else tuple(stage_depths)
        positions = tuple(sum(depths[: stage + 1]) for stage in range(len(depths) - 1))
        if len(depths) != self.num_pools + 1 or min(depths) < 1 or sum(depths) != self.num_layers:
            raise InputError(
                f"architecture {depths} is not in {self.name}: expected {self.num_pools + 1} stage depths "
                f"of at least 1 that sum to {self.num_layers}"
            )
        if positions not in self._by_positions:
            raise InputError(f"architecture {depths} is not among the {len(self)} of {self.name} that are left")
        return self._by_positions[positions]

    def check(self, architecture: Architecture) -> None:
        """Raise InputError unless `architecture` belongs to this space."""
        if architecture not in self:
            raise InputError(f"architecture {architecture} (index {architecture.index}) is not in {self.name}")

    # Layers, maps, cost. ----------------------------------------------------------------------------------------------

    @property
    def total_stride(self) -> int:
        """Image height and width must be multiples of this."""
        return 2**self.num_pools * (LARGE_STEM_STRIDE if self.stem == "large" else 1)

    @property
    def stem_width(self) -> int:
        return self.widths[0]

    @property
    def out_channels(self) -> int:
        """Channels that reach the linear head."""
        return self.layers[-1].out_channels

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The L layers, without a large stem. A small stem has 0 input channels: the images' are not known here."""
        layers: list[Layer] = []
        channels = self.stem_width
        main: tuple[Convolution, ...]
        for index, width in enumerate(self.widths):
            if index == 0 and self.stem == "small":
                layers.append(Layer("stem", (Convolution("conv", 0, width, 3, "at"),), None))
                continue
            if self.block == "basic":
                out = width
                main = (
                    Convolution("conv1", channels, width, 3, "at"),
                    Convolution("conv2", width, width, 3, "after"),
                )
            else:
                out = BOTTLENECK_EXPANSION * width
                main = (
                    Convolution("conv1", channels, width, 1, "before"),
                    Convolution("conv2", width, width, 3, "at"),
                    Convolution("conv3", width, out, 1, "after"),
                )
            shortcut = None if channels == out else Convolution("shortcut", channels, out, 1, "at")
            layers.append(Layer(self.block, main, shortcut))
            channels = out
        return tuple(layers)

    def map_sizes(self, architecture: Architecture, image_size: int | None = None) -> tuple[int, ...]:
        """Height (= width) of each layer's output map, in pixels."""
        size = (image_size or self.image_size) // (LARGE_STEM_STRIDE if self.stem == "large" else 1)
        sizes = []
        for layer in range(self.num_layers):
            size //= 2 if layer in architecture.pool_positions else 1
            sizes.append(size)
        return tuple(sizes)

    def macs(self, architecture: Architecture, *, num_classes: int = 10, in_channels: int = 3) -> int:
        """Multiply-accumulates of convolutions and linear head for one image of `image_size`."""
        total = self.out_channels * num_classes
        if self.stem == "large":
            total += in_channels * self.stem_width * 49 * (self.image_size // 2) ** 2
        size = self.image_size // (LARGE_STEM_STRIDE if self.stem == "large" else 1)
        for layer, out_size in zip(self.layers, self.map_sizes(architecture), strict=True):
            for conv in layer.convolutions:
                pixels = (size if conv.stage == "before" and self.pool == "stride" else out_size) ** 2
                weights = conv.num_weights or in_channels * conv.out_channels * conv.kernel**2
                total += weights * pixels
            size = out_size
        return total

    def num_parameters(self, *, num_classes: int = 10, in_channels: int = 3, affine: bool = True) -> int:
        """Parameters of every architecture alike; `affine` counts a scale and a shift for each BatchNorm channel."""
        total = (self.out_channels + 1) * num_classes
        if self.stem == "large":
            total += in_channels * self.stem_width * 49 + 2 * affine * self.stem_width
        for conv in (conv for layer in self.layers for conv in layer.convolutions):
            total += conv.num_weights or in_channels * conv.out_channels * conv.kernel**2
            total += 2 * affine * conv.out_channels
        return total

    # The prefix tree. -------------------------------------------------------------------------------------------------

    def prefix_tree(self, architectures: Sequence[Architecture] | None = None) -> tuple[tuple[State, ...], ...]:
        """States of each layer that these architectures (None: all) pass through; the same poolings so far: one state.

        Returns one tuple of states a layer, ordered by number of poolings and then lexicographically, so that states of
        one resolution stand together. The last layer's states are the architectures themselves.
        """
        waves: list[tuple[State, ...]] = []
        places: dict[tuple[int, ...], int] = {}
        for layer in range(self.num_layers):
            histories = {
                tuple(p for p in a.pool_positions if p <= layer)
                for a in (self if architectures is None else architectures)
            }
            ordered = sorted(histories, key=lambda history: (len(history), history))
            parents = [places[tuple(p for p in h if p < layer)] if layer else -1 for h in ordered]
            waves.append(tuple(State(layer, h, parent) for h, parent in zip(ordered, parents, strict=True)))
            places = {history: place for place, history in enumerate(ordered)}
        return tuple(waves)


@dataclass(frozen=True, slots=True)
class _Named:
    widths: tuple[int, ...]
    default: tuple[int, ...]
    block: BlockKind
    stem: StemKind
    pool: PoolKind
    image_size: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `SearchSpace`, but for its name."""
        return {"num_layers": len(self.widths), "num_pools": len(self.default) - 1, **asdict(self)}


def _repeat(*pairs: tuple[int, int]) -> tuple[int, ...]:
    return tuple(width for width, times in pairs for _ in range(times))


_NAMED = {
    "resnet14-cifar10": _Named(_repeat((16, 3), (32, 2), (64, 2)), (3, 2, 2), "basic", "small", "max", 32),
    "resnet20-cifar10": _Named(_repeat((16, 4), (32, 3), (64, 3)), (4, 3, 3), "basic", "small", "max", 32),
    "resnet18-cifar10": _Named(
        _repeat((64, 3), (128, 2), (256, 2), (512, 2)), (3, 2, 2, 2), "basic", "small", "stride", 32
    ),
    "resnet50-cifar100": _Named(
        _repeat((64, 4), (128, 4), (256, 6), (512, 3)), (4, 4, 6, 3), "bottleneck", "small", "stride", 32
    ),
    "resnet50-food101": _Named(
        _repeat((64, 3), (128, 4), (256, 6), (512, 3)), (3, 4, 6, 3), "bottleneck", "large", "stride", 224
    ),
    "resnet18-imagenet": _Named(
        _repeat((64, 2), (128, 2), (256, 2), (512, 2)), (2, 2, 2, 2), "basic", "large", "stride", 224
    ),
}
SPACES = tuple(_NAMED)
