"""Resolution paths: their number and order, their place among the architectures, cost, and their plain networks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bmsn.errors import InputError
from bmsn.network import build_network, build_path_network
from bmsn.paths import (
    ResolutionPath,
    architecture_path,
    layer_macs,
    mixed_macs,
    num_paths,
    parse_path,
    path_architecture,
    path_by_index,
    path_macs,
)
from bmsn.space import SPACES, SearchSpace

SPACE = SearchSpace.named("resnet14-cifar10", width=0.25)


def test_paths_are_all_choices_of_a_resolution_in_lexicographic_order():
    assert num_paths(SearchSpace.named("resnet20-cifar10")) == 19_683
    expected = [(0, *rest) for rest in product(range(3), repeat=6)]
    assert [path_by_index(SPACE, i).resolutions for i in range(num_paths(SPACE))] == expected


@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet18-imagenet"])
def test_architectures_are_the_paths_that_go_down_through_all_resolutions(name):
    space = SearchSpace.named(name, pool="max")
    paths = [architecture_path(space, a) for a in space]
    for a, path in zip(space, paths, strict=True):
        assert tuple(path.resolutions.count(r) for r in range(len(a.stage_depths))) == a.stage_depths
        assert path_architecture(space, path) == a
    inside = [
        path_by_index(space, i) for i in range(num_paths(space)) if path_architecture(space, path_by_index(space, i))
    ]
    assert sorted(inside, key=str) == sorted(paths, key=str)


def test_text_of_a_path_and_its_steps():
    path = parse_path(SPACE, "0-0-2-1-1-0-2")
    assert path == parse_path(SPACE, "0,0,2,1,1,0,2") == ResolutionPath((0, 0, 2, 1, 1, 0, 2))
    assert str(path) == "0-0-2-1-1-0-2"
    assert path.steps == (0, 0, 2, -1, 0, -1, 2)
    assert path_architecture(SPACE, path) is None
    assert path_architecture(SPACE, parse_path(SPACE, "0-0-0-1-1-1-1")) is None  # never at the lowest


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse_path(SPACE, "0-0-x"), ["'0-0-x'", "one resolution a layer"]),
        (lambda: parse_path(SPACE, "0-0-1"), ["0-0-1", "expected 7 resolutions in 0..2"]),
        (lambda: parse_path(SPACE, "1-0-0-0-1-1-2"), ["the first of them 0"]),
        (lambda: build_path_network(SPACE, ResolutionPath((0, 0, 0, 0, 0, 0, 3))), ["in 0..2"]),
        (lambda: path_by_index(SPACE, 729), ["index", "0..728", "729"]),
        (lambda: path_by_index(SPACE, -1), ["index", "0..728", "-1"]),
        (lambda: architecture_path(SPACE, SearchSpace.named("resnet20-cifar10")[0]), ["not in resnet14"]),
        (
            lambda: path_macs(
                SearchSpace.named("resnet14-cifar10", pool="stride"), ResolutionPath((0, 0, 2, 2, 2, 2, 2))
            ),
            ["pool must be max or avg", "got stride"],
        ),
        (
            lambda: path_macs(
                SearchSpace.named("resnet14-cifar10", pool="stride"), ResolutionPath((0, 1, 0, 1, 1, 1, 2))
            ),
            ["pool must be max or avg", "got stride"],
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# Cost. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["max", "stride"])
@pytest.mark.parametrize("name", SPACES)
def test_the_cost_of_an_architecture_is_that_of_its_path(name, pool):
    space = SearchSpace.named(name, pool=pool)
    for a in (space[0], space.default, space[len(space) - 1]):
        assert path_macs(space, architecture_path(space, a), num_classes=7, in_channels=1) == space.macs(
            a, num_classes=7, in_channels=1
        )


@pytest.mark.parametrize(
    ("name", "resolutions"),
    [
        ("resnet14-cifar10", (0, 2, 0, 1, 2, 2, 0)),  # small stem, basic blocks, up and down by 4
        ("resnet50-cifar100", (0, 3, *[1] * 7, *[2] * 6, 0, 3)),  # bottlenecks
        ("resnet18-imagenet", (0, 1, 2, 3, 3, 0, 1, 1)),  # large stem
    ],
)
def test_the_cost_of_a_path_is_what_torch_counts(name, resolutions):
    space = SearchSpace.named(name, width=0.125, pool="avg")
    path = ResolutionPath(resolutions)
    network = build_path_network(space, path, num_classes=5).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, space.image_size, space.image_size))
    assert 2 * path_macs(space, path, num_classes=5) == counter.get_total_flops()


def test_a_mixed_layer_costs_all_its_resolutions():
    """Each (layer, resolution) is in 3^5 of the 3^6 paths, layer 0 and the head in all of them."""
    paths = [path_by_index(SPACE, i) for i in range(num_paths(SPACE))]
    fixed = layer_macs(SPACE, 0, 0) + SPACE.out_channels * 10
    assert sum(path_macs(SPACE, path) - fixed for path in paths) == 3**5 * (mixed_macs(SPACE) - fixed)


# The plain network of a path. -----------------------------------------------------------------------------------------


def test_an_architecture_and_its_path_are_the_same_network():
    torch.manual_seed(0)
    first = build_network(SPACE, SPACE.default, num_classes=4)
    torch.manual_seed(0)
    second = build_path_network(SPACE, architecture_path(SPACE, SPACE.default), num_classes=4)
    assert repr(first) == repr(second)
    for (name, value), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_a_path_that_goes_up_again_runs_each_layer_at_its_resolution(pool):
    torch.manual_seed(0)
    space = SearchSpace.named("resnet14-cifar10", width=0.25, pool=pool)
    path = ResolutionPath((0, 2, 0, 1, 2, 1, 1))
    network = build_path_network(space, path, num_classes=4).double().eval()
    sizes = []
    for layer in network.layers:
        layer.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    logits = network(images)
    assert sizes == [16, 4, 16, 8, 4, 8, 8]

    x, before = images, 0
    for module, r in zip(network.layers, path.resolutions, strict=True):
        block = module if r == before else module[1]
        if r > before:
            x = (F.max_pool2d if pool == "max" else F.avg_pool2d)(x, 2 ** (r - before))
        if r < before:
            x = x.repeat_interleave(2 ** (before - r), 2).repeat_interleave(2 ** (before - r), 3)
        x, before = block(x), r
    torch.testing.assert_close(logits, network.head(x), rtol=1e-12, atol=1e-12)
