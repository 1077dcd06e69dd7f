"""What the tests of exports share: the packages they need, and the three formats as functions from images to logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bmsn

MISSING = [
    name for name in ("safetensors", "onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
]
SKIPPED_WITHOUT_PACKAGES = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra export has them)"
)


def from_safetensors(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    network = bmsn.load_network(folder)
    return lambda images: network(torch.from_numpy(images)).detach().numpy()


def from_program(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    network = torch.export.load(folder / "model.pt2").module()
    return lambda images: network(torch.from_numpy(images)).detach().numpy()


def from_onnx(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]
