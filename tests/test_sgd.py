"""sgd: bit-equal to torch.optim.SGD in C++, the row on the device, the loss that masks, working copies, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.ops.sgd import sgd
from stacked import BACKENDS, assert_guards_hold, device_for, guarded, needs_cpp, needs_triton

SETTINGS = dict(momentum=0.9, weight_decay=1e-3)
# rows, weights: one; less than a vector; a chunk and a ragged end; several chunks and programs
SHAPES = [(1, 1), (3, 13), (2, 16384 + 77), (2, 70001)]


def make_arguments(shape: tuple[int, int], backend: str, row: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(shape[1])
    weights, velocity = torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(dtype)
    gradient = torch.randn(shape[1], generator=generator, dtype=torch.float64).to(dtype)
    device = device_for(backend)
    return {
        "weights": weights.to(device), "velocity": velocity.to(device), "gradient": gradient.to(device),
        "row": torch.tensor(row, device=device), "lr": torch.tensor(0.1, dtype=dtype, device=device),
        "loss": torch.tensor(1.5, dtype=dtype, device=device),
        "copies": weights.bfloat16().to(device),
    }  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_100_steps_are_torchs_bit_for_bit(shape: tuple[int, int], weight_decay: float) -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch fuses no products on this CPU")
    arguments = make_arguments(shape, "cpp", row=shape[0] - 1)
    arguments["velocity"].zero_()
    parameter = torch.nn.Parameter(arguments["weights"][-1].clone())
    others = arguments["weights"][:-1].clone()
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        gradient = torch.randn(shape[1], generator=generator)
        lr = 0.1 * (1 - step / 100)
        parameter.grad, optimiser.param_groups[0]["lr"] = gradient, lr
        optimiser.step()
        arguments |= {"gradient": gradient.clone(), "lr": torch.tensor(lr)}
        sgd(**arguments, momentum=0.9, weight_decay=weight_decay, backend="cpp")
        assert torch.equal(arguments["weights"][-1], parameter.detach()), step
    assert torch.equal(arguments["velocity"][-1], optimiser.state[parameter]["momentum_buffer"])
    assert torch.equal(arguments["copies"][-1], parameter.detach().bfloat16())
    assert torch.equal(arguments["weights"][:-1], others)


def oracle(arguments: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    weights, velocity, gradient = (arguments[name].double().cpu() for name in ("weights", "velocity", "gradient"))
    velocity[row] = 0.9 * velocity[row] + (gradient + 1e-3 * weights[row])
    weights[row] -= arguments["lr"].double().cpu() * velocity[row]
    return {"weights": weights, "velocity": velocity}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_row_is_updated_and_its_copy(shape: tuple[int, int], backend: str) -> None:
    row = shape[0] - 1
    arguments = make_arguments(shape, backend, row)
    wanted, copies = oracle(arguments, row), arguments["copies"].clone()
    sgd(**arguments, **SETTINGS, backend=backend)
    for name, value in wanted.items():
        torch.testing.assert_close(arguments[name].cpu().double(), value, rtol=3e-7, atol=3e-7)
        assert torch.equal(arguments[name][:row].cpu().double(), value[:row])
    if backend == "triton" and not arguments["weights"].is_cuda:  # the interpreter cuts off instead of rounding
        torch.testing.assert_close(arguments["copies"][row].float(), arguments["weights"][row], rtol=2**-7, atol=0)
    else:
        assert torch.equal(arguments["copies"][row], arguments["weights"][row].bfloat16())
    assert torch.equal(arguments["copies"][:row], copies[:row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_changes_nothing(loss: float, backend: str) -> None:
    arguments = make_arguments(SHAPES[1], backend, 1)
    arguments["loss"].fill_(loss)
    arguments["gradient"].fill_(torch.nan)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    sgd(**arguments, **SETTINGS, backend=backend)
    for name in ("weights", "velocity", "copies"):
        assert torch.equal(arguments[name], before[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_copies(backend: str) -> None:
    arguments, other = (make_arguments(SHAPES[1], backend, 2) for _ in range(2))
    del other["copies"]
    sgd(**arguments, **SETTINGS, backend=backend)
    sgd(**other, **SETTINGS, backend=backend)
    assert torch.equal(arguments["weights"], other["weights"])


def test_float64_runs_on_the_reference() -> None:
    arguments = make_arguments(SHAPES[1], "reference", 1, torch.float64)
    wanted = oracle(arguments, 1)
    sgd(**arguments, **SETTINGS)
    torch.testing.assert_close(arguments["weights"], wanted["weights"], rtol=1e-15, atol=1e-15)


@needs_cpp
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1, 0x7F7FFFFF, 0x3F808000, 0x3F818000])
def test_copies_round_as_torch_does(bits: int) -> None:
    """NaNs whose low bits a carry would spoil; what rounds to infinity; ties to even, downwards and upwards."""
    arguments = make_arguments((1, 40), "cpp")
    for name in ("velocity", "gradient"):
        arguments[name].zero_()
    arguments["weights"][0, 7::11] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    sgd(**arguments, momentum=0.0, weight_decay=0.0, backend="cpp")
    copies, rounded = arguments["copies"], arguments["weights"].bfloat16()
    assert torch.equal(copies.isnan(), rounded.isnan())
    assert torch.equal(copies.nan_to_num(7.0), rounded.nan_to_num(7.0))


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_stays_in_bounds(shape: tuple[int, int]) -> None:
    from bmsn.kernels.sgd import launch_sgd

    names = ("weights", "velocity", "copies", "gradient", "row", "lr", "loss")
    plain = make_arguments(shape, "triton", shape[0] - 1)
    bounded = {name: guarded(plain[name]) for name in names}
    launch_sgd(*bounded.values(), 0.9, 1e-3)
    assert_guards_hold(**bounded)
    sgd(**plain, **SETTINGS, backend="triton")
    assert torch.equal(bounded["weights"], plain["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    a = make_arguments(SHAPES[1], backend, 1)
    inputs = [a[name] for name in ("weights", "velocity", "copies", "gradient", "row", "lr", "loss")]
    torch.library.opcheck(torch.ops.bmsn.sgd.default, (*inputs, 0.9, 1e-3, backend))


def test_bad_input() -> None:
    good = make_arguments(SHAPES[1], "reference")

    def fails(message: str, error: type[Exception] = InputError, **bad: Any) -> None:
        with pytest.raises(error, match=message):
            sgd(**good | bad, **SETTINGS | {"backend": bad.pop("backend", "auto")})

    fails("weights must be .* got .*float16", weights=good["weights"].half())
    fails(r"weights must be \(M, P\)", weights=good["weights"][0])
    fails("weights must be .*contiguous", weights=good["weights"].mT.contiguous().mT)
    fails(r"velocity must be \(3, 13\)", velocity=good["velocity"][:2])
    fails(r"gradient must be \(13,\)", gradient=good["gradient"][:5])
    fails(r"row must be \(\), contiguous, torch.int64", row=good["row"].int())
    fails("lr must be .*torch.float32", lr=good["lr"].double())
    fails("loss must be .* on cpu", loss=good["loss"].to("meta"))
    fails("copies must be .*bfloat16", copies=good["weights"])


@needs_cpp
@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(IndexError, match=rf"row must be in 0\.\.2; got {row}"):
        sgd(**make_arguments(SHAPES[1], "cpp", row), **SETTINGS, backend="cpp")
