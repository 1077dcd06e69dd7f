"""The state of a search on random images of CIFAR-10's size, which benchmarks run steps on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from bmsn.data import BatchStream, normalisation, normalisation_table
from bmsn.data.batches import as_tensor
from bmsn.engine import Engine, GraphBackend, SearchState, Steps, StepSettings
from bmsn.network import SupernetMixture
from bmsn.ops.mixture_step import MixtureTensors
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype, working_copies

SUPERNETS, CLASSES, SIZE = 4, 10, 32
SETTINGS = StepSettings(momentum=0.9, weight_decay=1e-3, ema_decay=0.9, tol=1e-12, balance_every=1)


@functools.cache
def random_images(num_images: int) -> np.ndarray:
    """(num_images, 32, 32, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (num_images, SIZE, SIZE, 3), dtype=np.uint8)


def random_search(
    drawn: Sequence[int], batch: int, device: torch.device, *, num_images: int = 50_000
) -> SearchState:  # fmt: skip
    """ResNet-20 and four supernets at a temperature of 1/100, at step 0.

    Args:
        drawn: the architecture of each of T steps, at least one.
        batch: images of a training batch and of a validation batch.
        device: where images, weights and mixture lie.
        num_images: half of them to train on.
    """
    space, random, dtype = SearchSpace.named("resnet20-cifar10"), np.random.default_rng(1), compute_dtype(device)
    stored = random_images(num_images)
    images, labels = as_tensor(stored, device), as_tensor(np.arange(num_images) % CLASSES, device)
    table = normalisation_table(*normalisation(stored))
    train, validation = (
        BatchStream(
            images, labels, half, table,
            batch_size=batch, dtype=dtype, seed=0, purpose=purpose, augment=purpose == "train", device=device,
        )
        for half, purpose in zip(np.split(np.arange(num_images), 2), ("train", "validation"), strict=True)
    )  # fmt: skip
    nets = SupernetMixture(space, SUPERNETS, CLASSES, generator=torch.Generator().manual_seed(0)).to(device)
    architectures = np.array([*drawn, drawn[0]])
    mixture = MixtureTensors.create(
        len(space), SUPERNETS, architectures, np.full(len(architectures), 100.0), random.random(len(architectures)),
        device,
    )  # fmt: skip
    mixture.scores.copy_(torch.from_numpy(random.uniform(0.5, 0.9, (SUPERNETS, len(space)))))
    velocity, copies = torch.zeros_like(nets.arena.detach()), working_copies(nets, dtype)
    return SearchState.create(nets, velocity, copies, train, validation, mixture, [0.1] * len(drawn), SETTINGS)


def all_steps(state: SearchState, graphs: GraphBackend | None) -> Callable[[], Steps]:
    """What enqueues all steps of a state from the first on and waits for them once, again at every call."""
    engine = Engine(state, list(state.nets.space), graphs)

    def run() -> Steps:
        state.step.zero_()
        done = engine.run(0, len(state.lrs))
        assert engine.uses_graphs == (graphs is not None)  # without memory for graphs it would go on eagerly
        return done

    return run
