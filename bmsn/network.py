"""The networks: `SupernetMixture`, M sets of weights shared by a space's architectures, and `build_network`, one alone.

Source: Javan et al. 2023, sections 2 and 3; He et al. 2016 for the blocks. A supernet's BatchNorm uses batch statistics
without an affine step, in training and in scoring; a standalone network has affine BatchNorm with running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmsn.errors import InputError
from bmsn.ops.conv2d import measured_conv2d, normed_conv2d
from bmsn.ops.norm_relu import Pool, norm_add_relu, norm_relu
from bmsn.paths import ResolutionPath, architecture_path, check_path
from bmsn.space import Architecture, Convolution, Layer, PoolKind, SearchSpace


@dataclass(frozen=True, slots=True)
class Weights:
    """Views of one supernet's row: `stem` (large stems only), `layers[l][name]`, and the linear head in float32."""

    stem: Tensor | None
    layers: tuple[dict[str, Tensor], ...]
    head_weight: Tensor
    head_bias: Tensor


class SupernetMixture(nn.Module):
    """M supernets of one space: weight sharing between architectures within a supernet, none between supernets.

    All weights are the rows of one parameter `arena` (M, P), float32: for each convolution its weights in (O, kh, kw,
    I) order, which is a channels_last (O, I, kh, kw) tensor, then the linear head's weights and bias. Views are made on
    the way, so `.to()`, `deepcopy`, `state_dict` and pickling cannot part them from the arena. After `loss.backward()`
    the gradient of supernet m is `arena.grad[m]`.

    `pixel_table` (256, C) float32 says what a uint8 pixel of each channel is after normalisation: [0, 1] until it is
    set. It is data and no weight: saved with the module's state, not touched by `.to()`.

    Args:
        space: the architectures.
        num_supernets: M, at least 1.
        num_classes: outputs of the head, at least 2.
        in_channels: channels of the images.
        generator: draws the initial weights (Kaiming normal, fan-out; the head as `nn.Linear`); None: torch's default
            one.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_supernets: int,
        num_classes: int,
        in_channels: int = 3,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for field, value, bound in (
            ("num_supernets", num_supernets, 1),
            ("num_classes", num_classes, 2),
            ("in_channels", in_channels, 1),
        ):
            if value < bound:
                raise InputError(f"{field} must be at least {bound}; got {value}")
        self.space, self.num_supernets, self.num_classes, self.in_channels = (
            space,
            num_supernets,
            num_classes,
            in_channels,
        )
        self._conv_shapes = [
            (*shape[:1], in_channels if shape[1] == 0 else shape[1], *shape[2:])
            for shape in ([(space.stem_width, in_channels, 7, 7)] if space.stem == "large" else [])
            + [conv.weight_shape for layer in space.layers for conv in layer.convolutions]
        ]
        self._sizes = [o * i * kh * kw for o, i, kh, kw in self._conv_shapes]
        self._num_conv_weights = sum(self._sizes)
        num_weights = self._num_conv_weights + (space.out_channels + 1) * num_classes
        self.arena = nn.Parameter(torch.empty(num_supernets, num_weights))
        self.pixel_table = torch.linspace(0, 1, 256)[:, None].repeat(1, in_channels)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, supernet by supernet."""
        for supernet in range(self.num_supernets):
            convs, head = self.arena[supernet].split(self.part_sizes)
            for flat, (out_channels, _, kh, kw) in zip(convs.split(self._sizes), self._conv_shapes, strict=True):
                flat.normal_(0.0, (2.0 / (out_channels * kh * kw)) ** 0.5, generator=generator)
            bound = self.space.out_channels**-0.5
            head.uniform_(-bound, bound, generator=generator)

    def get_extra_state(self) -> Tensor:
        return self.pixel_table

    def set_extra_state(self, state: Tensor) -> None:
        self.pixel_table = state

    @property
    def layer_columns(self) -> tuple[slice, ...]:
        """Columns of `arena` with the convolutions of each layer; a large stem's come before, the head's after them."""
        sizes, stop = iter(self._sizes), self._sizes[0] if self.space.stem == "large" else 0
        if stop:
            next(sizes)
        columns = []
        for layer in self.space.layers:
            start, stop = stop, stop + sum(next(sizes) for _ in layer.convolutions)
            columns.append(slice(start, stop))
        return tuple(columns)

    def weights(self, row: Tensor, dtype: torch.dtype) -> Weights:
        """Views of one arena row (P,): convolutions in `dtype`, the head in the wider of `dtype` and float32.

        Of several rows (S, P) the views have S in front.
        """
        convs, head = row.split(self.part_sizes, -1)
        return self.views(convs.to(dtype), head.to(torch.promote_types(dtype, torch.float32)))

    @property
    def part_sizes(self) -> tuple[int, int]:
        """How many of a row's P weights are those of convolutions, which come first, and of the head."""
        return self._num_conv_weights, self.arena.shape[1] - self._num_conv_weights

    def views(self, convs: Tensor, head: Tensor) -> Weights:
        """The two parts of a row (P,), or of several (S, P), each in its own dtype, as `weights`."""
        rows = convs.shape[:-1]
        shaped = iter(
            [
                w.view(*rows, o, kh, kw, i).movedim(-1, -3)
                for w, (o, i, kh, kw) in zip(convs.split(self._sizes, -1), self._conv_shapes, strict=True)
            ]
        )
        stem = next(shaped) if self.space.stem == "large" else None
        layers = tuple({conv.name: next(shaped) for conv in layer.convolutions} for layer in self.space.layers)
        matrix, bias = head.split([self.space.out_channels * self.num_classes, self.num_classes], -1)
        return Weights(stem, layers, matrix.view(*rows, self.num_classes, -1), bias)

    def check(self, architecture: Architecture, supernet: int) -> None:
        """Raise InputError unless the pair is there. Another space's architecture would run as well."""
        self.space.check(architecture)
        if not 0 <= supernet < self.num_supernets:
            raise InputError(f"supernet must be in 0..{self.num_supernets - 1}; got {supernet}")

    def forward(self, images: Tensor, architecture: Architecture, supernet: int) -> Tensor:
        """Logits of one batch, which is one statistics group.

        Args:
            images: (N, C, H, W), normalised, float32, bfloat16 or float64: the dtype of the computation. N*H*W of the
                last map is at least 2; H and W are multiples of `space.total_stride`.
            architecture: one of the space's.
            supernet: weight set, 0..M-1.
        Returns:
            (N, num_classes), float32 (float64 for float64 images).
        Raises:
            InputError: an architecture or supernet that is not there, or images that do not fit.
        """
        self.check(architecture, supernet)
        check_images(self, images)
        return self.forward_row(
            self.arena[supernet], images.contiguous(memory_format=torch.channels_last), architecture
        )

    def forward_row(self, row: Tensor, images: Tensor, architecture: Architecture) -> Tensor:
        """`forward` with the weights of one row (P,), unchecked; `images` in channels_last."""
        return self.forward_weights(self.weights(row, images.dtype), images, architecture)

    def forward_weights(self, weights: Weights, images: Tensor, architecture: Architecture) -> Tensor:
        """`forward_row` with views that are there already."""
        x = run_stem(images, weights)
        strides, positions = self.space.pool == "stride", architecture.pool_positions
        for index, (layer, w) in enumerate(zip(self.space.layers, weights.layers, strict=True)):
            # A pooling before the next layer ends this one: one sweep instead of three.
            pool = self.space.pool if self.space.pool != "stride" and index + 1 in positions else None
            x = run_layer(x, layer, w, stride=1 + (strides and index in positions), pool=pool)
        return run_head(x, weights)


