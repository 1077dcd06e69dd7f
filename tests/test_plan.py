"""The plan's own promises: each prefix once, its maps apart, and memory that stays under the cap."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bmsn.execution
from bmsn.evaluator import make_plan, score_architectures
from bmsn.plan import EvaluationPlan
from bmsn.space import SearchSpace
from evaluations import make_case, needed_bytes


def test_plan_computes_each_prefix_once_and_keeps_its_buffers_apart():
    space = SearchSpace.named("resnet20-cifar10")
    pairs = [(a, m) for a in space for m in (0, 1)]
    for max_bytes in (None, 200 * 2**20):
        plan = EvaluationPlan(space, pairs, batch_size=256, image_size=(32, 32), itemsize=2, max_bytes=max_bytes)
        assert plan.num_states == 2 * 164
        seen = {(w.layer, s.supernet, s.pool_positions) for w in plan.waves for s in w.states}
        assert len(seen) == 2 * 164
        assert sorted(s.pair for w in plan.waves for s in w.states if s.pair is not None) == list(range(72))
        # Walked as it will run: a state finds at `source` the map that its parent wrote there, and nothing else since.
        memory = {}  # bytes where a map begins: (where it ends, whose it is, pooled or not)
        for wave in plan.waves:
            written = {}
            for state in wave.states:
                pools = wave.layer in state.pool_positions
                if wave.layer:
                    parent = tuple(p for p in state.pool_positions if p < wave.layer)
                    end, *owner = memory[state.source]
                    assert owner == [wave.layer - 1, state.supernet, parent, pools]
                    assert end == state.source + wave.source_bytes
                sizes = ((state.full, wave.map_bytes, False), (state.pooled, wave.map_bytes // 4, True))
                for start, size, pooled in sizes:
                    if start is not None:
                        assert start + size <= plan.arena_bytes
                        written[start] = (start + size, wave.layer, state.supernet, state.pool_positions, pooled)
            for start, (end, *_) in written.items():
                memory = {a: m for a, m in memory.items() if m[0] <= start or end <= a}  # overwritten: gone
            memory |= written
            spans = sorted((start, end) for start, (end, *_) in written.items())
            assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert "328 states" in str(plan)
    assert len(plan.waves) > 24  # the cap made it walk subtrees


def test_560_architectures_fit_under_2_gib():
    space = SearchSpace.named("resnet50-cifar100")
    for itemsize, maps in ((2, 9), (4, 5)):
        plan = EvaluationPlan(
            space,
            [(a, 0) for a in space],
            batch_size=64,
            image_size=(32, 32),
            itemsize=itemsize,
            workspace_maps=maps,
            max_bytes=2**31,
        )
        assert plan.peak_bytes <= 2**31
        assert plan.num_states == 3059


def test_maps_beyond_2_31_elements_are_addressed():
    """A plan of 12 GiB of maps, on memory that is not there (device "meta")."""
    space = SearchSpace.named("resnet20-cifar10")
    plan = EvaluationPlan(space, [(a, 0) for a in space], batch_size=2**16, image_size=(32, 32), itemsize=2)
    assert plan.arena_bytes > 2**33
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta")
    batch = torch.empty((2**16, 3, 32, 32), dtype=torch.bfloat16, device="meta")
    places = [(w, s.full) for w in plan.waves for s in w.states if s.full is not None and s.full > 2**32]
    assert places
    for wave, offset in places:
        maps = bmsn.execution._maps(plan, arena, offset, 1, plan.map_shape(wave.layer, wave.num_pools), batch)
        assert maps.storage_offset() == offset // 2 > 2**31
        assert maps.nbytes == wave.map_bytes
        assert maps.is_contiguous(memory_format=torch.channels_last)


class PeakActivations(TorchDispatchMode):
    """Most bytes of storages alive at one time that were made inside the mode, as torch's own dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
                    self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "pool"), [("resnet20-cifar10", "max"), ("resnet50-cifar100", "stride"), ("resnet18-imagenet", "avg")]
)
def test_memory_cap_is_respected(name, pool, dtype):
    nets, images, labels, pairs = make_case(name, pool, num_images=8, dtype=dtype)
    nets = nets.float()
    need = needed_bytes(nets, images, pairs, 8)
    for max_bytes in (need, 3 * need):
        plan = make_plan(nets, images, pairs, batch_size=8, max_bytes=max_bytes)
        assert plan.peak_bytes <= max_bytes
        score_architectures(nets, images, labels, pairs, batch_size=8, max_bytes=max_bytes)  # warm: caches of weights
        with PeakActivations() as measured:
            score_architectures(nets, images, labels, pairs, batch_size=8, max_bytes=max_bytes)
        fixed = 2 * images.nbytes + 3 * nets.arena.nbytes + 2**16  # what the cap does not count
        assert plan.arena_bytes <= measured.peak <= max_bytes + fixed


def test_without_a_cap_it_takes_the_usual_one_or_what_a_state_needs(monkeypatch):
    nets, images, _, pairs = make_case("resnet14-cifar10")
    need = needed_bytes(nets, images, pairs, 5)
    for usual, cap in ((2**30, 2**30), (need + 1, need + 1), (need - 1, need), (1, need)):
        monkeypatch.setattr("bmsn.evaluator.DEFAULT_MAX_BYTES", usual)
        plan = make_plan(nets, images, pairs, batch_size=5)
        assert plan.max_bytes == cap
        assert plan.peak_bytes <= cap


def test_on_a_gpu_as_many_batches_go_at_once_as_memory_allows(monkeypatch):
    nets, images, _, pairs = make_case("resnet14-cifar10", num_images=48, dtype=torch.float32)
    monkeypatch.setattr("bmsn.evaluator._chunk_bytes", lambda device: 2**62)
    one = make_plan(nets, images, pairs, batch_size=5)
    monkeypatch.setattr("bmsn.evaluator._is_gpu", lambda device: True)
    for max_bytes, batches in (
        (3 * one.peak_bytes, 3),
        (2**40, 9),
        (one.peak_bytes * 3 // 2, 1),
        (one.peak_bytes // 2, 1),
    ):
        plan = make_plan(nets, images, pairs, batch_size=5, max_bytes=max_bytes)
        assert plan.batch_size == 5 * batches
        assert plan.peak_bytes <= max_bytes
