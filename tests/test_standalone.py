"""The engine that trains one network alone: against a plain torch loop, its randomness, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bmsn
import bmsn.standalone
from bmsn.data import BatchStream, ImageDataset, normalisation, normalisation_table
from bmsn.engine import GraphMemoryError
from bmsn.paths import ResolutionPath
from bmsn.standalone import TrainingSettings, count_correct, initial_network, train_alone
from global_state import unchanged
from searching import tiny_images

CPU = torch.device("cpu")
SPACE = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
SETTINGS = TrainingSettings(epochs=3, batch_size=16, lr=0.1, min_lr=0.01, momentum=0.8, weight_decay=1e-2)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return tiny_images()


def plain_loop(network, stream, settings, lr_of):
    """The same training, written out: no momentum buffers of torch, no autocast, no schedule of ours."""
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for step in range(settings.epochs * stream.steps_per_epoch):
        images, labels = stream.batch(step)
        loss = F.cross_entropy(network(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(settings.momentum).add_(g + settings.weight_decay * p)
                p.sub_(lr_of(step) * v)
    return network.eval()


@pytest.mark.parametrize("half", [False, True], ids=["all images", "some of them"])
def test_weights_are_those_of_a_plain_loop(data, monkeypatch, half):
    monkeypatch.setattr(bmsn.standalone, "compute_dtype", lambda device: torch.float32)
    indices = np.arange(len(data.train_labels))[:: 2 if half else 1]
    architecture = SPACE.find("3,2,2")
    trained = train_alone(SPACE, architecture, data, SETTINGS, seed=7, device=CPU, indices=indices if half else None)

    table = normalisation_table(*normalisation(data.train_images, indices))
    stream = BatchStream(
        data.train_images, data.train_labels, indices, table,
        batch_size=16, dtype=torch.float32, seed=7, purpose="standalone", augment=True,
    )  # fmt: skip
    num_steps = 3 * (len(indices) // 16)
    # torch's own schedule as the oracle of ours
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, num_steps, eta_min=0.01)
    rates = []
    for _ in range(num_steps):
        rates.append(cosine.get_last_lr()[0])
        dummy.step()
        cosine.step()
    network = initial_network(SPACE, architecture, data, 7)
    expected = plain_loop(network, stream, SETTINGS, rates.__getitem__)

    for (name, value), (_, oracle) in zip(
        trained.network.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(value, oracle, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    images = table[torch.from_numpy(data.test_images).int(), torch.arange(3)].permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = expected(images).argmax(1).numpy()
    assert trained.total == len(data.test_labels) == 36
    assert abs(trained.correct - (predicted == data.test_labels).sum()) <= 1  # a tie within rounding
    assert trained.accuracy == 100 * trained.correct / 36


def test_a_gradient_that_is_not_finite_stops_it_even_if_the_last_loss_is(data, monkeypatch):
    """A step whose update was left out would go unnoticed, were only the loss of step 25 looked at."""
    step, calls = bmsn.standalone.arena_step, []

    def third_fails(*arguments, **options):
        loss, correct = step(*arguments, **options)
        calls.append(loss)
        return (loss * torch.nan if len(calls) == 3 else loss), correct

    monkeypatch.setattr(bmsn.standalone, "arena_step", third_fails)
    with pytest.raises(bmsn.RunStopped, match="not finite at step 24 of 24"):
        train_alone(SPACE, SPACE[0], data, SETTINGS, seed=0, device=CPU)
    assert calls[-1].isfinite()


@pytest.mark.parametrize("part", ["arena_step", "count_correct"])
def test_out_of_memory_stops_it(data, monkeypatch, part):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(bmsn.standalone, part, full)
    with pytest.raises(bmsn.RunStopped, match=r"architecture \[1,1,5\], seed 4: out of memory on cpu.*allocate 2 GiB"):
        train_alone(SPACE, SPACE[0], data, SETTINGS, seed=4, device=CPU)


def test_every_test_image_is_counted(data, monkeypatch):
    """36 images in batches of 10: the last one is short."""
    monkeypatch.setattr(bmsn.standalone, "_TEST_BATCH", 10)
    seen = []

    def network(images):
        seen.append(len(images))
        return F.one_hot(torch.full((len(images),), 2), 4)

    table = torch.zeros(256, 3)
    assert count_correct(network, data.test_images, data.test_labels, table, torch.float32, CPU) == 9
    assert seen == [10, 10, 10, 6]


def test_the_same_seed_gives_the_same_network_and_another_one_another(data):
    def weights(seed):
        return train_alone(SPACE, SPACE[0], data, SETTINGS, seed=seed, device=CPU).network.state_dict()

    with unchanged():
        first = weights(0)
    again, other = weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.2.weight"], other["head.2.weight"])


class NeverLooks(TorchDispatchMode):
    """Raises where the host reads a tensor's value: a step that does cannot be recorded."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), op
        return op(*args, **(kwargs or {}))


def test_a_step_looks_at_no_value(data, monkeypatch):
    plain, looked = bmsn.standalone._Training.step, []

    def watched(training):
        with NeverLooks():
            plain(training)
        looked.append(training)

    monkeypatch.setattr(bmsn.standalone._Training, "step", watched)
    train_alone(SPACE, SPACE[0], data, SETTINGS, seed=0, device=CPU)
    assert len(looked) == 24
    with pytest.raises(AssertionError, match="local_scalar"), NeverLooks():
        torch.zeros(()).item()


