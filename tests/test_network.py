"""The networks, against a plain ResNet-20 written here on its own; the arena and its views."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from bmsn.errors import InputError
from bmsn.network import SupernetMixture, build_network
from bmsn.space import SPACES, SearchSpace


def plain_resnet20(
    weights: list[torch.Tensor], head: tuple[torch.Tensor, torch.Tensor], pools: tuple[int, ...], x: torch.Tensor
):
    """ResNet-20 with batch statistics and no affine step, as a reader of the papers writes it: nothing of bmsn's."""

    def norm(t):
        return F.batch_norm(t, None, None, training=True, eps=1e-5)

    convs = iter(weights)
    x = F.relu(norm(F.conv2d(x, next(convs), padding=1)))
    for layer in range(1, 10):
        if layer in pools:
            x = F.max_pool2d(x, kernel_size=2, stride=2)
        y = F.relu(norm(F.conv2d(x, next(convs), padding=1)))
        y = norm(F.conv2d(y, next(convs), padding=1))
        if layer in (4, 7):  # 16 -> 32, 32 -> 64 channels
            x = norm(F.conv2d(x, next(convs)))
        x = F.relu(x + y)
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), *head)


def test_supernet_agrees_with_a_plain_resnet20_for_all_architectures():
    torch.manual_seed(0)
    space = SearchSpace.named("resnet20-cifar10", width=0.5)
    nets = SupernetMixture(space, num_supernets=2, num_classes=5).double()
    images = torch.randn(6, 3, 16, 16, dtype=torch.double)
    for architecture in space:
        for supernet in range(2):
            weights = nets.weights(nets.arena[supernet], torch.double)
            convs = [w for layer in weights.layers for w in layer.values()]
            expected = plain_resnet20(
                convs, (weights.head_weight, weights.head_bias), architecture.pool_positions, images
            )
            torch.testing.assert_close(nets(images, architecture, supernet), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("name", SPACES)
def test_supernet_agrees_with_the_standalone_network(name, pool):
    """The same weights in both; affine BatchNorm at its start (scale 1, shift 0) in training mode is the supernet's."""
    torch.manual_seed(1)
    space = SearchSpace.named(name, width=0.125, pool=pool)
    nets = SupernetMixture(space, 1, num_classes=4).double()
    size = space.total_stride * 2
    images = torch.randn(3, 3, size, size, dtype=torch.double)
    for architecture in (space[0], space.default, space[len(space) - 1]):
        network = build_network(space, architecture, num_classes=4).double().train()
        weights = nets.weights(nets.arena[0], torch.double)
        convs = ([] if weights.stem is None else [weights.stem]) + [
            w for layer in weights.layers for w in layer.values()
        ]
        modules = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert [m.weight.shape for m in modules] == [w.shape for w in convs]
        with torch.no_grad():
            for module, weight in zip(modules, convs, strict=True):
                module.weight.copy_(weight)
            network.head[-1].weight.copy_(weights.head_weight)
            network.head[-1].bias.copy_(weights.head_bias)
        torch.testing.assert_close(nets(images, architecture, 0), network(images), rtol=1e-9, atol=1e-9)


def test_standalone_network_has_nothing_of_bmsn_but_its_block():
    network = build_network(SearchSpace.named("resnet20-cifar10"), SearchSpace.named("resnet20-cifar10").default)
    names = {type(m).__module__.split(".")[0] for m in network.modules()}
    assert names == {"torch", "bmsn"}
    assert {type(m).__name__ for m in network.modules() if type(m).__module__.startswith("bmsn")} == {"ResidualBlock"}
    graph = torch.export.export(network.eval(), (torch.zeros(1, 3, 32, 32),)).graph
    operators = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in operators
    assert all(operator.startswith("aten.") for operator in operators)


def make_nets(num_supernets=3):
    return SupernetMixture(
        SearchSpace.named("resnet14-cifar10", width=0.25), num_supernets, 4, generator=torch.Generator().manual_seed(3)
    )


def save_and_load(nets):
    file = io.BytesIO()
    torch.save(nets.state_dict(), file)
    file.seek(0)
    other = make_nets()
    other.reset_parameters(torch.Generator().manual_seed(9))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda n: n.double().float(), lambda n: pickle.loads(pickle.dumps(n)), save_and_load],
    ids=["deepcopy", "double and back", "pickle", "state_dict"],
)
def test_views_stay_one_storage_with_the_arena(change):
    nets = make_nets()
    images = torch.randn(4, 3, 8, 8)
    architecture = nets.space.default
    before = nets(images, architecture, 1)
    changed = change(nets)
    assert torch.equal(changed(images, architecture, 1), before)
    assert torch.equal(changed.pixel_table, nets.pixel_table)
    weights = changed.weights(changed.arena[1], changed.arena.dtype)
    views = [*(w for layer in weights.layers for w in layer.values()), weights.head_weight, weights.head_bias]
    assert {v.untyped_storage().data_ptr() for v in views} == {changed.arena.untyped_storage().data_ptr()}
    with torch.no_grad():
        changed.arena[1].mul_(2)
    assert not torch.equal(changed(images, architecture, 1), before)


def test_only_the_trained_row_gets_a_gradient_and_convolution_weights_are_channels_last():
    nets = make_nets()
    nets(torch.randn(4, 3, 8, 8), nets.space[2], 1).square().sum().backward()
    assert nets.arena.grad[1].abs().max() > 0
    assert nets.arena.grad[[0, 2]].abs().max() == 0
    weights = nets.weights(nets.arena[0], torch.float32)
    assert all(w.is_contiguous(memory_format=torch.channels_last) for layer in weights.layers for w in layer.values())


def test_initial_weights_come_from_the_generator_alone():
    torch.manual_seed(0)
    first = make_nets()
    torch.manual_seed(1)
    assert torch.equal(first.arena, make_nets().arena)
    assert not torch.equal(first.arena[0], first.arena[1])


def test_kaiming_fan_out():
    nets = SupernetMixture(SearchSpace.named("resnet20-cifar10"), 1, 10)
    weight = nets.weights(nets.arena[0], torch.float32).layers[8]["conv2"]
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n: n(torch.zeros(2, 3, 8, 8), SearchSpace.named("resnet20-cifar10")[0], 0), ["not in resnet14"]),
        (lambda n: n(torch.zeros(2, 3, 8, 8), n.space[0], 3), ["supernet", "0..2", "3"]),
        (lambda n: n(torch.zeros(2, 1, 8, 8), n.space[0], 0), ["(N, 3, H, W)", "(2, 1, 8, 8)"]),
        (lambda n: n(torch.zeros(2, 3, 10, 8), n.space[0], 0), ["total stride 4", "(2, 3, 10, 8)"]),
        (lambda n: n(torch.zeros(0, 3, 8, 8), n.space[0], 0), ["non-empty"]),
        (lambda n: n(torch.zeros(2, 3, 8, 8, dtype=torch.half), n.space[0], 0), ["bfloat16", "float16"]),
        (lambda n: n(torch.zeros(1, 3, 4, 4), n.space[0], 0), ["at least 2 values"]),
        (lambda n: SupernetMixture(n.space, 0, 10), ["num_supernets", "at least 1", "0"]),
        (lambda n: SupernetMixture(n.space, 1, 1), ["num_classes", "at least 2", "1"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError) as caught:
        call(make_nets())
    for word in words:
        assert word in str(caught.value)
