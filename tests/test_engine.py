"""The engine: its step against a loop written out with torch's own SGD, and graphs against eager, bit for bit.

Graphs are recorded by `engines.RecordedGraphs` here, which keeps the closure of a step; test_engine_gpu.py has CUDA's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import bmsn
from bmsn import engine, engine_mixture
from bmsn.checkpoint import CheckpointStore
from bmsn.cuda_graphs import CudaGraphs
from bmsn.engine import Engine, GraphMemoryError, SearchState, choose_engine, search_step, tensors_of
from bmsn.errors import InputError, RunStopped
from bmsn.mixture import BalancedMixture
from bmsn.ops.batches import augment_reference
from bmsn.search import main
from engines import BATCH, SPACE, SUPERNETS, RecordedGraphs, make_state
from searching import tiny_flags, write_tiny_set


def run(state: SearchState, graphs: RecordedGraphs | None = None, blocks: tuple[int, ...] = (200,)) -> engine.Steps:
    runner, start, done = Engine(state, list(SPACE), graphs), 0, []
    for stop in blocks:
        done.append(runner.run(start, stop))
        start = stop
    parts = ([getattr(steps, field.name) for steps in done] for field in fields(engine.Steps))
    return engine.Steps(*(np.concatenate(part) for part in parts))


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(second[name])), name


def copied(state: SearchState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors_of(state).items()}


def test_steps_are_those_of_a_loop_written_out() -> None:
    """Batches of the streams, autograd, torch's SGD, a mixture on the host: the same draws, weights up to rounding."""
    num_steps = 40
    state, oracle = make_state(num_steps), make_state(num_steps)
    done = run(state, blocks=(num_steps,))
    rows = [torch.nn.Parameter(row.clone()) for row in oracle.nets.arena.detach()]
    optimisers = [torch.optim.SGD([row], lr=1.0, momentum=0.9, weight_decay=1e-3) for row in rows]
    mixture = BalancedMixture(num_architectures=len(SPACE), num_supernets=SUPERNETS)
    drawn, supernet = oracle.mixture.architectures.tolist(), 0
    for step in range(num_steps):
        row, architecture = rows[supernet], SPACE[drawn[step]]
        images, labels = oracle.train.batch(step)
        loss = F.cross_entropy(oracle.nets.forward_row(row, images, architecture), labels)
        optimisers[supernet].zero_grad()
        loss.backward()
        optimisers[supernet].param_groups[0]["lr"] = float(oracle.lrs[step])
        optimisers[supernet].step()
        images, labels = oracle.validation.batch(step)
        with torch.no_grad():
            right = oracle.nets.forward_row(row, images, architecture).argmax(1) == labels
        assert done.supernets[step] == supernet
        assert done.accuracies[step] == right.sum().item() / BATCH
        assert done.losses[step] == pytest.approx(loss.item(), rel=1e-4)
        inverse, uniform = (float(t[step + 1]) for t in (oracle.mixture.inverse_temperatures, oracle.mixture.uniforms))
        supernet = mixture.observe_and_draw(
            drawn[step], supernet, done.accuracies[step], inverse, drawn[step + 1], uniform
        )  # fmt: skip
    assert set(done.supernets) == {0, 1}
    torch.testing.assert_close(state.nets.arena.detach(), torch.stack(list(rows)).detach(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(state.mixture.scores.T.numpy(), mixture.scores)
    np.testing.assert_array_equal(state.mixture.visits.numpy(), mixture.visits)
    assert int(state.step) == num_steps


def test_graphs_are_eager_bit_for_bit() -> None:
    eager, recorded, graphs = make_state(), make_state(), RecordedGraphs()
    wanted = run(eager)
    done = run(recorded, graphs, blocks=(1, 2, 50, 53, 200))
    assert_same_state(tensors_of(eager), tensors_of(recorded))
    for field in fields(engine.Steps):
        np.testing.assert_array_equal(getattr(done, field.name), getattr(wanted, field.name))
    assert np.isfinite(done.losses).all()
    assert done.losses[-50:].mean() < 0.7 * done.losses[:50].mean()  # it learns
    assert graphs.captured == len(SPACE)


def test_graphs_are_captured_when_first_needed_and_capturing_changes_nothing() -> None:
    state, graphs = make_state(), RecordedGraphs()
    runner = Engine(state, list(SPACE), graphs)
    runner.run(0, 5)
    drawn = state.mixture.architectures[:5].tolist()
    assert graphs.captured == len(set(drawn))
    before = copied(state)
    rest = [index for index in range(len(SPACE)) if index not in drawn]
    for index in rest:
        runner._capture(index, True)
    assert_same_state(before, tensors_of(state))
    assert graphs.captured == len(SPACE)


def test_steps_between_two_validation_batches_tell_the_mixture_nothing() -> None:
    eager, recorded = (make_state(60, validates=lambda step: step % 3 == 2) for _ in range(2))
    graphs = RecordedGraphs()
    done = run(eager, blocks=(7, 60))
    run(recorded, graphs, blocks=(60,))
    assert_same_state(tensors_of(eager), tensors_of(recorded))
    drawn, validates = eager.mixture.architectures[:60].numpy(), np.arange(60) % 3 == 2
    assert graphs.captured == len(set(zip(drawn.tolist(), validates.tolist(), strict=True)))
    np.testing.assert_array_equal(np.isnan(done.accuracies), ~validates)
    assert (np.bincount(drawn[validates], minlength=len(SPACE)) == eager.mixture.visits.sum(1).numpy()).all()


def test_bfloat16_working_copies_follow_the_weights() -> None:
    eager, recorded = (make_state(30, dtype=torch.bfloat16) for _ in range(2))
    run(eager, blocks=(30,))
    run(recorded, RecordedGraphs(), blocks=(7, 30))
    assert_same_state(tensors_of(eager), tensors_of(recorded))
    assert eager.copies is not None
    assert torch.equal(eager.copies, eager.nets.arena.detach().bfloat16())


@pytest.mark.parametrize("graphs", [None, RecordedGraphs()], ids=["eager", "graphs"])
def test_a_loss_that_is_not_finite_changes_its_pair_in_nothing(graphs: RecordedGraphs | None) -> None:
    state = make_state(20)
    with torch.no_grad():
        state.nets.arena[1].fill_(torch.nan)
    before = copied(state)
    done = run(state, graphs, blocks=(20,))
    bad = done.supernets == 1
    assert 0 < bad.sum() < 20
    assert (np.isfinite(done.losses) == ~bad).all()
    assert (state.velocity[1] == before["velocity"][1]).all()
    assert (state.mixture.visits.sum(0).numpy() == [(~bad).sum(), 0]).all()
    assert (state.mixture.scores[1] == 1).all()


def test_an_architecture_of_another_space_is_bad_input() -> None:
    """As many as the space has, so that every index is there; the last one alone would be found late, if at all."""
    foreign = list(bmsn.SearchSpace.named("resnet18-cifar10"))[: len(SPACE)]
    for architectures in (foreign, [*list(SPACE)[:-1], foreign[-1]]):
        with pytest.raises(InputError, match=r"architecture \[.*\] \(index \d+\) is not in resnet14-cifar10"):
            Engine(make_state(5), architectures, None)


def test_a_balance_that_fails_names_step_and_pair() -> None:
    state = make_state(20)
    runner = Engine(state, list(SPACE), None)
    runner.run(0, 3)
    state.mixture.scores[1, 4] = torch.nan
    architecture = SPACE[int(state.mixture.architectures[3])]
    message = rf"step 3, architecture \[{str(architecture)[1:-1]}\], supernet \d: scores\[4, 1\]"
    with pytest.raises(RunStopped, match=message):
        runner.run(3, 9)


def test_without_memory_for_graphs_it_goes_on_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    eager, recorded, graphs = make_state(60), make_state(60), RecordedGraphs(memory=3)
    run(eager, blocks=(60,))
    with caplog.at_level(logging.WARNING):
        run(recorded, graphs, blocks=(30, 60))
    assert_same_state(tensors_of(eager), tensors_of(recorded))
    assert graphs.captured == 3
    assert [record.message for record in caplog.records] == [
        "no memory for CUDA graphs, going on eagerly: more than 7 GiB were needed"
    ]


def test_without_memory_to_warm_up_it_goes_on_eagerly_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What graphs are warmed up on is made before the first is recorded."""

    def full(state: SearchState) -> SearchState:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    eager, recorded, graphs = make_state(20), make_state(20), RecordedGraphs()
    run(eager, blocks=(20,))
    monkeypatch.setattr(SearchState, "scratch", full)
    with caplog.at_level(logging.WARNING):
        run(recorded, graphs, blocks=(10, 20))
    assert_same_state(tensors_of(eager), tensors_of(recorded))
    assert graphs.captured == 0
    assert [record.message for record in caplog.records] == [
        "no memory for CUDA graphs, going on eagerly: CUDA out of memory. Tried to allocate 2 GiB."
    ]


def test_a_refresh_falls_between_validation_and_balance() -> None:
    state = make_state(10)
    seen: list[dict[str, Tensor]] = []

    def refresh() -> None:
        seen.append(copied(state))
        state.mixture.scores.fill_(0.25)

    Engine(state, list(SPACE), RecordedGraphs()).run(0, 4, refresh)
    (before,) = seen
    assert int(before["step"]) == 3
    assert before["losses"].isfinite().sum() == 4  # trained already
    assert before["visits"].sum() == 3  # not yet averaged
    pair = int(state.supernets[3]), int(state.mixture.architectures[3])
    assert state.mixture.scores[pair] == 0.9 * 0.25 + (1 - 0.9) * (int(state.correct[3]) / BATCH)
    assert int(state.step) == 4


def fake_state(mode: FakeTensorMode) -> SearchState:
    """The state with fake tensors, whose values nobody can ask for."""
    state = make_state(10)

    def faked(holder: Any) -> Any:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                object.__setattr__(holder, name, mode.from_tensor(value))
        return holder

    nets = state.nets
    nets.arena = torch.nn.Parameter(mode.from_tensor(nets.arena.detach()))
    return replace(
        faked(state), train=faked(state.train), validation=faked(state.validation), mixture=faked(state.mixture)
    )  # fmt: skip


def test_a_step_asks_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under fake tensors `.item()`, `bool()` and `nonzero` raise: what would make a host wait, and a capture fail."""
    monkeypatch.setenv("BMSN_BACKEND", "reference")
    mode = FakeTensorMode()
    state = fake_state(mode)
    with mode:
        for asks in (lambda: state.step.item(), lambda: bool(state.step), lambda: state.step.nonzero()):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                asks()
        for architecture in SPACE:
            search_step(state, architecture)
        stream = state.train  # the op is one fake call in a step; its specification must not ask either
        arguments = stream.images, stream.labels, stream._order, stream.table, state.step, 3, BATCH, True
        assert augment_reference(*arguments)[0].shape == (BATCH, 3, 8, 8)


def test_the_choice_of_an_engine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_engine("auto", cpu) == choose_engine("eager", cpu) == "eager"
    with pytest.raises(InputError, match="engine graphs needs a CUDA GPU, the device is cpu"):
        choose_engine("graphs", cpu)
    monkeypatch.setattr(engine, "resolve", lambda op, device: "triton")
    assert choose_engine("auto", cuda) == choose_engine("graphs", cuda) == "graphs"
    assert choose_engine("eager", cuda) == "eager"
    assert not caplog.records
    monkeypatch.setattr(engine, "resolve", lambda op, device: "reference")
    with pytest.raises(InputError, match="engine graphs needs Triton's kernels"):
        choose_engine("graphs", cuda)
    assert choose_engine("auto", cuda) == "eager"
    assert "engine graphs needs Triton's kernels" in caplog.text


def test_images_lie_where_they_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 9 * 2**30))
    assert engine_mixture.image_device(10**12, cpu) == cpu
    assert engine_mixture.image_device(4 * 2**30, cuda) == cuda
    assert not caplog.records
    assert engine_mixture.image_device(4 * 2**30 + 1, cuda) == cpu
    assert "the images take 4.0 GiB and the GPU has 8.0 GiB free" in caplog.text