class Replayed:
    """Records steps as a GPU does: warms up, runs nothing of the step, and repeats it later."""

    def __init__(self, *, has_memory: bool = True) -> None:
        self.warmed_up, self.replayed, self._has_memory = 0, 0, has_memory

    def capture(self, warm_up, step):
        warm_up()
        self.warmed_up += 1
        if not self._has_memory:
            raise GraphMemoryError("more than 1 GiB were needed")
        self._step = step
        return self

    def replay(self):
        self.replayed += 1
        self._step()


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_recorded_step_trains_as_an_eager_one(data, monkeypatch, caplog, has_memory):
    def weights():
        return train_alone(SPACE, SPACE[3], data, SETTINGS, seed=2, device=CPU).network.state_dict()

    eager, graphs = weights(), Replayed(has_memory=has_memory)
    monkeypatch.setattr(bmsn.standalone, "graph_backend", lambda engine, device: graphs)
    recorded = weights()
    assert graphs.warmed_up == 1
    assert graphs.replayed == (24 if has_memory else 0)
    assert ["going on eagerly" in record.message for record in caplog.records] == [True] * (not has_memory)
    assert all(torch.equal(eager[name], recorded[name]) for name in eager)


def test_it_learns_and_says_how_far_it_is(data):
    shares: list[float] = []
    settings = TrainingSettings(epochs=15, batch_size=16)
    trained = train_alone(SPACE, SPACE.default, data, settings, seed=0, device=CPU, progress=shares.append)
    assert trained.accuracy > 60  # chance is 25
    assert shares == [25 / 120, 50 / 120, 75 / 120, 100 / 120, 1.0]


def test_milestones_multiply_the_learning_rate(data, monkeypatch):
    rates: list[float] = []
    step = bmsn.standalone.arena_step

    def watched(*arguments, lr, **options):
        rates.append(lr.item())
        return step(*arguments, lr=lr, **options)

    monkeypatch.setattr(bmsn.standalone, "arena_step", watched)
    settings = TrainingSettings(epochs=1, batch_size=16, milestones=(0.5, 0.75), factor=0.2)
    train_alone(SPACE, SPACE[0], data, settings, seed=0, device=CPU)
    np.testing.assert_allclose(rates, [0.1] * 4 + [0.02] * 2 + [0.004] * 2, rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_it(data):
    settings = TrainingSettings(epochs=10, batch_size=16, lr=100.0, momentum=1.0, weight_decay=1.0)
    with pytest.raises(bmsn.RunStopped, match=r"\[1,1,5\], seed 3: the loss is not finite at step \d+ of 80"):
        train_alone(SPACE, SPACE[0], data, settings, seed=3, device=CPU)


def test_bad_input(data):
    for changes, message in [
        (dict(epochs=0), "epochs must be in .1, 1000000.; got 0"),
        (dict(batch_size=1), "batch_size must be in"),
        (dict(lr=-1.0), "lr must be in"),
        (dict(lr=0.1, min_lr=0.2), r"min_lr must be in \[0, 0.1\]; got 0.2"),
        (dict(milestones=(0.5, 0.5)), "milestones must rise"),
        (dict(milestones=(0.5, 1.0)), "milestones must rise"),
        (dict(weight_decay=float("nan")), "weight_decay must be in"),
    ]:
        with pytest.raises(bmsn.InputError, match=message):
            TrainingSettings(**changes)
    foreign = bmsn.SearchSpace.named("resnet20-cifar10")[0]
    with pytest.raises(bmsn.InputError, match="is not in resnet14-cifar10"):
        train_alone(SPACE, foreign, data, SETTINGS, seed=0, device=CPU)
    with pytest.raises(bmsn.InputError, match=r"batch_size must be in 2\.\.128"):
        train_alone(SPACE, SPACE[0], data, TrainingSettings(), seed=0, device=CPU)
    large = bmsn.SearchSpace.named("resnet18-imagenet", width=0.1)
    with pytest.raises(bmsn.InputError, match="images of 8 pixels; resnet18-imagenet needs a multiple of 32"):
        train_alone(large, large[0], data, SETTINGS, seed=0, device=CPU)
    empty = ImageDataset(
        name="blind", train_images=data.train_images, train_labels=data.train_labels,
        test_images=data.test_images[:0], test_labels=data.test_labels[:0], class_names=data.class_names,
    )  # fmt: skip
    with pytest.raises(bmsn.InputError, match="blind: has no test images"):
        train_alone(SPACE, SPACE[0], empty, SETTINGS, seed=0, device=CPU)


def test_a_path_outside_the_space_is_trained_as_it_is(data):
    """What a search over resolutions finds may go up again; the path of an architecture is that architecture."""
    path = ResolutionPath((0, 1, 0, 2, 2, 1, 1))
    settings = TrainingSettings(epochs=15, batch_size=16)
    trained = train_alone(SPACE, path, data, settings, seed=0, device=CPU)
    assert any(isinstance(module, torch.nn.Upsample) for module in trained.network.modules())
    assert trained.accuracy > 60
    assert repr(trained.network) == repr(initial_network(SPACE, path, data, 1).eval())
    with pytest.raises(bmsn.InputError, match=r"path 0-1 does not fit resnet14-cifar10: expected 7 resolutions"):
        train_alone(SPACE, ResolutionPath((0, 1)), data, settings, seed=0, device=CPU)
