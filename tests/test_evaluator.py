"""One pass against one by one: equal counts for every space, batch size, memory cap and backend."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib import import_module

import pytest
import torch

import bmsn.evaluator
import bmsn.execution
from bmsn.evaluator import all_pairs, make_plan, score_architectures, score_one_by_one
from bmsn.exporting_network import network_from_supernet
from bmsn.network import SupernetMixture
from bmsn.space import SPACES, SearchSpace
from convolutions import needs_convolution, take_ours_everywhere
from evaluations import make_case, needed_bytes
from stacked import device_for, needs_cpp, needs_gpu, needs_triton


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("name", SPACES)
def test_counts_equal_one_by_one_in_float64(name, pool):
    nets, images, labels, pairs = make_case(name, pool)
    expected = score_one_by_one(nets, images, labels, pairs, batch_size=5)  # batches of 5, 5 and 2
    need = needed_bytes(nets, images, pairs, 5)
    for max_bytes in (None, need, 2 * need):
        scores = score_architectures(nets, images, labels, pairs, batch_size=5, max_bytes=max_bytes)
        assert scores.correct.dtype == torch.int64
        assert scores.total == 12
        assert scores.correct.tolist() == expected.correct.tolist()
    assert len(set(expected.correct.tolist())) > 2  # the case can tell pairs apart


@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet50-cifar100", "resnet18-imagenet"])
def test_supernets_may_share_a_run(name, norm, monkeypatch):
    """As where the kernels are ours; with frozen statistics these also scale what they convolve."""
    nets, images, labels, _ = make_case(name, "max")
    pairs = all_pairs(nets)
    pairs = pairs[:: len(pairs) // 24 | 1]  # an odd step: of both supernets
    arguments = dict(batch_size=5, norm=norm, calibration_images=images[:7] if norm == "calibrated" else None)
    expected = score_architectures(nets, images, labels, pairs, **arguments).correct.tolist()
    runs = []
    plain = bmsn.execution._runs
    monkeypatch.setattr("bmsn.execution._mixes", lambda images, backend: True)
    monkeypatch.setattr(
        "bmsn.execution._runs", lambda wave, mixed: runs.extend(plain(wave, mixed=mixed)) or plain(wave, mixed=mixed)
    )
    assert score_architectures(nets, images, labels, pairs, **arguments).correct.tolist() == expected
    first = [[state.supernet for state in run] for run in runs if run[0].source is None]
    assert first == [[0, 1]] * (3 if norm == "batch" else 4)  # batches, the images that statistics are of among them
    assert any(len({state.supernet for state in run}) == 2 for run in runs if run[0].source is not None)


@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize(("name", "pool"), [("resnet20-cifar10", "max"), ("resnet50-cifar100", "stride")])
def test_several_batches_at_once_are_groups_of_their_own(name, pool, norm, monkeypatch):
    """As on a GPU with memory for it: batches of 3, three at once, one, and a last one of 2."""
    nets, images, labels, pairs = make_case(name, pool, num_images=14)
    arguments = dict(batch_size=3, norm=norm, calibration_images=images[:7] if norm == "calibrated" else None)
    expected = score_architectures(nets, images, labels, pairs, **arguments).correct.tolist()
    sizes = []

    def plan_for_three(mixture, images, pairs, *, batch_size, max_bytes):
        if len(images) < 14:  # calibration: one group
            return make_plan(mixture, images, pairs, batch_size=batch_size, max_bytes=max_bytes)
        return make_plan(mixture, images, pairs, batch_size=3 * batch_size, max_bytes=max_bytes)

    plain = bmsn.evaluator.run_batches
    monkeypatch.setattr("bmsn.evaluator.make_plan", plan_for_three)
    monkeypatch.setattr("bmsn.evaluator.run_batches", lambda *a: sizes.append((len(a[3]), a[4])) or plain(*a))
    monkeypatch.setattr("bmsn.execution._mixes", lambda images, backend: True)
    assert score_architectures(nets, images, labels, pairs, **arguments).correct.tolist() == expected
    assert sizes == ([(9, 3), (3, 1), (2, 1)] if norm == "batch" else [(7, 1), (9, 1), (3, 1), (2, 1)])


TRITON_SPACES = [
    pytest.param("resnet14-cifar10", "max", marks=needs_triton),
    *(pytest.param(n, p, marks=needs_gpu) for n, p in (("resnet50-cifar100", "stride"), ("resnet18-imagenet", "avg"))),
]


@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize(("name", "pool"), TRITON_SPACES)
def test_triton_scores_both_supernets_and_two_batches_at_once(name, pool, norm, monkeypatch):
    nets, images, labels, _ = make_case(name, pool, num_images=5, dtype=torch.float32)
    nets, device = nets.float().to(device_for("triton")), device_for("triton")
    pairs = [(nets.space[2], 0), (nets.space[2], 1)]
    arguments = dict(batch_size=2, norm=norm, calibration_images=images[:4] if norm == "calibrated" else None)
    expected = score_architectures(nets, images, labels, pairs, backend="reference", **arguments)
    plan = partial(make_plan, nets, images.to(device), pairs)
    monkeypatch.setattr("bmsn.evaluator.make_plan", lambda *a, batch_size, max_bytes: plan(batch_size=2 * batch_size))
    launched, launch = [], import_module("bmsn.kernels.conv_bn")._launch
    monkeypatch.setattr("bmsn.kernels.conv_bn._launch", lambda *a, **k: launched.append(a[0].shape) or launch(*a, **k))
    found = score_architectures(nets, images, labels, pairs, backend="triton", **arguments)
    assert (found.correct - expected.correct).abs().max() <= 1
    if name == "resnet14-cifar10":  # whose other maps have more channels: both supernets convolve in one launch
        of_images = [shape[0] for shape in launched if shape[1] == 3]
        assert of_images == ([8, 2] if norm == "batch" else [8, 8, 2])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_named_by_the_environment_scores_all_there_is(dtype, monkeypatch):
    nets, images, labels, pairs = make_case("resnet14-cifar10", dtype=dtype)
    wanted = score_architectures(nets, images, labels, pairs, batch_size=5, backend="cpp")
    monkeypatch.setenv("BMSN_BACKEND", "cpp")
    assert score_architectures(nets, images, labels, pairs, batch_size=5).correct.tolist() == wanted.correct.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_differs_by_rounding_ties_alone(dtype):
    nets, images, labels, pairs = make_case("resnet20-cifar10", num_images=64, dtype=dtype)
    one_pass = score_architectures(nets, images, labels, pairs, batch_size=32)
    one_by_one = score_one_by_one(nets, images, labels, pairs, batch_size=32)
    differences = (one_pass.correct - one_by_one.correct).abs()
    assert differences.max() <= (1 if dtype == torch.float32 else 3)
    assert differences.sum() <= 0.01 * one_pass.total * len(pairs)


@pytest.mark.parametrize(
    ("dtype", "convolutions"),  # of the latter so many of an architecture's 14 are ours: no stem, no 1x1 in float32
    [pytest.param(t, n, marks=needs_convolution(t)) for t, n in ((torch.bfloat16, 13), (torch.float32, 12))],
)
@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_our_cpu_convolution_classifies_as_float64_does(pool, norm, dtype, convolutions, monkeypatch):
    """At the widths that it is for. Labels are what float64 predicts: a map in the wrong place leaves chance."""
    take_ours_everywhere(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    nets = SupernetMixture(SearchSpace.named("resnet14-cifar10", pool=pool), 2, 4, generator=generator)
    nets.arena.detach()[:, -4:] = 0
    images = torch.randn(96, 3, 16, 16, generator=generator, dtype=torch.double)
    wide, runs = deepcopy(nets).double(), []
    for op in ("conv_bn", "conv_scale"):
        module = import_module(f"bmsn.ops.{op}")
        plain = module.convolve_cpp
        monkeypatch.setattr(module, "convolve_cpp", lambda *a, plain=plain, **k: runs.append(a) or plain(*a, **k))
    for pair in all_pairs(nets)[::5]:
        frozen = {} if norm == "batch" else {"norm": norm, "calibration_images": images.to(dtype)}
        logits = network_from_supernet(wide, *pair, images)(images) if frozen else wide(images, *pair)
        labels = (logits - logits.mean(0)).argmax(1)
        shifted = deepcopy(nets)
        shifted.arena.detach()[:, -4:] = -logits.detach().mean(0).float()  # so that all classes are predicted
        scores = score_architectures(shifted, images.to(dtype), labels, [pair], backend="cpp", **frozen)
        assert len(labels.unique()) > 2
        assert scores.correct.item() >= 88
    assert len(runs) >= 6 * convolutions


def test_order_subset_and_memory_format_do_not_matter():
    nets, images, labels, pairs = make_case("resnet20-cifar10")
    counts = dict(
        zip(pairs, score_architectures(nets, images, labels, pairs, batch_size=8).correct.tolist(), strict=True)
    )
    some = [pairs[k] for k in (22, 3, 17, 4)]
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert score_architectures(nets, channels_last, labels, some, batch_size=8).correct.tolist() == [
        counts[p] for p in some
    ]


def test_all_pairs_are_architecture_major():
    nets, images, labels, _ = make_case("resnet14-cifar10")
    scores = score_architectures(nets, images, labels)
    assert [(a.index, m) for a, m in scores.pairs] == [(c, m) for c in range(15) for m in range(2)]
    assert scores.correct.shape == (30,)


def test_uint8_images_are_normalised_inside():
    nets, _, labels, pairs = make_case("resnet14-cifar10")
    pixels = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    nets.pixel_table = (torch.arange(256)[:, None] / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
        [0.2, 0.25, 0.3]
    )
    by_hand = (pixels.double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.3])
    expected = score_one_by_one(nets, by_hand.permute(0, 3, 1, 2), labels, pairs)
    assert score_architectures(nets, pixels, labels, pairs).correct.tolist() == expected.correct.tolist()


@pytest.mark.parametrize("name", [name for name in SPACES if "14" not in name])
def test_weights_of_all_supernets_keep_the_alignment_that_kernels_load_fast_by(name):
    """In bfloat16 rows, and weights in a row, lie multiples of 16 elements apart: the head's numbers are elsewhere."""
    nets = SupernetMixture(SearchSpace.named(name, width=0.25 if name != "resnet20-cifar10" else 1.0), 2, 10)
    weights = nets.weights(nets.arena.detach(), torch.bfloat16)
    for tensor in [w for layer in weights.layers for w in layer.values()]:
        assert tensor.stride(0) % 16 == 0
        assert tensor.storage_offset() % 16 == 0


@pytest.mark.parametrize("score", [score_architectures, score_one_by_one])
def test_a_callback_counts_what_is_done_and_can_end_it(score):
    nets, images, labels, pairs = make_case("resnet14-cifar10")
    done = []
    score(nets, images, labels, pairs[:3], batch_size=5, after_batch=done.append)
    assert done == ([15, 15, 6] if score is score_architectures else [5, 5, 2] * 3)

    def stop(images):
        done.append(images)
        raise KeyError

    done.clear()
    with pytest.raises(KeyError):
        score(nets, images, labels, pairs[:3], batch_size=5, after_batch=stop)
    assert len(done) == 1
