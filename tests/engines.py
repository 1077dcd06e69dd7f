"""What the tests of the engine share: a tiny search's state on any device, and graphs that record in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

import bmsn
from bmsn.data import BatchStream, normalisation, normalisation_table
from bmsn.engine import GraphMemoryError, SearchState, Steps, StepSettings
from bmsn.mixture import inverse_temperature
from bmsn.ops.mixture_step import MixtureTensors
from bmsn.trainer import working_copies
from searching import tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
BATCH, SUPERNETS = 8, 2
SETTINGS = StepSettings(momentum=0.9, weight_decay=1e-3, ema_decay=0.9, tol=1e-12, balance_every=1)


def make_state(
    num_steps: int = 200,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lr: float = 0.05,
    seed: int = 0,
    validates: Callable[[int], bool] = SETTINGS.validates,
) -> SearchState:
    """A search over the 15 architectures of a narrow ResNet-14, 8x8 images in four classes; a pure function.

    `seed` is of weights, batches and draws; the images are the same.
    """
    device, data, random = torch.device(device), tiny_images(), np.random.default_rng(2 + seed)
    table = normalisation_table(*normalisation(data.train_images))
    halves = np.arange(64), np.arange(64, 128)
    streams = [
        BatchStream(
            data.train_images, data.train_labels, half, table,
            batch_size=BATCH, dtype=dtype, seed=1 + seed, purpose=purpose, augment=purpose == "train", device=device,
        )
        for half, purpose in zip(halves, ("train", "validation"), strict=True)
    ]  # fmt: skip
    nets = bmsn.SupernetMixture(SPACE, SUPERNETS, 4, generator=torch.Generator().manual_seed(seed)).to(device)
    mixture = MixtureTensors.create(
        len(SPACE), SUPERNETS, random.integers(0, len(SPACE), num_steps + 1),
        np.array([inverse_temperature(step / num_steps, "inverse", SUPERNETS) for step in range(num_steps + 1)]),
        random.random(num_steps + 1), device,
    )  # fmt: skip
    mixture.scores.fill_(1.0)
    lrs = [lr * (1 - step / num_steps) for step in range(num_steps)]
    velocity = torch.zeros_like(nets.arena.detach())
    settings = replace(SETTINGS, validates=validates)
    return SearchState.create(nets, velocity, working_copies(nets, dtype), *streams, mixture, lrs, settings)


def assert_curves_agree(one: Sequence[Steps], other: Sequence[Steps]) -> None:
    """Their losses differ by less than seeds do: searches of the same seeds, at least two, in the same order.

    Of blocks of 20 steps, the means over seeds are compared with the standard deviation of `one` over its seeds.
    """
    blocks, others = (np.stack([done.losses.reshape(-1, 20).mean(1) for done in runs]) for runs in (one, other))
    spread = blocks.std(0, ddof=1)
    difference = np.abs(blocks.mean(0) - others.mean(0))
    assert difference.mean() < spread.mean(), (difference, spread)


@dataclass
class Recorded:
    """A graph that is its step's closure."""

    replay: Callable[[], None]


class RecordedGraphs:
    """Records steps without a GPU; from the `memory`-th on there is no memory left."""

    def __init__(self, memory: int = 10**9) -> None:
        self.captured, self.memory = 0, memory

    def capture(self, warm_up: Callable[[], None], step: Callable[[], None]) -> Recorded:
        warm_up()
        if self.captured == self.memory:
            raise GraphMemoryError("more than 7 GiB were needed")
        self.captured += 1
        return Recorded(step)