def check_images(mixture: SupernetMixture, images: Tensor) -> None:
    """Raise InputError unless `images` are (N, C, H, W) that this mixture can compute."""
    if images.ndim != 4 or images.shape[1] != mixture.in_channels:
        raise InputError(f"images must be (N, {mixture.in_channels}, H, W); got {tuple(images.shape)}")
    stride = mixture.space.total_stride
    if images.shape[2] % stride or images.shape[3] % stride or 0 in images.shape:
        raise InputError(
            f"images must be non-empty and their height and width multiples of the total stride {stride}; "
            f"got {tuple(images.shape)}"
        )
    if images.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise InputError(f"images must be float32, bfloat16 or float64; got {images.dtype}")
    check_group(mixture.space, images.shape[0], images.shape[2], images.shape[3])


def check_group(space: SearchSpace, num_images: int, height: int, width: int) -> None:
    """Raise InputError unless so many images of that size are enough for batch statistics of every layer."""
    pixels = num_images * (height // space.total_stride) * (width // space.total_stride)
    if pixels < 2:
        raise InputError(
            f"a statistics group needs at least 2 values a channel; the last map of {num_images} images has {pixels}"
        )


class Norm(Protocol):
    """What comes behind the convolutions of a layer, one after the other: BatchNorm, shortcut, ReLU, pooling."""

    def __call__(
        self,
        x: Tensor,
        shortcut: Tensor | None = None,
        *,
        normalise_shortcut: bool = False,
        stats: Tensor | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        """As `bmsn.ops.norm_relu.norm_add_relu`; without a shortcut as `norm_relu`."""


def supernet_norm(
    x: Tensor,
    shortcut: Tensor | None = None,
    *,
    normalise_shortcut: bool = False,
    stats: Tensor | None = None,
    pool: Pool | None = None,
) -> Tensor:
    """That of a supernet, without an affine step, on one statistics group."""
    if shortcut is None:
        return norm_relu(x, stats=stats, pool=pool)
    return norm_add_relu(x, shortcut, normalise_shortcut=normalise_shortcut, stats=stats, pool=pool)


def _together(stats: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """(2, 1, C) of each branch as (branches, 2, 1, C), if all are known."""
    known = [of_branch for of_branch in (stats, *others) if of_branch is not None]
    return torch.stack(known) if len(known) == 1 + len(others) else None


def run_stem(images: Tensor, weights: Weights, norm: Norm = supernet_norm) -> Tensor:
    """What comes before layer 0: nothing, or a large stem."""
    if weights.stem is None:
        return images
    return F.max_pool2d(norm(measured_conv2d(images, weights.stem, stride=2)[0]), 3, 2, 1)


def run_layer(
    x: Tensor,
    layer: Layer,
    weights: dict[str, Tensor],
    *,
    stride: int = 1,
    pool: Pool | None = None,
    norm: Norm = supernet_norm,
) -> Tensor:
    """One layer with the convolutions `weights[name]`, and the pooling behind it if the next layer has one."""
    y, stats = x, None
    for conv in layer.main:
        weight, by = weights[conv.name], stride if conv.stage == "at" else 1
        if conv is not layer.main[0] and norm is supernet_norm:
            y, stats = normed_conv2d(y, weight, stats=stats, stride=by)
        else:
            y = y if conv is layer.main[0] else norm(y, stats=_together(stats))
            y, stats = measured_conv2d(y, weight, stride=by)
    if layer.kind == "stem":
        return norm(y, stats=_together(stats), pool=pool)
    if layer.shortcut is not None:
        x, of_x = measured_conv2d(x, weights["shortcut"], stride=stride)
        return norm(y, x, normalise_shortcut=True, stats=_together(stats, of_x), pool=pool)
    if stride == 2:
        x = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    return norm(y, x, stats=_together(stats), pool=pool)


@torch.no_grad()
def copy_weights(weights: Weights, network: nn.Module) -> None:
    """Puts convolutions and head of one weight set into a network of `build_path_network`, in whose modules they come
    in the order of the layers, a shortcut behind the main path.
    """
    given = [] if weights.stem is None else [weights.stem]
    given += [weight for layer in weights.layers for weight in layer.values()]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for convolution, weight in zip(convolutions, given, strict=True):
        convolution.weight.copy_(weight)
    (head,) = (module for module in network.modules() if isinstance(module, nn.Linear))
    head.weight.copy_(weights.head_weight)
    head.bias.copy_(weights.head_bias)


def resample(x: Tensor, step: int, pool: PoolKind) -> Tensor:
    """x (N, C, H, W) halved `step` times by max- or average-pooling, or doubled -step times by repeating pixels."""
    if step > 0:
        return (F.max_pool2d if pool == "max" else F.avg_pool2d)(x, 2**step)
    return F.interpolate(x, scale_factor=2.0**-step, mode="nearest") if step else x


def run_head(x: Tensor, weights: Weights) -> Tensor:
    """Logits (N, num_classes) from the last layer's map, in the dtype of the head's weights."""
    features = x.mean((2, 3), dtype=weights.head_weight.dtype)
    return F.linear(features, weights.head_weight, weights.head_bias)


# One architecture alone: plain torch, nothing of bmsn inside. ---------------------------------------------------------


def build_network(
    space: SearchSpace, architecture: Architecture, num_classes: int = 10, in_channels: int = 3
) -> nn.Sequential:
    """The standalone network: plain torch modules, affine BatchNorm with running statistics, Kaiming fan-out weights.

    The weights are drawn from torch's global random state, as those of all its modules: `torch.manual_seed` decides
    them.

    Returns:
        A module from images (N, in_channels, H, W) to logits (N, num_classes). Children: `stem` (large stems only),
        `layers` (L of them), `head`.
    Raises:
        InputError: an architecture of another space.
    """
    return build_path_network(space, architecture_path(space, architecture), num_classes, in_channels)


def build_path_network(
    space: SearchSpace, path: ResolutionPath, num_classes: int = 10, in_channels: int = 3
) -> nn.Sequential:
    """`build_network` for any path of resolutions: nearest upsampling before a layer where the path goes up.

    Source: Javan et al. 2023, eq. 4 and 5: the network that is left when each layer keeps one resolution.

    Raises:
        InputError: a path that does not fit the space, see `bmsn.paths.check_path`.
    """
    check_path(space, path)
    layers: list[nn.Module] = []
    for layer, step in zip(space.layers, path.steps, strict=True):
        block: nn.Module
        if layer.kind == "stem":
            block = _conv_norm(layer.main[0], 1, in_channels).append(nn.ReLU(inplace=True))
        else:
            block = ResidualBlock(layer, space.pool == "stride" and step == 1)
        if step < 0:
            block = nn.Sequential(nn.Upsample(scale_factor=2**-step, mode="nearest"), block)
        elif step > 0 and space.pool != "stride":
            kind = nn.MaxPool2d if space.pool == "max" else nn.AvgPool2d
            block = nn.Sequential(kind(2**step), block)
        layers.append(block)
    network = nn.Sequential()
    if space.stem == "large":
        width = space.stem_width
        conv = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        network.add_module(
            "stem", nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        )
    network.add_module("layers", nn.Sequential(*layers))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(space.out_channels, num_classes))
    network.add_module("head", head)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class ResidualBlock(nn.Module):
    """Basic block or bottleneck with affine BatchNorm; an identity shortcut that strides subsamples, no parameters."""

    def __init__(self, layer: Layer, strides: bool) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for conv in layer.main:
            steps += [*_conv_norm(conv, 2 if strides and conv.stage == "at" else 1), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*steps[:-1])
        self.shortcut = None if layer.shortcut is None else _conv_norm(layer.shortcut, 2 if strides else 1)
        self.strides = strides

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x[:, :, ::2, ::2] if self.strides else x
        return F.relu(self.main(x) + shortcut)


def _conv_norm(conv: Convolution, stride: int, in_channels: int = 0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            conv.in_channels or in_channels,
            conv.out_channels,
            conv.kernel,
            stride=stride,
            padding=conv.kernel // 2,
            bias=False,
        ),
        nn.BatchNorm2d(conv.out_channels),
    )
