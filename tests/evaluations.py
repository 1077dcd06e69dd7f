"""What the tests of the evaluator score: a mixture of two narrow supernets, images, labels, pairs."""

from __future__ import annotations

import pytest
import torch

from bmsn.errors import InputError
from bmsn.evaluator import all_pairs, make_plan
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace


def make_case(name, pool=None, num_images=12, dtype=torch.double):
    """A mixture of two narrow supernets, images of twice the total stride, labels; up to 48 pairs."""
    generator = torch.Generator().manual_seed(7)
    space = SearchSpace.named(name, width=0.25 if name in ("resnet14-cifar10", "resnet20-cifar10") else 0.05, pool=pool)
    nets = SupernetMixture(space, 2, 5, generator=generator).double()
    head = nets.arena.detach()[:, -(space.out_channels + 1) * 5 :]
    matrix = head[:, : space.out_channels * 5].view(2, 5, -1)
    matrix -= matrix.mean(2, keepdim=True)  # else one class has the largest row sum and is predicted everywhere
    head[:, space.out_channels * 5 :] = 0
    size = 2 * space.total_stride
    images = torch.randn(num_images, 3, size, size, generator=generator, dtype=torch.double).to(dtype)
    labels = torch.randint(5, (num_images,), generator=generator)
    pairs = all_pairs(nets)
    return nets, images, labels, pairs[:: max(1, len(pairs) // 24)]


def needed_bytes(nets, images, pairs, batch_size):
    with pytest.raises(InputError, match="max_bytes must be at least") as caught:
        make_plan(nets, images, pairs, batch_size=batch_size, max_bytes=1)
    return int(str(caught.value).split("at least ")[1].split()[0])
