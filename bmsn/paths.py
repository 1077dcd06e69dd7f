"""Resolution paths: at which resolution each layer works, going up as well as down. Knows nothing of torch.

An architecture of a space is a path that only goes down, one halving at a time. Methods with weights for each (layer,
resolution) or with a choice of resolution at each layer walk all R^(L-1) paths, R = number of poolings + 1.

Source: Javan et al. 2023, section 2.2 (19,683 paths of ResNet-20) and eq. 4 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bmsn.errors import InputError
from bmsn.space import LARGE_STEM_STRIDE, Architecture, SearchSpace


@dataclass(frozen=True, slots=True)
class ResolutionPath:
    """One resolution a layer: r stands for maps of 1 / 2^r of the height and width of layer 0, where r is 0."""

    resolutions: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join(map(str, self.resolutions))

    @property
    def slug(self) -> str:
        """For file names and the like; no architecture has it: those never begin with 0."""
        return str(self)

    @property
    def steps(self) -> tuple[int, ...]:
        """Before each layer: how many times its input is halved, or with a minus sign doubled."""
        return tuple(after - before for before, after in zip((0, *self.resolutions), self.resolutions, strict=False))


# What a search finds and a network alone is trained for.
Candidate = Architecture | ResolutionPath


def num_resolutions(space: SearchSpace) -> int:
    """R: those that the space's architectures reach."""
    return space.num_pools + 1


def num_paths(space: SearchSpace) -> int:
    """R^(L-1): layer 0 stays at full resolution."""
    return num_resolutions(space) ** (space.num_layers - 1)


def architecture_path(space: SearchSpace, architecture: Architecture) -> ResolutionPath:
    """The path of an architecture: the number of poolings up to each layer."""
    space.check(architecture)
    pools = (layer in architecture.pool_positions for layer in range(space.num_layers))
    return ResolutionPath(tuple(accumulate(pools, initial=0))[1:])


def path_architecture(space: SearchSpace, path: ResolutionPath) -> Architecture | None:
    """The architecture whose path this is; None: it is outside the space."""
    check_path(space, path)
    depths = [path.resolutions.count(r) for r in range(num_resolutions(space))]
    if min(depths) < 1 or min(path.steps) < 0:
        return None
    return space.find(depths)


def as_path(space: SearchSpace, candidate: Candidate) -> ResolutionPath:
    """A path as it is, an architecture as its path."""
    return candidate if isinstance(candidate, ResolutionPath) else architecture_path(space, candidate)


def path_by_index(space: SearchSpace, index: int) -> ResolutionPath:
    """The path at `index` in 0..num_paths-1, in lexicographic order of the resolutions."""
    if not 0 <= index < num_paths(space):
        raise InputError(f"index must be in 0..{num_paths(space) - 1}, the paths of {space.name}; got {index}")
    digits = []
    for _ in range(space.num_layers - 1):
        index, digit = divmod(index, num_resolutions(space))
        digits.append(digit)
    return ResolutionPath((0, *reversed(digits)))


def parse_path(space: SearchSpace, text: str) -> ResolutionPath:
    """`0-0-1-2-1` (or with commas) as a path of the space. Raises InputError for anything else."""
    if not re.fullmatch(r"\d+([,-]\d+)*", text.strip()):
        raise InputError(f"path {text!r}: expected one resolution a layer, such as 0-0-1-2-1")
    path = ResolutionPath(tuple(int(number) for number in re.findall(r"\d+", text)))
    check_path(space, path)
    return path


def find_candidate(space: SearchSpace, text: str) -> Candidate:
    """What `4-3-3` or `0-0-1-2-1` names: stage depths never begin with 0. The path of an architecture is that one."""
    if not text.strip().startswith("0"):
        return space.find(text)
    path = parse_path(space, text)
    return path_architecture(space, path) or path


def check_path(space: SearchSpace, path: ResolutionPath) -> None:
    """Raise InputError unless a network of `space` can follow `path`.

    A stride is part of a layer: it halves once, and nothing undoes it. With pool="stride" a path may only go down, one
    halving at a time.
    """
    found, highest = path.resolutions, space.num_pools
    if len(found) != space.num_layers or found[0] != 0 or not all(0 <= r <= highest for r in found):
        raise InputError(
            f"path {path} does not fit {space.name}: expected {space.num_layers} resolutions in 0..{highest}, "
            "the first of them 0"
        )
    if space.pool == "stride" and not all(step in (0, 1) for step in path.steps):
        raise InputError(
            f"pool must be max or avg for the path {path}, which goes up or down by more than one halving; got stride"
        )


def check_resolutions(space: SearchSpace, what: str) -> None:
    """Raise InputError unless every layer of `space` may work at every resolution, whatever that of the layer before;
    `what` says who asks.
    """
    if space.pool == "stride":
        raise InputError(
            f"pool must be max or avg for {what}, which goes up as well as down; got stride, as {space.name} has it "
            "unless pool is given"
        )


# Cost. ----------------------------------------------------------------------------------------------------------------


def layer_macs(space: SearchSpace, layer: int, resolution: int, *, in_channels: int = 3, strides: bool = False) -> int:
    """Multiply-accumulates of one layer at one resolution for one image of `image_size`.

    Args:
        space: the layer's.
        layer: its index.
        resolution: of its output.
        in_channels: of the images: a small stem's convolution is layer 0.
        strides: whether the layer itself halves its input.
    """
    full = space.image_size // (LARGE_STEM_STRIDE if space.stem == "large" else 1)
    total = 0
    for conv in space.layers[layer].convolutions:
        side = full // 2 ** (resolution - (strides and conv.stage == "before"))
        total += (conv.num_weights or in_channels * conv.out_channels * conv.kernel**2) * side**2
    return total


def path_macs(space: SearchSpace, path: ResolutionPath, *, num_classes: int = 10, in_channels: int = 3) -> int:
    """Multiply-accumulates of convolutions and linear head for one image; an architecture's path has its `macs`."""
    check_path(space, path)
    strides = [space.pool == "stride" and step == 1 for step in path.steps]
    layers = sum(
        layer_macs(space, layer, r, in_channels=in_channels, strides=strides[layer])
        for layer, r in enumerate(path.resolutions)
    )
    return layers + outside_macs(space, num_classes=num_classes, in_channels=in_channels)


def mixed_macs(space: SearchSpace, *, num_classes: int = 10, in_channels: int = 3) -> int:
    """Multiply-accumulates for one image where every layer but the first works at all resolutions (eq. 4)."""
    resolutions: list[Sequence[int]] = [range(1), *[range(num_resolutions(space))] * (space.num_layers - 1)]
    layers = sum(layer_macs(space, i, r, in_channels=in_channels) for i, found in enumerate(resolutions) for r in found)
    return layers + outside_macs(space, num_classes=num_classes, in_channels=in_channels)


def outside_macs(space: SearchSpace, *, num_classes: int = 10, in_channels: int = 3) -> int:
    """Multiply-accumulates of the linear head and of a large stem, for one image."""
    stem = in_channels * space.stem_width * 49 * (space.image_size // 2) ** 2 if space.stem == "large" else 0
    return stem + space.out_channels * num_classes
