"""What the evaluator makes of bad input: an error that names it, and a warning of weights that are not finite."""

from __future__ import annotations

import pytest
import torch

from bmsn.errors import InputError
from bmsn.evaluator import score_architectures, score_one_by_one
from bmsn.space import SearchSpace
from evaluations import make_case


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(batch_size=1), ["batch_size", "at least 2", "1"]),
        (dict(norm="layer"), ["norm", "batch", "calibrated", "layer"]),
        (dict(norm="calibrated"), ["calibration_images", "calibrated"]),
        (dict(calibration_images=torch.zeros(8, 3, 8, 8)), ["calibration_images", "batch"]),
        (dict(norm="calibrated", calibration_images=torch.zeros(8, 3, 9, 8)), ["calibration_images", "total stride 4"]),
        (dict(norm="calibrated", calibration_images=torch.zeros(0, 3, 8, 8)), ["calibration_images", "non-empty"]),
        (dict(batch_size=2.5), ["batch_size", "integer", "2.5"]),
        (dict(pairs=["a"]), ["pairs[0]", "(Architecture, supernet index)", "'a'"]),
        (dict(labels=torch.zeros(12, dtype=torch.bool)), ["labels", "12 integers", "bool"]),
        (dict(labels=torch.zeros(12, dtype=torch.long, device="meta")), ["labels", "CPU", "meta"]),
        (dict(images=torch.zeros(12, 3, 8, 8, device="meta")), ["images", "CPU", "meta"]),
        (dict(pairs=[]), ["pairs is empty"]),
        (dict(pairs="twice"), ["pairs[1] repeats pairs[0]"]),
        (dict(pairs="other"), ["not in resnet14"]),
        (dict(pairs="supernet"), ["pairs[0]", "0..1", "2"]),
        (dict(labels=torch.zeros(11, dtype=torch.long)), ["labels", "12"]),
        (dict(labels=torch.full((12,), 5)), ["labels[0]", "0..4", "5"]),
        (dict(images=torch.zeros(12, 3, 9, 8)), ["total stride 4"]),
        (dict(images=torch.zeros(12, 8, 8, 4, dtype=torch.uint8)), ["uint8", "(N, H, W, 3)"]),
        (dict(max_bytes=1000), ["max_bytes must be at least", "1000"]),
        (dict(backend="cuda"), ["cuda", "cpp"]),
    ],
)
def test_bad_input_is_named(change, words):
    nets, images, labels, pairs = make_case("resnet14-cifar10")
    a = nets.space[0]
    special = {
        "twice": [(a, 0), (a, 0)],
        "other": [(SearchSpace.named("resnet20-cifar10")[0], 0)],
        "supernet": [(a, 2)],
    }
    arguments = dict(images=images, labels=labels, pairs=pairs) | change
    if isinstance(arguments["pairs"], str):
        arguments["pairs"] = special[arguments["pairs"]]
    with pytest.raises(InputError) as caught:
        score_architectures(nets, **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_counted_as_nan_and_named_once(bad, caplog):
    nets, images, labels, _ = make_case("resnet14-cifar10")
    nets.arena.detach()[1, 100] = bad
    pairs = [(a, m) for a in nets.space for m in (0, 1)]
    scores = score_architectures(nets, images, labels, pairs, batch_size=5)
    assert scores.correct[1::2].tolist() == [int((labels == 0).sum())] * 15  # argmax of NaNs is the first class
    assert scores.correct[::2].tolist() == score_one_by_one(nets, images, labels, pairs[::2], 5).correct.tolist()
    (record,) = caplog.records
    assert record.getMessage().startswith("supernets [1] have weights that are not finite: the scores of their 15")
    score_architectures(nets, images, labels, pairs[::2], batch_size=5)  # the other supernet alone
    assert len(caplog.records) == 1


def test_a_last_batch_with_one_value_a_channel_is_an_error():
    nets, _, _, pairs = make_case("resnet14-cifar10")
    images = torch.randn(9, 3, 4, 4, dtype=torch.double)  # last map 1x1, last batch 1 image
    with pytest.raises(InputError, match="at least 2 values"):
        score_architectures(nets, images, torch.zeros(9, dtype=torch.long), pairs, batch_size=8)
