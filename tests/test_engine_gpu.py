"""The engine, batches and balance on a real GPU: CUDA graphs against eager, the GPU against the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch

from bmsn.engine import Engine, Steps, search_step, tensors_of
from bmsn.ops.batches import augment
from bmsn.ops.mixture_step import MixtureTensors, failure, mixture_step
from bmsn.standalone import TrainingSettings, train_alone
from engines import BATCH, SPACE, assert_curves_agree, make_state
from searching import tiny_images
from stacked import HAS_TRITON, INTERPRETING
from test_balance import accuracies, hard_scores
from test_mixture_step import probabilities

if not torch.cuda.device_count():
    pytest.skip("no GPU: torch sees no CUDA device", allow_module_level=True)
if not HAS_TRITON or INTERPRETING:
    pytest.skip("Triton is not installed, or interprets: no kernel runs on the GPU", allow_module_level=True)

from bmsn.cuda_graphs import CudaGraphs

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """No TF32, for one test."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic algorithms, for one test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_are_eager_bit_for_bit_over_200_steps(dtype: torch.dtype) -> None:
    eager, graphs = make_state(device=CUDA, dtype=dtype), make_state(device=CUDA, dtype=dtype)
    wanted = Engine(eager, list(SPACE), None).run(0, 200)
    recorded = Engine(graphs, list(SPACE), CudaGraphs(CUDA))
    parts = [recorded.run(start, start + 50) for start in range(0, 200, 50)]
    assert recorded.uses_graphs
    for field in fields(Steps):
        done = np.concatenate([getattr(part, field.name) for part in parts])
        np.testing.assert_array_equal(done, getattr(wanted, field.name))
    for name, tensor in tensors_of(eager).items():
        assert torch.equal(tensor, tensors_of(graphs)[name]), name
    assert wanted.losses[-50:].mean() < 0.7 * wanted.losses[:50].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_determinism_loss_curves_agree_within_the_spread_over_seeds(dtype: torch.dtype) -> None:
    seeds = range(3)
    eager = [Engine(make_state(device=CUDA, dtype=dtype, seed=seed), list(SPACE), None) for seed in seeds]
    graphs = [Engine(make_state(device=CUDA, dtype=dtype, seed=seed), list(SPACE), CudaGraphs(CUDA)) for seed in seeds]
    curves = [[engine.run(0, 200) for engine in engines] for engines in (eager, graphs)]
    assert all(engine.uses_graphs for engine in graphs)
    assert_curves_agree(*curves)


def test_the_first_steps_are_those_of_the_cpu() -> None:
    """Draws and losses; later on rounding may turn a prediction, and then a draw."""
    ours, cpu = make_state(device=CUDA), make_state()
    done, wanted = (Engine(state, list(SPACE), None).run(0, 10) for state in (ours, cpu))
    np.testing.assert_array_equal(done.supernets[:5], wanted.supernets[:5])
    np.testing.assert_allclose(done.losses[:5], wanted.losses[:5], rtol=1e-3)


def test_replays_never_wait_for_the_gpu() -> None:
    state = make_state(device=CUDA)
    engine = Engine(state, list(SPACE), CudaGraphs(CUDA))
    drawn = state.mixture.architectures[:60].tolist()
    for index in set(drawn):
        engine._capture(index, True)
    state.train.prepare(0)
    state.validation.prepare(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, index in enumerate(drawn):
            state.train.prepare(step)  # new epochs on the way
            state.validation.prepare(step)
            engine._step(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(state.step) == len(drawn)
    assert state.losses[: len(drawn)].isfinite().all()


def test_eager_steps_never_wait_for_the_gpu() -> None:
    state = make_state(device=CUDA)
    state.train.prepare(0)
    state.validation.prepare(0)
    for architecture in SPACE:  # compiles what there is to compile
        search_step(state, architecture)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for architecture in SPACE:
            search_step(state, architecture)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(state.step) == 2 * len(SPACE)


def test_capturing_changes_nothing() -> None:
    state = make_state(device=CUDA)
    engine = Engine(state, list(SPACE), CudaGraphs(CUDA))
    engine.run(0, 3)
    before = {name: tensor.clone() for name, tensor in tensors_of(state).items()}
    for index in set(range(len(SPACE))) - set(state.mixture.architectures[:3].tolist()):
        engine._capture(index, True)
    for name, tensor in tensors_of(state).items():
        assert torch.equal(torch.nan_to_num(before[name]), torch.nan_to_num(tensor)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("crop", [True, False])
def test_batches_are_those_of_the_cpu_bit_for_bit(dtype: torch.dtype, crop: bool) -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8))
    labels, order = torch.arange(300), torch.from_numpy(random.permutation(300))
    table = torch.randn((256, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in (0, 1, 2**33 + 1):
        arguments = images, labels, order, table, torch.tensor(step)
        wanted = augment(*arguments, key=2**62 + 5, batch_size=128, crop=crop)
        done = augment(*(t.to(CUDA) for t in arguments), key=2**62 + 5, batch_size=128, crop=crop)
        for a, b in zip(done, wanted, strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("inverse", [3.0, 100.0, 1e6])
def test_balances_are_those_of_the_cpu(inverse: float) -> None:
    tables = hard_scores() | {"the largest promised": accuracies(1024, 16)}
    for name, scores in tables.items():
        rows, cols = scores.shape
        random = np.random.default_rng(1)
        drawn = random.integers(0, rows, 21), np.full(21, inverse), random.random(21)
        states = [MixtureTensors.create(rows, cols, *drawn, device) for device in ("cpu", CUDA)]
        for state in states:
            state.scores.copy_(torch.from_numpy(scores.T))
        for step in range(20):
            for state in states:
                device = state.scores.device
                mixture_step(
                    state, torch.tensor(step, device=device), torch.tensor(BATCH * step // 20, device=device),
                    torch.tensor(step % 3 != 0, device=device),
                    num_images=BATCH, ema_decay=0.9, tol=1e-12, balance_every=1,
                )  # fmt: skip
            states[1].supernet.copy_(states[0].supernet)  # a draw at a boundary may differ: go on from the same
        assert failure(states[1].outcome.cpu(), 1e-12) is None, name
        cpu, gpu = (probabilities(state, inverse) for state in states)
        np.testing.assert_allclose(gpu, cpu, rtol=0, atol=1e-6, err_msg=name)
        assert torch.equal(states[1].visits.cpu(), states[0].visits), name


@pytest.mark.usefixtures("deterministic")
def test_a_network_alone_by_a_graph_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    class Counted(CudaGraphs):
        def capture(self, warm_up: Callable[[], None], step: Callable[[], None]) -> torch.cuda.CUDAGraph:
            captured.append(step)
            return super().capture(warm_up, step)

    def weights(graphs: CudaGraphs | None) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("bmsn.standalone.graph_backend", lambda engine, device: graphs)
        settings = TrainingSettings(epochs=3, batch_size=16)
        return train_alone(SPACE, SPACE[3], tiny_images(), settings, seed=2, device=CUDA).network.state_dict()

    eager, recorded = weights(None), weights(Counted(CUDA))
    assert len(captured) == 1
    for name, tensor in eager.items():
        assert torch.equal(tensor, recorded[name]), name
