"""`run_interference`: what training two architectures in one supernet does to each of them.

Source: Javan et al. 2023, figure 1: one supernet trained on an architecture that pools early, one on an architecture
that pools late, one on both in turn.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from bmsn.checkpoint import environment
from bmsn.config import Procedure
from bmsn.data import (
    BatchStream,
    ImageDataset,
    normalisation,
    normalisation_table,
    normalise,
    open_dataset,
    split_halves,
)
from bmsn.data.readers import GIVEN, split_spec
from bmsn.errors import InputError, RunStopped
from bmsn.evaluator import score_architectures
from bmsn.field_types import check_types
from bmsn.network import SupernetMixture
from bmsn.ops.norm_relu import norm_relu
from bmsn.rng import generator, torch_seed
from bmsn.space import Architecture, SearchSpace
from bmsn.trainer import compute_dtype, learning_rate, out_of_memory_said, resolve_device, train_step

_log = logging.getLogger(__name__)

NETS = ("early", "late", "alternating")
_NUM_POINTS = 8  # at which accuracies are measured, after the first at step 0
_NUM_SCORED = 1024  # validation images at each of them; all at the last


@dataclass(frozen=True, kw_only=True)
class InterferenceConfig:
    """Settings of an interference experiment.

    Attributes:
        space: name of a search space; None: resnet14-cifar10 on synthetic data, else required.
        data: images as scheme:path; None: synthetic, or those that `run_interference` is given.
        early: stage depths of the architecture that pools early; None: the one that pools earliest.
        late: of the one that pools late; None: the one that pools latest.
        epochs: of training on each architecture; the alternating supernet has as many on each of the two.
        batch_size: images in a batch.
        lr: learning rate at the start of a cosine.
        min_lr: at its end.
        momentum: of SGD.
        weight_decay: of SGD, on every parameter.
        device: where to compute; auto: CUDA where there is a GPU.
        seed: of everything random.
    """

    space: str | None = None
    data: str | None = None
    early: str | None = None
    late: str | None = None
    epochs: int = 6
    batch_size: int = 128
    lr: float = 0.1
    min_lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        bounds: dict[str, tuple[float, float]] = {
            "epochs": (1, 10**6), "batch_size": (2, 10**6), "lr": (0, 100), "min_lr": (0, 100), "momentum": (0, 1),
            "weight_decay": (0, 1), "seed": (0, 2**63 - 1),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be in [{low}, {high}]; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Interference:
    """What three supernets became that began with the same weights. Order of nets: `NETS`.

    Attributes:
        architectures: the early and the late one.
        steps: (P,) updates on each architecture after which accuracies were measured: 0 first.
        accuracy: (P, 3, 2) in [0, 1], of each net with each architecture on validation images: the last on all of them,
            those before on `num_scored`.
        filters: (4, O, C, kh, kw) of the first convolution: at the start, then of each net.
        features: (4, O, H, W) of `image` behind the first layer, in the same order.
        image: (H, W, C) uint8, a validation image.
        config, environment, data: to reproduce it. seconds: that training and scoring took.
    """

    architectures: tuple[Architecture, Architecture]
    steps: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    num_scored: int
    num_validation: int
    filters: NDArray[np.float32]
    features: NDArray[np.float32]
    image: NDArray[np.uint8]
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    seconds: float


def run_interference(config: InterferenceConfig, data: ImageDataset | None = None) -> Interference:
    """Trains one supernet on an early-pooling architecture, one on a late-pooling one, and one on both in turn.

    All three begin with the same weights and see the same number of updates on an architecture: the alternating
    supernet has twice as many in all, so what it lacks is not for want of training. Batches come in the same order.

    Source: Javan et al. 2023, figure 1.

        >>> from bmsn.interference import InterferenceConfig, run_interference
        >>> result = run_interference(
        ...     InterferenceConfig(space="resnet14-cifar10", data="npz:images.npz", epochs=1, batch_size=16)
        ... )
        >>> print(*result.architectures, result.accuracy.shape)  # points in time, supernets, architectures
        [1,1,5] [5,1,1] (5, 3, 2)

    Args:
        config: settings.
        data: the images; None: what `config.data` names.
    Raises:
        InputError: settings that do not fit the space or the data.
        RunStopped: a loss that is not finite, or no memory left.
    """
    spec = config.data
    if spec is None:
        spec = "synthetic" if data is None else f"{GIVEN}:{data.name}"
    synthetic = split_spec(spec)[0] == "synthetic"
    name = config.space or ("resnet14-cifar10" if synthetic else None)
    if name is None:
        raise InputError(f"space must be given for data {spec!r} (only synthetic data has a default one)")
    space = SearchSpace.named(name)
    pair = _pair(space, config)
    if data is None:
        resizes = split_spec(spec)[0] in ("parquet", "folder")
        data = open_dataset(spec, image_size=space.image_size if resizes else None)
    if data.image_size % space.total_stride:
        raise InputError(
            f"data {spec}: images of {data.image_size} pixels; {name} needs a multiple of {space.total_stride}"
        )
    settings = replace(config, space=name, data=spec)
    with out_of_memory_said(lambda: "interference", resolve_device(config.device)):
        return _alone_and_in_turn(settings, space, pair, data)


def _alone_and_in_turn(
    config: InterferenceConfig, space: SearchSpace, pair: tuple[Architecture, Architecture], data: ImageDataset
) -> Interference:
    started = time.perf_counter()
    nets, stream, validation = _prepare(config, space, data)
    device, dtype = nets.arena.device, stream.dtype
    images = normalise(data.train_images, nets.pixel_table, dtype, indices=validation).to(device)
    labels = torch.from_numpy(data.train_labels[validation])
    start = nets.arena.detach()[:1].clone()
    velocity = torch.zeros_like(nets.arena.detach())

    def train(net: int, architecture: Architecture, batch: int, progress: float) -> None:
        loss = train_step(
            nets, velocity, architecture, net, *(t.to(device) for t in stream.batch(batch)),
            lr=learning_rate(progress, config.lr, config.min_lr, Procedure()), momentum=config.momentum,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        if not math.isfinite(loss):
            raise RunStopped(f"the loss of {architecture} is not finite; a lower lr may help (now {config.lr})")

    def measure(count: int) -> list[float]:
        pairs = [(architecture, net) for net in range(len(NETS)) for architecture in pair]
        return score_architectures(nets, images[:count], labels[:count], pairs).accuracy.tolist()

    num_steps = config.epochs * stream.steps_per_epoch
    points = sorted({round(k * num_steps / _NUM_POINTS) for k in range(_NUM_POINTS + 1)})
    measured = [measure(_NUM_SCORED)]
    for step in range(num_steps):
        progress = step / num_steps
        for net, architecture in enumerate(pair):
            train(net, architecture, step, progress)
            train(NETS.index("alternating"), architecture, 2 * step + net, progress)
        if step + 1 in points:
            measured.append(measure(len(images) if step + 1 == num_steps else _NUM_SCORED))
            _log.info("step %d of %d, %.0f s", step + 1, num_steps, time.perf_counter() - started)
    rows = torch.cat([start, nets.arena.detach()])
    return Interference(
        architectures=pair,
        steps=np.array(points),
        accuracy=np.array(measured).reshape(len(points), len(NETS), 2),
        num_scored=min(_NUM_SCORED, len(images)),
        num_validation=len(images),
        filters=_first_weights(nets, rows).float().cpu().numpy(),
        features=_first_features(nets, rows, images[: config.batch_size]),
        image=data.train_images[validation[0]],
        config=asdict(config) | {"early": pair[0].slug, "late": pair[1].slug},
        environment=environment(device.type) | {"compute_dtype": str(dtype).removeprefix("torch.")},
        data={"name": data.name, "fingerprint": data.fingerprint, "num_train": len(stream.indices)},
        seconds=time.perf_counter() - started,
    )


def _pair(space: SearchSpace, config: InterferenceConfig) -> tuple[Architecture, Architecture]:
    """The two architectures; in lexicographic order the first pools earliest and the last latest."""
    early = space[0] if config.early is None else space.find(config.early)
    late = space[-1] if config.late is None else space.find(config.late)
    if early == late:
        raise InputError(f"early and late must be two architectures; both are {early}")
    return early, late


def _prepare(
    config: InterferenceConfig, space: SearchSpace, data: ImageDataset
) -> tuple[SupernetMixture, BatchStream, NDArray[np.int64]]:
    """Three supernets with the same weights, training batches, and the indices of the validation half, shuffled."""
    device = resolve_device(config.device)
    train, validation = split_halves(data.train_labels, config.seed)
    table = normalisation_table(*normalisation(data.train_images, train))
    stream = BatchStream(
        data.train_images, data.train_labels, train, table,
        batch_size=config.batch_size, dtype=compute_dtype(device), seed=config.seed, purpose="train", augment=True,
    )  # fmt: skip
    weights = torch.Generator().manual_seed(torch_seed(config.seed, "weights"))
    nets = SupernetMixture(space, len(NETS), data.num_classes, data.in_channels, generator=weights)
    with torch.no_grad():
        nets.arena.copy_(nets.arena[:1].expand_as(nets.arena).clone())
    nets.pixel_table = table
    order = generator(config.seed, "interference/order").permutation(len(validation))
    return nets.to(device), stream, validation[order]


def _first_weights(nets: SupernetMixture, rows: torch.Tensor) -> torch.Tensor:
    """(R, O, C, kh, kw): the first convolution of each of R rows of weights."""
    weights = nets.weights(rows, torch.float32)
    return weights.layers[0]["conv"] if weights.stem is None else weights.stem


@torch.no_grad()
def _first_features(nets: SupernetMixture, rows: torch.Tensor, images: torch.Tensor) -> NDArray[np.float32]:
    """(R, O, H, W): the first image's map behind convolution, BatchNorm over all `images`, and ReLU."""
    large = nets.space.stem == "large"
    maps = []
    for weight in _first_weights(nets, rows):
        convolved = F.conv2d(images.float(), weight, stride=2 if large else 1, padding=weight.shape[-1] // 2)
        maps.append(norm_relu(convolved.contiguous(memory_format=torch.channels_last))[0].cpu())
    return torch.stack(maps).numpy()