class PretendedCuda:
    """Just enough of torch.cuda for `CudaGraphs`: says in `calls` what it was asked, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails = False  # the capture runs out of memory

        @contextmanager
        def said(name: str, *_: object, **__: object) -> Iterator[None]:
            self.calls.append(f"enter {name}")
            try:
                yield
            finally:
                self.calls.append(f"leave {name}")
                if name == "graph" and self.fails:
                    raise RuntimeError("the capture was invalidated")

        stream = MagicMock()
        for name, value in {
            "graph_pool_handle": lambda: (0, 1), "Stream": lambda device: stream, "CUDAGraph": MagicMock,
            "current_stream": lambda device: stream, "synchronize": lambda device: self.calls.append("synchronize"),
            "stream": partial(said, "stream"), "graph": partial(said, "graph"), "memory_reserved": lambda device: 2**30,
            "mem_get_info": lambda device: (2**30, 4 * 2**30),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_cuda_graphs_warm_up_first_and_say_what_memory_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `CudaGraphs` only its order of calls and its errors: what CUDA makes of them, test_engine_gpu.py tells."""
    cuda = PretendedCuda(monkeypatch)
    backend = CudaGraphs(torch.device("cuda"))
    backend.capture(lambda: cuda.calls.append("warm up"), lambda: cuda.calls.append("step"))
    warm = ["enter stream", "warm up", "leave stream", "synchronize"]
    assert cuda.calls == [*warm, "enter graph", "step", "leave graph"]

    def runs_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    needed = r"more than 2\.00 GiB were needed, the GPU has 4\.00 GiB \(CUDA out of memory\. Tried to allocate 3 GiB\)"
    for fails in (False, True):
        cuda.fails = fails
        with pytest.raises(GraphMemoryError, match=needed):
            backend.capture(lambda: None, runs_out)
    with pytest.raises(RuntimeError, match="invalidated"):
        backend.capture(lambda: None, lambda: None)


