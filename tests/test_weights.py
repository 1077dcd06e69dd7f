"""Weights as npz files: what comes back, and files that were damaged anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bmsn.errors import InputError
from bmsn.weights import read_weights, write_weights


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_what_was_written_comes_back(network: nn.Module, tmp_path: Path) -> None:
    write_weights(tmp_path / "w.npz", network)
    found, wanted = read_weights(tmp_path / "w.npz"), network.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_flipped_bit_or_a_lost_end_is_an_input_error(network: nn.Module, tmp_path: Path) -> None:
    """In every byte: values, headers of arrays, and the zip's own fields, of which some say nothing of the content."""
    path = tmp_path / "w.npz"
    write_weights(path, network)
    whole, wanted, refused = path.read_bytes(), network.state_dict(), 0
    for place in range(len(whole)):
        bit = 1 << place % 8
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            found = read_weights(path)
        except InputError:
            refused += 1
        else:  # a name may have changed, which the network refuses; no value may
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items() if name in wanted)
    assert refused > len(whole) // 2
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="is damaged"):
            read_weights(path)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        read_weights(path)
