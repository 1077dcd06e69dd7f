"""Trains one architecture alone, from scratch: the engine of ground truth and of retraining.

Source: Javan et al. 2023, section 3: SGD with momentum 0.9 and weight decay 1e-3, cosine learning rate, crop and flip.
The test accuracy is that of the last epoch, on all test images: choosing the best epoch would fit the test set.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from bmsn.config import Procedure
from bmsn.data import BatchStream, ImageDataset, normalisation, normalisation_table, normalise
from bmsn.engine import GraphMemoryError, choose_engine, graph_backend
from bmsn.engine_mixture import image_device
from bmsn.errors import InputError, RunStopped
from bmsn.field_types import check_types
from bmsn.fused_network import FusedNetwork
from bmsn.network import build_path_network
from bmsn.paths import Candidate, as_path, check_path
from bmsn.rng import torch_seed
from bmsn.space import SearchSpace
from bmsn.trainer import arena_step, compute_dtype, learning_rate, out_of_memory_said

_log = logging.getLogger(__name__)

CHECK_EVERY = 25  # steps from one look at the loss to the next: on a GPU each look waits for all work before it
_TEST_BATCH = 500  # images: bounds memory, changes no accuracy


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a network is trained alone.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in a training batch; those that don't fill one are left out of their epoch.
        lr: learning rate at the start.
        min_lr: learning rate at the end of the cosine.
        momentum: of SGD, without Nesterov.
        weight_decay: of SGD, on every parameter.
        milestones: shares of the training after which the learning rate is multiplied by factor; none: cosine.
        factor: of the learning rate at each milestone.
    """

    epochs: int = 200
    batch_size: int = 256
    lr: float = 0.1
    min_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-3
    milestones: tuple[float, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        bounds: dict[str, tuple[float, float]] = {
            "epochs": (1, 10**6),
            "batch_size": (2, 10**6),
            "lr": (0, 100),
            "min_lr": (0, self.lr),
            "momentum": (0, 1),
            "weight_decay": (0, 1),
            "factor": (0, 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} must be in [{low}, {high}]; got {value}")
        rising = all(
            before < after for before, after in zip((0.0, *self.milestones), (*self.milestones, 1.0), strict=True)
        )
        if self.milestones and not rising:
            raise InputError(f"milestones must rise, each in (0, 1), a share of the training; got {self.milestones}")

    @property
    def procedure(self) -> Procedure:
        """What `learning_rate` asks for."""
        return Procedure(milestones=self.milestones, factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A network after its last step.

    Attributes:
        network: in evaluation mode, on the device of the training.
        correct, total: test images classified correctly, and all of them.
        loss: mean cross-entropy of the last training batch.
        seconds: of training and testing.
    """

    network: nn.Module
    correct: int
    total: int
    loss: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent."""
        return 100 * self.correct / self.total


def train_alone(
    space: SearchSpace,
    architecture: Candidate,
    data: ImageDataset,
    settings: TrainingSettings,
    *,
    seed: int,
    device: torch.device,
    indices: np.ndarray | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> TrainedNetwork:
    """Trains a network of `build_network` or `build_path_network` and tests it once, at the end.

    In bfloat16 where the device computes it fast, float32 elsewhere; weights, running statistics and SGD are float32.
    The network is trained in its fused form, `bmsn.fused_network`, on a GPU by a CUDA graph of the whole step; what
    comes back is plain. Weights and batches are a function of the seed and the architecture; networks of one seed see
    the same batches. On the CPU the result is bit-exact for the same threads, instruction set and torch version.

    Args:
        space: the architecture's; images are a multiple of its total stride.
        architecture: what to train; a path may lie outside the space.
        data: the images.
        settings: how.
        seed: of weights and batches.
        device: where.
        indices: (N,) int64, of the training images to use, such as one half of `split_halves`; None: all of them.
        progress: called every 25 steps and after the last one with the share of the training that is done.
    Raises:
        InputError: settings, space and data that do not fit, or no test images.
        RunStopped: a loss or a gradient is not finite, or no memory is left.
    """
    check_path(space, as_path(space, architecture))
    check_data(space, data)
    chosen = np.arange(len(data.train_labels)) if indices is None else indices
    with out_of_memory_said(lambda: f"architecture {architecture}, seed {seed}", device):
        return _train(space, architecture, data, settings, seed, device, chosen, progress)


def _train(
    space: SearchSpace,
    architecture: Candidate,
    data: ImageDataset,
    settings: TrainingSettings,
    seed: int,
    device: torch.device,
    chosen: np.ndarray,
    progress: Callable[[float], None],
) -> TrainedNetwork:
    """`train_alone` on the training images `chosen`, unchecked."""
    started = time.perf_counter()
    dtype = compute_dtype(device)
    table = normalisation_table(*normalisation(data.train_images, chosen))
    stream = BatchStream(
        data.train_images, data.train_labels, chosen, table,
        batch_size=settings.batch_size, dtype=dtype, seed=seed, purpose="standalone", augment=True,
        device=image_device(data.train_images.nbytes, device),
    )  # fmt: skip
    network = initial_network(space, architecture, data, seed).to(device)
    num_steps, procedure = settings.epochs * stream.steps_per_epoch, settings.procedure
    rates = [learning_rate(step / num_steps, settings.lr, settings.min_lr, procedure) for step in range(num_steps)]
    start = partial(_Training, space, architecture, network, stream, torch.tensor(rates, device=device), settings)
    training = start()
    enqueue = _recorded(training, stream, start)
    for step in range(num_steps):
        stream.prepare(step)
        enqueue()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == num_steps:
            if not math.isfinite(training.sum_of_losses.item()):  # one was not: its step is lost, others would follow
                raise RunStopped(
                    f"architecture {architecture}, seed {seed}: the loss is not finite at step {step + 1} of "
                    f"{num_steps}; a lower lr may help (now {settings.lr})"
                )
            progress((step + 1) / num_steps)
    training.fused.write_back(num_steps)
    network.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        correct = count_correct(network, data.test_images, data.test_labels, table, dtype, device)
    seconds = time.perf_counter() - started
    return TrainedNetwork(
        network=network, correct=correct, total=len(data.test_labels), loss=training.loss.item(), seconds=seconds
    )


class _Training:
    """A network that is trained and all that a step changes, in tensors; a step waits for nothing.

    Attributes:
        fused: the network; it starts from the weights of `network`, which `fused.write_back` brings up to date.
        loss: (), of the last step; sum_of_losses: (), of all.
    """

    def __init__(
        self,
        space: SearchSpace,
        architecture: Candidate,
        network: nn.Module,
        stream: BatchStream,
        lrs: Tensor,
        settings: TrainingSettings,
    ) -> None:
        self.fused = FusedNetwork(space, as_path(space, architecture), network)
        self._stream, self._lrs, self._settings = stream, lrs, settings
        arena, dtype = self.fused.arena, stream.dtype
        self._velocity, self._copies = torch.zeros_like(arena), arena.to(dtype) if dtype == torch.bfloat16 else None
        self._row = torch.zeros((), dtype=torch.int64, device=arena.device)
        self._num_done = torch.zeros((), dtype=torch.int64, device=stream.device)
        self.loss, self.sum_of_losses = torch.zeros((2,), device=arena.device)

    def step(self) -> None:
        """On the next batch, of an epoch that the stream has prepared."""
        fused, settings, device = self.fused, self._settings, self.fused.arena.device
        images, labels = (t.to(device) for t in self._stream.at(self._num_done))
        loss, _ = arena_step(
            fused.arena, self._velocity, self._copies, self._row, fused.num_convs,
            partial(fused.forward, images=images), images.dtype, labels,
            lr=self._lrs.index_select(0, self._num_done.view(1).to(device))[0], momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.loss.copy_(loss)
        self.sum_of_losses.add_(loss)
        self._num_done.add_(1)


def _recorded(training: _Training, stream: BatchStream, start: Callable[[], _Training]) -> Callable[[], None]:
    """`training.step` as a CUDA graph where steps can be recorded, warmed up on another training that `start` makes."""
    graphs = graph_backend(choose_engine("auto", stream.device), stream.device)
    if graphs is None:
        return training.step
    stream.prepare(0)
    try:
        return graphs.capture(start().step, training.step).replay
    except GraphMemoryError as error:
        _log.warning("no memory for a CUDA graph, going on eagerly: %s", error)
        return training.step


def check_data(space: SearchSpace, data: ImageDataset) -> None:
    """Raise InputError unless networks of `space` can be trained and tested on `data`."""
    if not len(data.test_labels):
        raise InputError(f"data {data.name}: has no test images; a network alone is measured by its test accuracy")
    if data.image_size % space.total_stride:
        raise InputError(
            f"data {data.name}: images of {data.image_size} pixels; "
            f"{space.name} needs a multiple of {space.total_stride}"
        )


def initial_network(space: SearchSpace, architecture: Candidate, data: ImageDataset, seed: int) -> nn.Module:
    """The network of step 0, on the CPU, channels_last; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed every GPU as well
        torch.default_generator.manual_seed(torch_seed(seed, f"standalone/weights/{architecture.slug}"))
        network = build_path_network(space, as_path(space, architecture), data.num_classes, data.in_channels)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's hints


@torch.no_grad()
def count_correct(
    network: nn.Module, images: np.ndarray, labels: np.ndarray, table: Tensor, dtype: torch.dtype, device: torch.device
) -> int:
    """How many of `images` (N, H, W, C) uint8 the network gives their label (N,) int64; none is left out."""
    correct = 0
    for start in range(0, len(labels), _TEST_BATCH):
        chosen = np.arange(start, min(start + _TEST_BATCH, len(labels)))
        logits = network(normalise(images, table, dtype, indices=chosen).to(device))
        correct += int((logits.argmax(1).cpu() == torch.from_numpy(labels[chosen])).sum())
    return correct
