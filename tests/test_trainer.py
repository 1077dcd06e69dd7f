"""The training step: against torch's own optimiser, without a look at any value, masked where it is not finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bmsn.errors import InputError, RunStopped
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from bmsn.trainer import batch_accuracy, device_step, out_of_memory_said, train_step, working_copies
from stacked import channels_last, needs_cpp

SETTINGS = dict(momentum=0.9, weight_decay=1e-3)


def make_nets(name: str = "resnet20-cifar10", **options: object) -> SupernetMixture:
    space = SearchSpace.named(name, width=0.25, **options)
    return SupernetMixture(space, 2, 5, generator=torch.Generator().manual_seed(0))


def make_batch(dtype: torch.dtype, num_images: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_images, 3, 16, 16, generator=generator, dtype=torch.float64)
    return channels_last(images.to(dtype)), torch.randint(5, (num_images,), generator=generator)


@pytest.mark.parametrize("pool", ["max", "stride"])
def test_steps_are_those_of_torchs_optimiser(pool: str) -> None:
    """Two architectures and both rows in turn, in float64: a momentum row is its supernet's own."""
    nets, (images, labels) = make_nets(pool=pool).double(), make_batch(torch.float64)
    velocity = torch.zeros_like(nets.arena.detach())
    parameters = [nets.arena.detach()[m].clone().requires_grad_() for m in range(2)]
    optimisers = [torch.optim.SGD([p], lr=0.1, **SETTINGS) for p in parameters]
    for step, (m, index) in enumerate([(0, 0), (1, 20), (1, 0), (0, 35), (0, 20)]):
        architecture, lr = nets.space[index], 0.1 / (1 + step)
        optimisers[m].zero_grad()
        wanted = F.cross_entropy(nets.forward_row(parameters[m], images, architecture), labels)
        wanted.backward()
        optimisers[m].param_groups[0]["lr"] = lr
        optimisers[m].step()
        loss = train_step(nets, velocity, architecture, m, images, labels, lr=lr, **SETTINGS)
        assert loss == pytest.approx(wanted.item(), rel=1e-12)
        for row, parameter in zip(nets.arena.detach(), parameters, strict=True):
            torch.testing.assert_close(row, parameter.detach(), rtol=1e-9, atol=1e-12)


@needs_cpp
def test_working_copies_change_nothing() -> None:
    images, labels = make_batch(torch.bfloat16)
    results = []
    for kept in (False, True):
        nets = make_nets()
        velocity = torch.zeros_like(nets.arena.detach())
        copies = working_copies(nets, torch.bfloat16) if kept else None
        losses = [
            train_step(nets, velocity, nets.space[a], m, images, labels, lr=0.1, copies=copies, **SETTINGS)
            for a, m in ((0, 0), (20, 1), (5, 1), (20, 0))
        ]
        results.append((losses, nets.arena.detach(), velocity))
        if copies is not None:
            assert torch.equal(copies, nets.arena.detach().bfloat16())
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])
    assert working_copies(make_nets(), torch.float32) is None


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(spoilt: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMSN_BACKEND", backend)
    nets, (images, labels) = make_nets(), make_batch(torch.float32)
    if spoilt == "loss":
        images[3, 1, 2, 2] = torch.nan
    else:
        real = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *args: [g * torch.inf for g in real(*args)])
    velocity = torch.ones_like(nets.arena.detach())
    before = nets.arena.detach().clone()
    loss = train_step(nets, velocity, nets.space.default, 1, images, labels, lr=0.1, **SETTINGS)
    assert loss != loss
    assert torch.equal(nets.arena.detach(), before)
    assert (velocity == 1).all()


@pytest.mark.parametrize(
    ("space", "supernet", "message"),
    [
        ("resnet18-cifar10", 0, r"architecture \[1,1,1,6\] \(index 0\) is not in resnet20-cifar10"),
        ("resnet14-cifar10", 0, r"architecture \[1,1,5\] \(index 0\) is not in resnet20-cifar10"),
        ("resnet20-cifar10", 5, r"supernet must be in 0\.\.1; got 5"),
        ("resnet20-cifar10", -1, r"supernet must be in 0\.\.1; got -1"),
    ],
)
def test_a_pair_that_is_not_there_is_bad_input(space: str, supernet: int, message: str) -> None:
    """Any places for the poolings would do for the forward pass, and row -1 for the accuracy."""
    nets, (images, labels) = make_nets(), make_batch(torch.float32)
    architecture, velocity = SearchSpace.named(space)[0], torch.zeros_like(nets.arena.detach())
    before = nets.arena.detach().clone()
    with pytest.raises(InputError, match=message):
        train_step(nets, velocity, architecture, supernet, images, labels, lr=0.1, **SETTINGS)
    with pytest.raises(InputError, match=message):
        batch_accuracy(nets, architecture, supernet, images, labels)
    assert torch.equal(nets.arena.detach(), before)


def test_the_count_is_that_of_the_logits() -> None:
    nets, (images, labels) = make_nets(), make_batch(torch.float32, 32)
    logits = nets(images, nets.space.default, 1)
    row, lr = torch.tensor(1), torch.tensor(0.1)
    velocity = torch.zeros_like(nets.arena.detach())
    loss, correct = device_step(nets, velocity, None, nets.space.default, row, images, labels, lr=lr, **SETTINGS)
    assert int(correct) == int((logits.argmax(1) == labels).sum())
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert not loss.requires_grad


@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet50-food101"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_looks_at_no_value(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, where .item(), bool() and nonzero() raise: what a CUDA graph can hold."""
    monkeypatch.setenv("BMSN_BACKEND", "reference")
    with FakeTensorMode():
        nets = make_nets(name)
        size = 2 * nets.space.total_stride
        images = channels_last(torch.empty(4, 3, size, size, dtype=dtype))
        labels, row, lr = torch.empty(4, dtype=torch.int64), torch.empty((), dtype=torch.int64), torch.empty(())
        with pytest.raises(DataDependentOutputException):
            row.item()
        velocity, copies = torch.zeros_like(nets.arena.detach()), working_copies(nets, dtype)
        for architecture in (nets.space[0], nets.space.default):
            loss, correct = device_step(
                nets, velocity, copies, architecture, row, images, labels, lr=lr, **SETTINGS
            )  # fmt: skip
            assert (loss.shape, loss.dtype) == ((), torch.float32)
            assert (correct.shape, correct.dtype) == ((), torch.int64)


def test_out_of_memory_is_said_with_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    message = r"^step 7: out of memory on cuda at a peak of 3\.00 GiB; a smaller batch_size may help \(CUDA.*2 GiB\.\)$"
    with pytest.raises(RunStopped, match=message), out_of_memory_said(lambda: "step 7", torch.device("cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")


def test_a_full_host_is_said_too_and_other_errors_are_left_alone() -> None:
    """The host's memory may be what is missing on a machine with a GPU."""
    message = r"^now: out of memory on cpu;.*tried to allocate 4503599627370496 bytes"
    with pytest.raises(RunStopped, match=message), out_of_memory_said(lambda: "now", torch.device("cuda")):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shape") as caught, out_of_memory_said(lambda: "now", torch.device("cpu")):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not isinstance(caught.value, RunStopped)