# In a search. ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_set(tmp_path_factory.mktemp("data") / "tiny.npz")


def search(spec: str, **settings: Any) -> dict[str, Any]:
    """A finished search: its ranking and, with `out`, its last checkpoint."""
    config = dict(
        space="resnet14-cifar10", data=spec, supernets=2, epochs=10, batch_size=16, device="cpu", refresh_every=7
    )
    result = bmsn.run_search(bmsn.SearchConfig(**config | settings))
    return {"ranking": result.ranking, "cost": result.cost, "truth": result.truth}


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    """Searches on the CPU run as on a GPU: blocks of steps, recorded graphs."""
    graphs = RecordedGraphs()
    monkeypatch.setattr(engine_mixture, "graph_backend", lambda name, device: graphs)
    monkeypatch.setattr("bmsn.methods.mixture.runs_ahead", lambda device: True)
    return graphs


@pytest.mark.parametrize(
    ("settings", "captured"),
    [
        pytest.param({"split_after": 0.0}, [15], id="mixture"),
        # With a validation batch and without.
        pytest.param({}, range(16, 31), id="mixture, split"),
        pytest.param({"method": "spos", "supernets": 1, "epochs": 8}, range(16, 31), id="spos"),
    ],
)
def test_a_search_by_graphs_is_one_by_eager_steps(
    settings: dict[str, Any], captured: Sequence[int], spec: str, with_graphs: RecordedGraphs
) -> None:
    by_graphs = search(spec, **settings)
    assert with_graphs.captured in captured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_mixture, "graph_backend", lambda name, device: None)
        patch.setattr("bmsn.methods.mixture.runs_ahead", lambda device: False)
        assert search(spec, **settings) == by_graphs


