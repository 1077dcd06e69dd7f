"""Networks as they are exported: plain torch modules that take images in [0, 1]; from a supernet or trained alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bmsn.data import normalisation_table
from bmsn.errors import InputError
from bmsn.latency import fold_batch_norm
from bmsn.network import SupernetMixture, build_path_network, check_images, copy_weights
from bmsn.paths import Candidate, ResolutionPath, as_path
from bmsn.space import SearchSpace


class Normalise(nn.Module):
    """(images - mean) / std of each channel.

    Args:
        mean, std: (C,), of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float()[:, None, None])
        self.register_buffer("std", std.float()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def with_normalisation(network: nn.Sequential, mean: Tensor, std: Tensor) -> nn.Sequential:
    """The children of `network` behind a `normalise` of their own: images (N, C, H, W) in [0, 1] to logits.

    The names of the weights stay those of `build_network`.
    """
    whole = nn.Sequential()
    whole.add_module("normalise", Normalise(mean, std))
    for name, child in network.named_children():
        whole.add_module(name, child)
    return whole.float().eval()


def unit_table(in_channels: int) -> Tensor:
    """(256, C) float32: a uint8 pixel as these networks take it, value / 255."""
    return normalisation_table(np.zeros(in_channels), np.ones(in_channels))


# From a supernet. -----------------------------------------------------------------------------------------------------


def network_from_supernet(
    nets: SupernetMixture, architecture: Candidate, supernet: int, calibration_images: Tensor
) -> nn.Sequential:
    """One architecture with the weights of a supernet, without retraining: plain torch, BatchNorm folded away.

    The statistics of BatchNorm are measured on all calibration images together and then frozen, so that an image's
    result depends on no other. It counts as `score_architectures` does with norm="calibrated" on the same images: in
    float64 equally, in float32 up to rounding.

        >>> network = bmsn.network_from_supernet(nets, nets.space.default, 0, calibration_images=images)
        >>> network(images).shape == (len(images), nets.num_classes)
        True
        >>> any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        False

    Args:
        nets: the supernets.
        architecture: one of the space's, or a path of resolutions.
        supernet: weight set, 0..M-1.
        calibration_images: (N, C, H, W), normalised, float32 or float64, on the device of `nets`: usually about 1,000
            of the training half. Their dtype is that of the network. One batch: memory for two maps of N images.
    Returns:
        The network, in evaluation mode, for normalised images; children as those of `build_network`.
    Raises:
        InputError: an architecture or supernet that is not there, or images that do not fit.
    """
    if not 0 <= supernet < nets.num_supernets:  # the architecture may be a path outside the space
        raise InputError(f"supernet must be in 0..{nets.num_supernets - 1}; got {supernet}")
    check_images(nets, calibration_images)
    if calibration_images.dtype == torch.bfloat16:
        raise InputError("calibration_images must be float32 or float64; got bfloat16, too coarse for statistics")
    return network_from_row(nets, nets.arena.detach()[supernet], as_path(nets.space, architecture), calibration_images)


@torch.no_grad()
def network_from_row(
    nets: SupernetMixture, row: Tensor, path: ResolutionPath, calibration_images: Tensor
) -> nn.Sequential:
    """`network_from_supernet` for one row of weights (P,), unchecked."""
    network = _blank_network(nets.space, path, nets.num_classes, nets.in_channels)
    network.to(calibration_images.device, calibration_images.dtype).eval()
    copy_weights(nets.weights(row, calibration_images.dtype), network)
    _calibrate(network, calibration_images)
    fold_batch_norm(network)
    return network


def _blank_network(space: SearchSpace, path: ResolutionPath, num_classes: int, in_channels: int) -> nn.Sequential:
    """One whose weights are to be replaced: torch's random state, which belongs to the caller, is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_path_network(space, path, num_classes, in_channels)


def _calibrate(network: nn.Module, images: Tensor) -> None:
    """Each BatchNorm takes mean and (population) variance of what reaches it, all before it being calibrated."""

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)  # type: ignore[operator]  # a buffer
        norm.running_var.copy_(variance)  # type: ignore[operator]

    hooks = [m.register_forward_pre_hook(measure) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    network(images)
    for hook in hooks:
        hook.remove()


# What config.json says of a network, and back. ------------------------------------------------------------------------


def describe_architecture(space: SearchSpace, architecture: Candidate) -> dict[str, Any]:
    """Under its own name, and what that means; `stage_depths` and `pool_positions` are None for a path outside."""
    inside = None if isinstance(architecture, ResolutionPath) else architecture
    return {
        "architecture": architecture.slug,
        "stage_depths": None if inside is None else list(inside.stage_depths),
        "pool_positions": None if inside is None else list(inside.pool_positions),
        "resolutions": list(as_path(space, architecture).resolutions),
    }


def rebuild(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Sequential:
    """The network that `config` (that of config.json) describes, with these weights.

    Raises:
        InputError, KeyError, TypeError: what is described is no network. RuntimeError: weights of another one.
    """
    space = SearchSpace(**config["space"])
    path = ResolutionPath(tuple(config["resolutions"]))
    network = _blank_network(space, path, config["num_classes"], config["in_channels"]).eval()
    if config["batch_norm"] == "folded":
        fold_batch_norm(network)
    mean, std = (torch.tensor(config["normalisation"][name], dtype=torch.float64) for name in ("mean", "std"))
    whole = with_normalisation(network, mean, std)
    whole.load_state_dict(dict(weights))
    return whole
