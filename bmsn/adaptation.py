"""Scores of architectures after a few steps that adapt their supernet to each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bmsn.evaluator import Scores
from bmsn.network import SupernetMixture
from bmsn.plan import Pair
from bmsn.trainer import train_step


def score_adapted(
    nets: SupernetMixture,
    images: Tensor,
    labels: Tensor,
    pairs: Sequence[Pair],
    *,
    steps: int,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    lr: float,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    score: Callable[..., Scores],
) -> Scores:
    """Scores each pair with a copy of its supernet that has first trained on that architecture alone.

    Every pair takes the same batches, from a momentum of zero, so its score is a function of the weights and these
    batches: it depends neither on the other pairs nor on their order. No two pairs share weights any longer, and
    nothing is computed once for several.

    Args:
        nets: not changed.
        images, labels, pairs: as for `score_architectures`.
        steps: of momentum SGD; batch: the training images and labels of each, 0 to `steps` - 1, on the nets' device.
        lr, momentum, weight_decay: of these steps; the learning rate does not change.
        batch_size: of the scoring.
        score: `score_architectures` or `score_one_by_one`, for one supernet and one pair.
    """
    device = nets.arena.device
    images, labels = images.to(device), labels.to(device)
    own = torch.Generator()  # torch's random state belongs to the caller
    alone = SupernetMixture(nets.space, 1, nets.num_classes, nets.in_channels, generator=own).to(nets.arena)
    alone.pixel_table = nets.pixel_table
    correct = torch.empty(len(pairs), dtype=torch.int64)
    for place, (architecture, supernet) in enumerate(pairs):
        with torch.no_grad():
            alone.arena.copy_(nets.arena[supernet : supernet + 1])
        velocity = torch.zeros_like(alone.arena.detach())
        for step in range(steps):
            train_step(
                alone, velocity, architecture, 0, *batch(step), lr=lr, momentum=momentum, weight_decay=weight_decay
            )
        correct[place] = score(alone, images, labels, [(architecture, 0)], batch_size=batch_size).correct[0]
    return Scores(tuple(pairs), correct, len(images))
