"""Scoring with calibrated statistics: measured once, frozen, and applied where the convolution stores."""

from __future__ import annotations

import pytest
import torch

import bmsn.execution
from bmsn.evaluator import calibrate, score_architectures
from evaluations import make_case, needed_bytes


class RecordedNorm:
    """Stands in for the normalisation of `SupernetMixture.forward`: measures in order, applies in the same order."""

    def __init__(self):
        self.measured, self.applied = [], None

    def __call__(self, x, num_groups):
        if self.applied is None:
            self.measured.append((x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)))
            mean, variance = self.measured[-1]
        else:
            mean, variance = next(self.applied)
        return (x - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("name", ["resnet14-cifar10", "resnet50-cifar100", "resnet18-imagenet"])
def test_calibrated_statistics_are_frozen(name, monkeypatch):
    nets, images, labels, pairs = make_case(name)
    calibration = torch.randn(7, *images.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.double)
    arguments = dict(norm="calibrated", calibration_images=calibration)
    need = needed_bytes(nets, calibration, pairs, 7)
    found = score_architectures(nets, images, labels, pairs, batch_size=5, max_bytes=need, **arguments)
    alone = [
        score_architectures(nets, images[i : i + 2], labels[i : i + 2], pairs, **arguments) for i in range(0, 12, 2)
    ]
    assert found.correct.tolist() == sum(scores.correct for scores in alone).tolist()
    for (architecture, supernet), count in zip(pairs[::5], found.correct.tolist()[::5], strict=True):
        norm = RecordedNorm()
        monkeypatch.setattr("bmsn.ops.norm_relu._norm_reference", norm)
        nets(calibration, architecture, supernet)
        norm.applied = iter(norm.measured)
        predicted = nets(images, architecture, supernet).argmax(1)
        assert count == (predicted == labels).sum()
        monkeypatch.undo()
    assert found.correct.tolist() != score_architectures(nets, images, labels, pairs, batch_size=5).correct.tolist()


def test_with_frozen_statistics_the_convolution_adds_and_relus(monkeypatch):
    """Where the kernels are ours: behind the last one of a layer pooling is left, and without it nothing."""
    nets, images, labels, pairs = make_case("resnet20-cifar10", "max")
    wanted, passes = [], []
    plain, scaled = bmsn.execution.bn_add_relu_pool, bmsn.execution._scaled

    def recorded(y, stats, *shortcuts, **maps):
        passes.append((shortcuts, maps.get("full"), maps["pooled"]))
        plain(y, stats, *shortcuts, **maps)

    def watched(work, x, full, pooled):
        wanted.extend([pooled] if pooled is not None else [])
        with monkeypatch.context() as patched:
            patched.setattr("bmsn.execution.bn_add_relu_pool", recorded)
            y = scaled(work, x, full, pooled)
        assert full is None or y is full
        return y

    monkeypatch.setattr("bmsn.execution._mixes", lambda images, backend: True)
    monkeypatch.setattr("bmsn.execution._scaled", watched)
    score_architectures(nets, images, labels, pairs, norm="calibrated", calibration_images=images)
    assert wanted
    assert [(shortcuts, full) for shortcuts, full, _ in passes] == [((), None)] * len(wanted)
    assert all(found is map for (*_, found), map in zip(passes, wanted, strict=True))


def test_statistics_measured_before_serve_many_calls():
    nets, images, labels, pairs = make_case("resnet14-cifar10")
    frozen = calibrate(nets, images[:7], pairs, images.dtype)
    for some in (pairs, pairs[3:5]):
        wanted = score_architectures(nets, images, labels, some, norm="calibrated", calibration_images=images[:7])
        found = score_architectures(nets, images, labels, some, norm=frozen)
        assert found.correct.tolist() == wanted.correct.tolist()
