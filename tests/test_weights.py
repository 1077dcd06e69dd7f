"""Weights as npz files: what comes back, and files that were damaged anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bmsn
from bmsn.weights import read_weights, write_weights


def test_weights_come_back_and_damage_is_found(tmp_path):
    space = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
    network = bmsn.build_network(space, space.default, num_classes=3).to(memory_format=torch.channels_last)
    network(torch.randn(4, 3, 8, 8))  # running statistics of its own, and a count
    path = tmp_path / "a.npz"
    write_weights(path, network)
    found, wanted = read_weights(path), network.state_dict()
    assert list(found) == list(wanted)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    assert any(isinstance(module, nn.BatchNorm2d) and module.running_mean.any() for module in network.modules())

    whole = path.read_bytes()
    place = whole.index(np.float32(wanted["layers.0.0.weight"].flatten()[5].item()).tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(bmsn.InputError, match=r"a\.npz: is damaged"):
        read_weights(path)
    path.write_bytes(whole[:1000])
    with pytest.raises(bmsn.InputError, match=r"a\.npz: is damaged"):
        read_weights(path)
    np.savez(path, weight=np.array([{}], dtype=object))  # a pickle
    with pytest.raises(bmsn.InputError, match=r"a\.npz: is damaged.*allow_pickle"):
        read_weights(path)
    with pytest.raises(bmsn.InputError, match=r"b\.npz: is missing"):
        read_weights(tmp_path / "b.npz")


def test_a_flipped_bit_in_any_byte_is_found_or_changes_no_value(tmp_path):
    """In values, in headers of arrays, and in the zip's own fields, of which some say nothing of the content."""
    network, path = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), tmp_path / "a.npz"
    write_weights(path, network)
    whole, wanted, refused = path.read_bytes(), network.state_dict(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = read_weights(path)
        except bmsn.InputError:
            refused += 1
        else:  # a name may have changed, which the network refuses
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items() if name in wanted)
    assert refused > len(whole) // 2
