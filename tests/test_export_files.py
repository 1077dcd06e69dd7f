"""The files of an export: what a network can do in each format, writes that fail, folders that hold no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bmsn
import bmsn.exporting_files
from bmsn.exporting_files import write_network
from bmsn.exporting_network import describe_architecture, with_normalisation
from bmsn.paths import as_path, find_candidate
from exports import SKIPPED_WITHOUT_PACKAGES, from_onnx, from_program, from_safetensors
from global_state import unchanged

pytestmark = SKIPPED_WITHOUT_PACKAGES

SPACE = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)


def made(space: bmsn.SearchSpace, candidate: str, size: int) -> tuple[nn.Module, nn.Sequential, dict[str, Any]]:
    """A network with running statistics of its own, for normalised grey images; the same for images in [0, 1]; and
    what config.json says of it."""
    architecture = find_candidate(space, candidate)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        bare = bmsn.build_path_network(space, as_path(space, architecture), num_classes=7, in_channels=1)
        bare(torch.randn(16, 1, size, size))
    config = {
        **describe_architecture(space, architecture), "space": space.arguments(), "num_classes": 7,
        "in_channels": 1, "image_size": size, "batch_norm": "affine", "normalisation": {"mean": [0.3], "std": [0.2]},
    }  # fmt: skip
    return bare, with_normalisation(bare, torch.tensor([0.3]), torch.tensor([0.2])), config


@pytest.mark.parametrize(
    ("space", "candidate", "size"),
    [
        (bmsn.SearchSpace.named("resnet18-imagenet", width=0.1), "2-1-3-2", 64),  # large stem, strides, identities
        (bmsn.SearchSpace.named("resnet14-cifar10", width=0.25, pool="avg"), "0-1-0-0-2-0-1", 16),  # up by 2 and by 4
    ],
    ids=["strides", "upsampling"],
)
def test_what_else_a_network_can_do_survives_in_each_format(space, candidate, size, tmp_path):
    bare, network, config = made(space, candidate, size)
    write_network(tmp_path / "out", network, config)
    images = np.random.default_rng(0).random((5, 1, size, size), np.float32)
    with torch.no_grad():
        wanted = bare((torch.from_numpy(images) - 0.3) / 0.2).numpy()
    assert np.ptp(wanted, axis=0).min() > 1e-3  # images are told apart
    for load in (from_safetensors, from_program, from_onnx):
        np.testing.assert_allclose(load(tmp_path / "out")(images), wanted, rtol=1e-4, atol=1e-4)


def test_a_write_that_fails_leaves_nothing_and_one_that_was_killed_does_not_matter(monkeypatch, tmp_path):
    def full(path: Path, data: bytes) -> None:
        if path.name == "model.onnx":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    (_, network, config), out = made(SPACE, "3-2-2", 16), tmp_path / "deep" / "out"
    monkeypatch.setattr(bmsn.exporting_files, "_graphs", lambda network, shape: (b"program", b"onnx"))
    with monkeypatch.context() as patch:
        patch.setattr(bmsn.exporting_files, "write_atomically", full)
        with pytest.raises(bmsn.InputError, match="cannot be written: No space left on device"):
            write_network(out, network, config)
    assert list(out.parent.iterdir()) == []

    killed = out.parent / f".bmsn-out.{os.getpid()}.tmp"
    killed.mkdir()
    (killed / "model.onnx").touch()
    out.mkdir()  # empty
    write_network(out, network, config)
    assert (out / "model.onnx").read_bytes() == b"onnx"
    assert list(out.parent.iterdir()) == [out]
    (out / "model.pt2").unlink()
    with pytest.raises(bmsn.InputError, match="cannot be written: Directory not empty"):  # filled in the meantime
        write_network(out, network, config)
    assert list(out.parent.iterdir()) == [out]


def test_folders_that_hold_no_network(monkeypatch, tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(bmsn.InputError) as raised:
            bmsn.load_network(folder)
        return str(raised.value)

    assert "holds no exported network: it has no config.json" in refused(tmp_path)
    monkeypatch.setattr(bmsn.exporting_files, "_graphs", lambda network, shape: (b"program", b"onnx"))
    _, network, described = made(SPACE, "3-2-2", 16)
    folder = tmp_path / "out"
    config = write_network(folder, network, described)
    with unchanged():
        loaded = bmsn.load_network(folder)
    assert loaded.state_dict().keys() == network.state_dict().keys()

    def changed(**fields: object) -> str:
        (folder / "config.json").write_text(json.dumps(config | fields))
        return refused(folder)

    assert "schema_version must be 1; got 2" in changed(schema_version=2)
    assert "describes no network that fits model.safetensors" in changed(num_classes=5)
    assert "expected 7 resolutions in 0..2" in changed(resolutions=[0, 0, 3, 3, 3, 3, 3])
    assert "describes no network that fits model.safetensors: 'mean'" in changed(normalisation={})
    (folder / "config.json").write_text("[]")
    assert "not written by bmsn.export" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "its content has changed" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "it has no model.safetensors" in refused(folder)
