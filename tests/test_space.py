"""The spaces: order, names, maps, cost and the prefix tree."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bmsn.errors import InputError
from bmsn.network import build_network
from bmsn.space import SPACES, SearchSpace, parse_stage_depths

# (architectures, default, final map, prefix-tree states, groups): the published table of spaces and the design's count
# of states.
TABLE = {
    "resnet14-cifar10": (15, (3, 2, 2), 8, 55, 15),
    "resnet20-cifar10": (36, (4, 3, 3), 8, 164, 24),
    "resnet18-cifar10": (56, (3, 2, 2, 2), 4, 209, 24),
    "resnet50-cifar100": (560, (4, 4, 6, 3), 4, 3059, 56),
    "resnet50-food101": (455, (3, 4, 6, 3), 7, 2379, 52),
    "resnet18-imagenet": (35, (2, 2, 2, 2), 7, None, None),
}


@pytest.mark.parametrize("name", SPACES)
def test_every_architecture_has_all_its_poolings_and_the_final_map(name):
    space = SearchSpace.named(name)
    count, default, final, states, groups = TABLE[name]
    assert len(space) == len(list(space)) == count
    assert space.default.stage_depths == default
    seen = set()
    for index, architecture in enumerate(space):
        assert architecture.index == index
        assert (
            architecture
            == space.find(architecture.stage_depths)
            == space.find(str(architecture))
            == space.find(architecture.slug)
        )
        assert len(architecture.pool_positions) == space.num_pools == len(set(architecture.pool_positions))
        assert 1 <= min(architecture.pool_positions) <= max(architecture.pool_positions) <= space.num_layers - 1
        assert sum(architecture.stage_depths) == space.num_layers
        assert space.map_sizes(architecture)[-1] == final
        seen.add(architecture.pool_positions)
    assert len(seen) == count
    assert sorted(seen) == [a.pool_positions for a in space]
    tree = space.prefix_tree()
    if states is not None:
        assert sum(map(len, tree)) == states
        assert len({(s.layer, s.num_pools) for wave in tree for s in wave}) == groups


def test_prefix_tree_follows_every_architecture():
    space = SearchSpace.named("resnet20-cifar10")
    some = [space[0], space[7], space[35]]
    tree = space.prefix_tree(some)
    assert [s.pool_positions for s in tree[-1]] == sorted(a.pool_positions for a in some)
    for leaf in tree[-1]:
        state, layer = leaf, space.num_layers - 1
        while layer > 0:
            parent = tree[layer - 1][state.parent]
            assert state.pool_positions == parent.pool_positions + ((layer,) if state.pools else ())
            state, layer = parent, layer - 1
        assert state.pool_positions == ()


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("name", SPACES)
def test_macs_and_parameters_against_torch(name, pool):
    space = SearchSpace.named(name, width=0.25, pool=pool)
    step = max(1, len(space) // 3)
    for architecture in itertools.islice(space, 0, None, step):
        network = build_network(space, architecture, num_classes=7).to("meta")
        images = torch.empty(1, 3, space.image_size, space.image_size, device="meta")
        with FlopCounterMode(display=False) as counter:
            network(torch.cat([images, images]))
        assert counter.get_total_flops() == 2 * 2 * space.macs(architecture, num_classes=7)
        assert sum(p.numel() for p in network.parameters()) == space.num_parameters(num_classes=7)


def test_published_cost_ratios():
    space = SearchSpace.named("resnet20-cifar10")
    default = space.macs(space.default)
    assert round(space.macs(space.find("5,3,2")) / default, 2) == 1.54
    assert round(space.macs(space.find("7,1,2")) / default, 2) == 2.23


def test_own_space_and_the_even_default():
    space = SearchSpace(8, 2, [8] * 8, block="bottleneck", image_size=16, name="mine")
    assert len(space) == 21
    assert space.default.stage_depths == (3, 3, 2)
    assert space.out_channels == 32


def test_a_spec_makes_the_space_again():
    for name in SPACES:
        assert SearchSpace.named(name).spec == SearchSpace.named(name, pool="avg").spec == name
    own = SearchSpace(8, 2, [8] * 8, block="bottleneck", stem="large", image_size=32, name="mine", default=(1, 1, 6))
    narrow = SearchSpace.named("resnet20-cifar10", 0.25)
    for space in (own, narrow, SearchSpace(3, 1, [8] * 3, image_size=8, name="resnet14-cifar10")):
        assert space.spec.startswith("{")
        assert SearchSpace.named(space.spec).arguments() == space.arguments()
    assert SearchSpace.named(own.spec, 2, pool="stride").arguments() == (
        own.arguments() | {"widths": [16] * 8, "pool": "stride"}
    )


@pytest.mark.parametrize(
    ("text", "depths"), [("4,3,3", (4, 3, 3)), ("4-3-3", (4, 3, 3)), ("[4, 3, 3]", (4, 3, 3)), ("10,1", (10, 1))]
)
def test_stage_depths_are_read_in_three_forms(text, depths):
    assert parse_stage_depths(text) == depths


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SearchSpace.named("resnet20-cifar"), ["unknown (did you mean 'resnet20-cifar10'?); known: resnet14"]),
        (lambda: SearchSpace.named("?"), ["space '?' is unknown; known: resnet14-cifar10, resnet20-cifar10"]),
        (lambda: SearchSpace.named('{"num_layers": 8'), ["space {", "delimiter"]),
        (lambda: SearchSpace.named('{"layers": 8}'), ["'layers'"]),
        (lambda: SearchSpace.named('{"num_layers": 3, "num_pools": 1, "widths": "888"}'), ["widths", "'888'"]),
        (lambda: SearchSpace(5.0, 2, [8] * 5), ["num_layers must be a whole number; got 5.0"]),
        (lambda: SearchSpace(5, 2, 8), ["widths must be several, each a whole number; got 8"]),
        (lambda: SearchSpace.named("resnet20-cifar10", width=0), ["width", "(0, 64]"]),
        (lambda: SearchSpace(1, 1, [8]), ["num_layers", "at least 2"]),
        (lambda: SearchSpace(5, 5, [8] * 5), ["num_pools", "1..4", "5"]),
        (lambda: SearchSpace(5, 2, [8] * 4), ["widths", "5"]),
        (lambda: SearchSpace(5, 2, [8] * 5, pool="min"), ["pool", "max, avg, stride", "min"]),
        (lambda: SearchSpace(5, 2, [8] * 5, image_size=30), ["image_size", "multiple", "4", "30"]),
        (lambda: SearchSpace.named("resnet20-cifar10").find("4,3,4"), ["sum to 10"]),
        (lambda: SearchSpace.named("resnet20-cifar10").find("4,6"), ["3 stage depths"]),
        (lambda: SearchSpace.named("resnet20-cifar10").find("4,0,6"), ["at least 1"]),
        (lambda: SearchSpace.named("resnet20-cifar10").find("four"), ["'four'", "4,3,3"]),
        (
            lambda: SearchSpace.named("resnet20-cifar10").check(SearchSpace.named("resnet14-cifar10")[3]),
            ["not in resnet20"],
        ),
    ],
)
def test_bad_values_are_named(make, words):
    with pytest.raises(InputError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_space_module_needs_no_torch():
    code = "import importlib.util as u, sys, types\n" + (
        "sys.modules['bmsn'] = p = types.ModuleType('bmsn'); p.__path__ = [sys.argv[1]]\n"
        "import bmsn.space, bmsn.plan\nassert 'torch' not in sys.modules"
    )
    from bmsn import space

    subprocess.run([sys.executable, "-c", code, str(Path(space.__file__).parent)], check=True)


def test_another_image_size_has_other_macs():
    space = SearchSpace.named("resnet50-cifar100")
    large = space.resized(64)
    assert (space.image_size, large.image_size) == (32, 64)
    head = space.out_channels * 10
    assert [large.macs(a) - head for a in large] == [4 * (space.macs(a) - head) for a in space]
    assert large.map_sizes(large.default)[0] == 2 * space.map_sizes(space.default)[0]
    with pytest.raises(InputError, match="image_size must be a positive multiple of the total stride 8; got 36"):
        space.resized(36)