def test_a_search_is_resumed_by_the_other_engine(spec: str, tmp_path: Any, with_graphs: RecordedGraphs) -> None:
    whole = search(spec, out=tmp_path / "whole", checkpoint_every=10)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 5

    settings = dict(
        space="resnet14-cifar10", data=spec, supernets=2, epochs=10, batch_size=16, device="cpu", refresh_every=7,
        checkpoint_every=10, out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(bmsn.run.Interrupted, match="interrupted at step"):
        bmsn.run_search(bmsn.SearchConfig(**settings), should_stop=stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_mixture, "graph_backend", lambda name, device: None)
        resumed = bmsn.run_search(bmsn.SearchConfig(**settings, engine="eager", resume=True))
    assert resumed.ranking == whole["ranking"]
    states = [CheckpointStore(tmp_path / name / "checkpoints").load_latest() for name in ("whole", "run")]
    (arena, other) = (state[1]["loop"]["method"]["arena"] for state in states if state is not None)
    assert torch.equal(arena, other)


def test_other_methods_take_no_engine(spec: str) -> None:
    with pytest.raises(InputError, match="engine does not fit method mcts: it must be auto; got graphs"):
        bmsn.SearchConfig(space="resnet14-cifar10", data=spec, method="mcts", engine="graphs").filled()


def test_graphs_on_a_cpu_are_bad_input(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_flags(spec, engine="graphs")) == 2
    assert "engine graphs needs a CUDA GPU" in capsys.readouterr().err
