"""cross_entropy: loss and gradient against a float64 formula, counts as torch.argmax has them, odd labels, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.cross_entropy import cross_entropy, cross_entropy_reference
from oracles import assert_no_worse
from stacked import BACKENDS, assert_guards_hold, device_for, guarded, needs_cpp, needs_triton

# images, classes: smallest; odd; a training batch; CIFAR-100's, several programs and threads; a row longer than a tile
SHAPES = [(1, 1), (3, 7), (128, 10), (300, 100), (5, 1200)]


def make_inputs(shape: tuple[int, int], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = scale * torch.randn(shape, generator=generator)
    return logits, torch.randint(shape[1], shape[:1], generator=generator)


def formula(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient, image by image, in the dtype of the logits."""
    p = (logits - logits.max(1, keepdim=True)[0]).exp()
    p = p / p.sum(1, keepdim=True)
    losses = torch.stack([-row[label].log() for row, label in zip(p, labels.tolist(), strict=True)])
    return losses.mean(), (p - torch.eye(logits.shape[1], dtype=p.dtype)[labels]) / len(labels)


def run(backend: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, int, Tensor]:
    """Loss, count and gradient."""
    device = device_for(backend)
    leaf = logits.clone().to(device).requires_grad_()
    loss, correct = cross_entropy(leaf, labels.to(device), backend=backend)
    assert correct.dtype == torch.int64
    loss.backward()
    assert leaf.grad is not None
    return loss.detach().cpu(), int(correct), leaf.grad.cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [3.0, 40.0])  # 40: probabilities that underflow, losses of 100
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_eager(shape: tuple[int, int], scale: float, backend: str) -> None:
    logits, labels = make_inputs(shape, scale)
    oracle_loss, oracle_gradient = formula(logits.double(), labels)
    eager = logits.clone().requires_grad_()
    eager_loss = F.cross_entropy(eager, labels)
    eager_loss.backward()
    loss, correct, gradient = run(backend, logits, labels)
    assert_no_worse(loss, eager=eager_loss, oracle=oracle_loss)
    assert_no_worse(gradient, eager=eager.grad, oracle=oracle_gradient)
    assert correct == int((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_prediction_keeps_its_small_gradient(backend: str) -> None:
    logits = torch.tensor([[0.0, 18.0, -3.0]])
    _, wanted = formula(logits.double(), torch.tensor([1]))
    _, _, gradient = run(backend, logits, torch.tensor([1]))
    relative = ((gradient - wanted) / wanted).abs()
    if backend == "reference":  # p - 1 in float32 is 0 or one unit, 6e-8
        relative = relative[:, [0, 2]]
    assert relative.max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_scales(backend: str) -> None:
    logits, labels = make_inputs(SHAPES[1])
    device = device_for(backend)
    leaf = logits.clone().to(device).requires_grad_()
    loss, _ = cross_entropy(leaf, labels.to(device), backend=backend)
    (3 * loss).backward()
    torch.testing.assert_close(leaf.grad.cpu(), 3 * run(backend, logits, labels)[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_nan_are_torch_argmax(backend: str) -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0.0, 2, 2], [5, nan, 1], [inf, nan, nan], [nan, nan, nan], [0, inf, inf]])
    best = logits.argmax(1)
    assert best.tolist() == [1, 1, 1, 0, 1]
    for shift in range(3):
        labels = (best + torch.tensor([0, 0, shift, shift, shift])) % 3
        loss, correct, _ = run(backend, logits, labels)
        assert correct == int((best == labels).sum())
        assert loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, 7, -100])
def test_a_label_outside_the_classes_makes_the_loss_nan(label: int, backend: str) -> None:
    logits, labels = make_inputs(SHAPES[1])
    labels[1] = label
    loss, correct, gradient = run(backend, logits, labels)
    assert loss.isnan()
    assert correct == int((logits.argmax(1) == labels).sum())
    assert (gradient[1] == 0).all()
    assert gradient[[0, 2]].isfinite().all()


@needs_cpp
def test_result_does_not_depend_on_the_number_of_threads() -> None:
    logits, labels = make_inputs((300, 100))
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", logits, labels))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*results, strict=True))


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_stays_in_bounds(shape: tuple[int, int]) -> None:
    from bmsn.kernels.cross_entropy import launch_cross_entropy

    device = device_for("triton")
    logits, labels = (guarded(t.to(device)) for t in make_inputs(shape))
    outputs = {"loss": torch.empty(()), "correct": torch.empty((), dtype=torch.int64), "gradient": torch.empty(shape)}
    outputs = {name: guarded(t.to(device), poison=True) for name, t in outputs.items()}
    launch_cross_entropy(logits, labels, *outputs.values())
    assert_guards_hold(**outputs)
    loss, correct, gradient = run("triton", *make_inputs(shape))
    assert torch.equal(outputs["loss"].cpu(), loss)
    assert int(outputs["correct"]) == correct
    assert torch.equal(outputs["gradient"].cpu(), gradient)


def test_gradcheck() -> None:
    logits, labels = make_inputs((4, 5))
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels)[0], (leaf,))


def test_reference_is_torchs() -> None:
    logits, labels = make_inputs(SHAPES[2])
    torch.testing.assert_close(cross_entropy_reference(logits, labels)[0], F.cross_entropy(logits, labels))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck(backend: str) -> None:
    logits, labels = (t.to(device_for(backend)) for t in make_inputs(SHAPES[1]))
    torch.library.opcheck(torch.ops.bmsn.cross_entropy.default, (logits, labels, backend))


def test_bad_input() -> None:
    logits, labels = make_inputs(SHAPES[1])
    with pytest.raises(InputError, match=r"logits must be float32 or float64 .* got torch.bfloat16"):
        cross_entropy(logits.bfloat16(), labels)
    for bad in (logits[0], logits.mT, logits[:, :0]):
        with pytest.raises(InputError, match=r"logits must be \(N, K\), contiguous, with at least 1 of each"):
            cross_entropy(bad, labels)
    for bad in (labels.int(), labels[:2], labels.to("meta")):
        with pytest.raises(InputError, match=r"labels must be \(3,\), contiguous, torch.int64 on cpu"):
            cross_entropy(logits, bad)
    with pytest.raises(InputError, match="cross_entropy has only: reference"):
        cross_entropy(logits.double(), labels, backend="cpp")
