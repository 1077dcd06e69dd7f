"""One architecture taken out of its supernet: against the evaluator's calibrated counts and the supernet's own pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bmsn
from bmsn.exporting_network import network_from_row
from bmsn.methods.multires import forward_path, gather_path
from bmsn.paths import ResolutionPath
from global_state import unchanged


def mixture(space: bmsn.SearchSpace, num_supernets: int = 2, in_channels: int = 3) -> bmsn.SupernetMixture:
    generator = torch.Generator().manual_seed(1)
    return bmsn.SupernetMixture(space, num_supernets, 5, in_channels, generator=generator).double()


def noise(number: int, size: int, seed: int, dtype: torch.dtype = torch.float64, channels: int = 3) -> torch.Tensor:
    """Images whose mean differs, so that predictions do."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(number, channels, 1, 1, generator=generator, dtype=torch.float64)
    return (level + torch.randn(number, channels, size, size, generator=generator, dtype=torch.float64)).to(dtype)


# max and average pooling; strides with projections and identities; bottlenecks behind a large stem
SPACES = {
    "max": (bmsn.SearchSpace.named("resnet14-cifar10", width=0.25), 8),
    "avg": (bmsn.SearchSpace.named("resnet14-cifar10", width=0.25, pool="avg"), 8),
    "stride": (bmsn.SearchSpace.named("resnet18-cifar10", width=0.05), 16),
    "large stem": (bmsn.SearchSpace.named("resnet50-food101", width=0.05), 32),
}


@pytest.mark.parametrize("kind", SPACES)
def test_counts_are_those_of_calibrated_scoring(kind):
    """In float64 equal for every pair; in float32 up to rounding ties."""
    space, size = SPACES[kind]
    nets = mixture(space)
    images, labels = noise(120, size, seed=2), torch.arange(120) % 5
    calibration = noise(40, size, seed=3)
    first, *_, last = space
    pairs = [(first, 0), (first, 1), (space.default, 1), (last, 0)]
    scores = bmsn.score_architectures(
        nets, images, labels, pairs, batch_size=120, norm="calibrated", calibration_images=calibration
    )
    counts, narrow = [], []
    for architecture, supernet in pairs:
        network = bmsn.network_from_supernet(nets, architecture, supernet, calibration)
        counts.append(int((network(images).argmax(1) == labels).sum()))
        network = bmsn.network_from_supernet(nets, architecture, supernet, calibration.float())
        narrow.append(int((network(images.float()).argmax(1) == labels).sum()))
    assert counts == scores.correct.tolist()
    assert len(set(counts)) > 2  # the pairs do differ
    assert np.abs(np.array(narrow) - counts).max() <= 1


def test_on_its_calibration_images_it_is_the_supernet_itself():
    """Statistics of a batch and those calibrated on it are the same. One row of weights, along a path that goes up."""
    space, size = SPACES["max"]
    nets, images = mixture(space, num_supernets=3), noise(16, size, seed=4)
    network = bmsn.network_from_supernet(nets, space.default, 2, images)
    torch.testing.assert_close(network(images), nets(images, space.default, 2).detach(), rtol=1e-10, atol=1e-10)

    path = ResolutionPath((0, 1, 1, 0, 2, 2, 1))
    row = gather_path(nets, nets.arena.detach(), path)
    wanted = forward_path(nets, row, images.contiguous(memory_format=torch.channels_last), path)
    torch.testing.assert_close(network_from_row(nets, row, path, images)(images), wanted, rtol=1e-10, atol=1e-10)


def test_it_is_plain_torch_and_leaves_the_supernets_alone():
    space, size = SPACES["stride"]
    nets, images = mixture(space), noise(8, size, seed=5)
    before = nets.arena.detach().clone()
    with unchanged():
        network = bmsn.network_from_supernet(nets, space[3], 1, images)
    assert torch.equal(nets.arena, before)
    assert not network.training
    kinds = {type(module).__name__ for module in network.modules() if not list(module.children())}
    assert kinds == {"Conv2d", "ReLU", "Identity", "AdaptiveAvgPool2d", "Flatten", "Linear"}
    one = network(images[:1])  # a result depends on no other image
    torch.testing.assert_close(one, network(images)[:1], rtol=1e-12, atol=1e-12)


def test_bad_input():
    space, size = SPACES["max"]
    nets, images = mixture(space), noise(8, size, seed=6)
    other = bmsn.SearchSpace.named("resnet20-cifar10").default
    with pytest.raises(bmsn.InputError, match=r"supernet must be in 0\.\.1; got 2"):
        bmsn.network_from_supernet(nets, space.default, 2, images)
    with pytest.raises(bmsn.InputError, match="is not in resnet14-cifar10"):
        bmsn.network_from_supernet(nets, other, 0, images)
    with pytest.raises(bmsn.InputError, match=r"images must be \(N, 3, H, W\); got \(8, 1, 8, 8\)"):
        bmsn.network_from_supernet(nets, space.default, 0, images[:, :1])
    with pytest.raises(bmsn.InputError, match="must be float32 or float64; got bfloat16"):
        bmsn.network_from_supernet(nets, space.default, 0, images.bfloat16())
