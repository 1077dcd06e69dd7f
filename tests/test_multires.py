"""Networks with weights for each (layer, resolution), and with every resolution at once, against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bmsn.methods.multires import (
    count_correct_paths,
    forward_mixed,
    forward_path,
    gather_path,
    path_places,
    scatter_path,
)
from bmsn.network import SupernetMixture, build_path_network
from bmsn.paths import ResolutionPath, architecture_path, num_paths, path_by_index
from bmsn.space import SearchSpace

# A basic block and a small stem; a bottleneck; a large stem.
SPACES = {
    "basic": SearchSpace(5, 2, (4, 4, 6, 6, 8), pool="max", image_size=8),
    "bottleneck": SearchSpace(4, 1, (2, 2, 3, 3), block="bottleneck", pool="max", image_size=8),
    "large stem": SearchSpace(3, 1, (4, 4, 6), stem="large", pool="avg", image_size=32),
}


def make_nets(space, rows):
    return SupernetMixture(space, rows, 4, generator=torch.Generator().manual_seed(3)).double()


def make_images(space, number=4):
    images = torch.randn(number, 3, space.image_size, space.image_size, generator=torch.Generator().manual_seed(5))
    return images.double().contiguous(memory_format=torch.channels_last)


def batch_norm(x):
    return F.batch_norm(x, None, None, training=True)


def plain_block(x, layer, w):
    """A layer as a reader of He et al. writes it, with batch statistics and no affine step."""
    y = x
    for place, conv in enumerate(layer.main):
        y = batch_norm(F.conv2d(F.relu(y) if place else y, w[conv.name], padding=conv.kernel // 2))
    if layer.kind == "stem":
        return F.relu(y)
    return F.relu(y + (batch_norm(F.conv2d(x, w["shortcut"])) if layer.shortcut else x))


def plain_mixed(space, weights_of, images, logits_alpha):
    """Eq. 4 and 5, written out: no reuse of poolings, pixels repeated by index."""
    weights = weights_of(0)
    x = images
    if space.stem == "large":
        x = F.max_pool2d(F.relu(batch_norm(F.conv2d(x, weights.stem, stride=2, padding=3))), 3, 2, 1)
    x = plain_block(x, space.layers[0], weights.layers[0])
    pool = F.max_pool2d if space.pool == "max" else F.avg_pool2d
    for index in range(1, space.num_layers):
        share = torch.exp(logits_alpha[index]) / torch.exp(logits_alpha[index]).sum()
        total = torch.zeros(())
        for r in range(space.num_pools + 1):
            y = plain_block(pool(x, 2**r) if r else x, space.layers[index], weights_of(r).layers[index])
            y = y.repeat_interleave(2**r, 2).repeat_interleave(2**r, 3)
            total = total + share[r] * y
        x = total
    return F.linear(x.mean((2, 3)), weights.head_weight, weights.head_bias)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("name", SPACES)
def test_mixed_network_and_its_gradients_are_those_of_eq_4(name, shared):
    space = SPACES[name]
    nets = make_nets(space, 1 if shared else space.num_pools + 1)
    images, labels = make_images(space), torch.tensor([0, 1, 2, 3])
    alpha = torch.randn(space.num_layers, space.num_pools + 1, dtype=torch.double).requires_grad_()

    def weights_of(r):
        return nets.weights(nets.arena[0 if shared else r], torch.double)

    ours = forward_mixed(nets, nets.arena, images, alpha.softmax(1))
    plain = plain_mixed(space, weights_of, images, alpha)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    found, expected = (
        torch.autograd.grad(F.cross_entropy(logits, labels), (alpha, nets.arena)) for logits in (ours, plain)
    )
    assert expected[0][1:].abs().min() > 1e-6  # every share matters
    for gradient, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-7, atol=1e-9)
    assert found[0][0].eq(0).all()  # layer 0 has no choice


@pytest.mark.parametrize("name", SPACES)
def test_with_one_resolution_chosen_in_each_layer_it_is_the_path(name):
    space = SPACES[name]
    nets = make_nets(space, space.num_pools + 1)
    images = make_images(space)
    for index in (0, num_paths(space) // 2, num_paths(space) - 2):
        path = path_by_index(space, index)
        shares = F.one_hot(torch.tensor(path.resolutions), space.num_pools + 1).double()
        mixed = forward_mixed(nets, nets.arena, images, shares)
        row = gather_path(nets, nets.arena, path)
        torch.testing.assert_close(mixed, forward_path(nets, row, images, path), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_a_path_is_the_plain_network_in_training_mode(name):
    """Affine BatchNorm at its start (scale 1, shift 0) with batch statistics is the supernet's."""
    space = SPACES[name]
    nets = make_nets(space, space.num_pools + 1)
    images = make_images(space)
    for index in range(0, num_paths(space), 5):
        path = path_by_index(space, index)
        weights = [nets.weights(row, torch.double) for row in nets.arena]
        own = ([] if space.stem == "small" else [weights[0].stem]) + [
            w for layer, r in enumerate(path.resolutions) for w in weights[r].layers[layer].values()
        ]
        network = build_path_network(space, path, num_classes=4).double().train()
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        with torch.no_grad():
            for module, weight in zip(convolutions, own, strict=True):
                module.weight.copy_(weight)
            network.head[-1].weight.copy_(weights[0].head_weight)
            network.head[-1].bias.copy_(weights[0].head_bias)
        row = gather_path(nets, nets.arena, path)
        torch.testing.assert_close(forward_path(nets, row, images, path), network(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
def test_with_equal_weights_an_architecture_is_that_of_the_supernet(pool):
    space = SearchSpace.named("resnet14-cifar10", width=0.25, pool=pool)
    nets = make_nets(space, 3)
    with torch.no_grad():
        nets.arena[1:] = nets.arena[0]
    images = make_images(SPACES["basic"])
    for architecture in space:
        path = architecture_path(space, architecture)
        row = gather_path(nets, nets.arena, path)
        assert torch.equal(row, nets.arena[0])
        torch.testing.assert_close(
            forward_path(nets, row, images, path), nets(images, architecture, 0), rtol=1e-10, atol=1e-10
        )


def test_places_follow_the_path_and_put_back_nothing_else():
    space = SPACES["basic"]
    nets = make_nets(space, 3)
    path = ResolutionPath((0, 2, 1, 1, 0))
    before = nets.arena.detach().clone()
    rows = nets.arena.detach()
    # Of each weight its number: views tell which layer it belongs to, whatever the order in a row.
    numbers = nets.weights(torch.arange(rows.shape[1]).double(), torch.double)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for layer, r in zip(numbers.layers, path.resolutions, strict=True):
        for view in layer.values():
            mask[r, view.flatten().long()] = True
    for view in (numbers.head_weight, numbers.head_bias):
        mask[0, view.flatten().long()] = True

    found = torch.zeros_like(mask)
    for row, columns in path_places(nets, path):
        found[row, columns] = True
    assert torch.equal(found, mask)
    assert torch.equal(gather_path(nets, rows, path), rows.T[mask.T])
    scatter_path(nets, rows, path, gather_path(nets, rows, path) + 1)
    assert torch.equal(rows, before + mask)


def test_counts_are_those_of_one_path_at_a_time():
    space = SPACES["basic"]
    nets = make_nets(space, 3)
    images, labels = make_images(space, 22), torch.arange(22) % 4
    paths = [path_by_index(space, i) for i in (0, 1, 40, 41, 80, 13)]
    mean = forward_path(nets, gather_path(nets, nets.arena, paths[0]), images, paths[0]).mean(0)
    with torch.no_grad():
        nets.arena[0, -4:] -= mean  # the bias: no class is always the largest
    expected = [
        sum(
            (
                forward_path(nets, gather_path(nets, nets.arena, p), images[s : s + 8], p).argmax(1)
                == labels[s : s + 8]
            ).sum()
            for s in (0, 8, 16)
        )
        for p in paths
    ]
    found = count_correct_paths(nets, images, labels, paths, batch_size=8)
    assert found.tolist() == [int(n) for n in expected]
    assert len(set(found.tolist())) > 2


def test_layers_that_paths_share_are_computed_once(monkeypatch):
    from bmsn.methods import multires

    space = SPACES["basic"]
    nets, calls = make_nets(space, 3), []
    real = multires.run_layer
    monkeypatch.setattr(multires, "run_layer", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    paths = [path_by_index(space, i) for i in range(num_paths(space))]
    count_correct_paths(nets, make_images(space), torch.zeros(4, dtype=torch.int64), paths, batch_size=4)
    assert len(calls) == 1 + 3 + 9 + 27 + 81


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtypes_of_training(dtype):
    """Layouts that the ops ask for survive pooling, repeating and weighting; errors are those of the dtype."""
    space = SearchSpace.named("resnet14-cifar10", width=0.5)
    nets = make_nets(space, 3).float()
    # seeded: with one set of images in ten a value lies so near 0 that float32 and float64 disagree about ReLU
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images, labels = images.contiguous(memory_format=torch.channels_last), torch.arange(8) % 4
    shares = torch.full((7, 3), 1 / 3).requires_grad_()
    path = ResolutionPath((0, 2, 0, 1, 2, 0, 1))

    def loss(dtype, rows):
        own = images.to(dtype)
        mixed = forward_mixed(nets, rows, own, shares)
        return F.cross_entropy(mixed, labels) + F.cross_entropy(
            forward_path(nets, gather_path(nets, rows, path), own, path), labels
        )

    oracle = torch.autograd.grad(loss(torch.double, nets.arena.double()), shares)[0]
    value = loss(dtype, nets.arena)
    found = torch.autograd.grad(value, (shares, nets.arena))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (found[0] - oracle).norm() < tolerance * oracle.norm()
    assert found[1].isfinite().all()
    assert found[1].dtype == torch.float32
