"""`Problem`: what a search gives to its method: space, images, schedule, device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmsn.config import FilledConfig
from bmsn.data import BatchStream, ImageDataset, normalise
from bmsn.space import SearchSpace
from bmsn.trainer import learning_rate


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is searched, on which images, for how long. Nothing in it changes during a search.

    Attributes:
        config: the settings.
        space: the architectures.
        data: all images; a method sees them through the two streams.
        train: batches of the training half, augmented.
        validation: batches of the validation half.
        table: (256, C) float32, what a uint8 pixel becomes (`bmsn.data.normalisation_table`).
        device: where to compute; dtype: of the images.
        num_steps: training steps of the whole search.
        macs: multiply-accumulates of each architecture for one image, by index.
    """

    config: FilledConfig
    space: SearchSpace
    data: ImageDataset
    train: BatchStream
    validation: BatchStream
    table: Tensor
    device: torch.device
    dtype: torch.dtype
    num_steps: int
    macs: tuple[int, ...]

    @property
    def num_alone(self) -> int:
        """Steps, the first ones, in which one supernet trains alone."""
        return round(self.config.split_after * self.num_steps)

    def validates(self, step: int) -> bool:
        """Whether a step has a validation batch, of methods whose draws of architectures no accuracy decides."""
        chooses = self.config.supernets > 1 and step >= self.num_alone
        every = 1 if chooses or self.config.evaluate_top else self.config.procedure.validate_every
        return (step + 1) % every == 0

    def progress(self, step: int) -> float:
        """Share of the search that is done at `step`, in [0, 1]; constant within an epoch if the preset says so."""
        if self.config.procedure.anneal == "epoch":
            step -= step % self.train.steps_per_epoch
        return step / self.num_steps

    def learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(self.progress(step), config.lr, config.min_lr, config.procedure)

    def train_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), channels_last, and labels (B,) int64 of the training half, on the device."""
        images, labels = self.train.batch(step)
        return images.to(self.device), labels.to(self.device)

    def validation_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The same of the validation half, not augmented."""
        images, labels = self.validation.batch(step)
        return images.to(self.device), labels.to(self.device)

    def validation_half(self) -> tuple[Tensor, Tensor]:
        """All images (N, C, H, W) and labels (N,) of the validation half, in fixed order, for scoring; on the host."""
        indices = self.validation.indices
        images = normalise(self.data.train_images, self.table, self.dtype, indices=indices)
        return images, torch.from_numpy(self.data.train_labels[indices])

    def training_images(self, number: int) -> Tensor:
        """The first `number` images of the training half, without augmentation."""
        return normalise(self.data.train_images, self.table, self.dtype, self.train.indices[:number])
