"""One pass against one by one: equal counts for every space, batch size and memory cap; and the plan's own promises."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bmsn.evaluator
import bmsn.execution
from bmsn.backend import extension
from bmsn.errors import InputError
from bmsn.evaluator import all_pairs, calibrate, make_plan, score_architectures, score_one_by_one
from bmsn.exporting_network import network_from_supernet
from bmsn.network import SupernetMixture
from bmsn.plan import EvaluationPlan
from bmsn.space import SPACES, SearchSpace
from stacked import device_for, needs_cpp, needs_gpu, needs_triton


def make_case(name, pool=None, num_images=12, dtype=torch.double):
    """A mixture of two narrow supernets, images of twice the total stride, labels; up to 48 pairs."""
    generator = torch.Generator().manual_seed(7)
    space = SearchSpace.named(name, width=0.25 if name in ("resnet14-cifar10", "resnet20-cifar10") else 0.05, pool=pool)
    nets = SupernetMixture(space, 2, 5, generator=generator).double()
    head = nets.arena.detach()[:, -(space.out_channels + 1) * 5 :]
    matrix = head[:, : space.out_channels * 5].view(2, 5, -1)
    matrix -= matrix.mean(2, keepdim=True)  # else one class has the largest row sum and is predicted everywhere
    head[:, space.out_channels * 5 :] = 0
    size = 2 * space.total_stride
    images = torch.randn(num_images, 3, size, size, generator=generator, dtype=torch.double).to(dtype)
    labels = torch.randint(5, (num_images,), generator=generator)
    pairs = all_pairs(nets)
    return nets, images, labels, pairs[:: max(1, len(pairs) // 24)]


def needed_bytes(nets, images, pairs, batch_size):
    with pytest.raises(InputError, match="max_bytes must be at least") as caught:
        make_plan(nets, images, pairs, batch_size=batch_size, max_bytes=1)
    return int(str(caught.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("name", SPACES)
def test_counts_equal_one_by_one_in_float64(name, pool):
    nets, images, labels, pairs = make_case(name, pool)
    expected = score_one_by_one(nets, images, labels, pairs, batch_size=5)  # batches of 5, 5 and 2
    need = needed_bytes(nets, images, pairs, 5)
    for max_bytes in (None, need, 2 * need):
        scores = score_architectures(nets, images, labels, pairs, batch_size=5, max_bytes=max_bytes)
        assert scores.correct.dtype == torch.int64
        assert scores.total == 12
        assert scores.correct.tolist() == expected.correct.tolist()
    assert len(set(expected.correct.tolist())) > 2  # the case can tell pairs apart


class RecordedNorm:
    """Stands in for the normalisation of `SupernetMixture.forward`: measures in order, applies in the same order."""

    def __init__(self):
        self.measured, self.applied = [], None

    def __call__(self, x, num_groups):
        if self.applied is None:
            self.measured.append((x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)))
            mean, variance = self.measured[-1]
        else:
            mean, variance = next(self.applied)
        return (x - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("name", ["resnet14-cifar10", "resnet50-cifar100", "resnet18-imagenet"])
def test_calibrated_statistics_are_frozen(name, monkeypatch):
    nets, images, labels, pairs = make_case(name)
    calibration = torch.randn(7, *images.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.double)
    arguments = dict(norm="calibrated", calibration_images=calibration)
    need = needed_bytes(nets, calibration, pairs, 7)
    found = score_architectures(nets, images, labels, pairs, batch_size=5, max_bytes=need, **arguments)
    alone = [
        score_architectures(nets, images[i : i + 2], labels[i : i + 2], pairs, **arguments) for i in range(0, 12, 2)
    ]
    assert found.correct.tolist() == sum(scores.correct for scores in alone).tolist()
    for (architecture, supernet), count in zip(pairs[::5], found.correct.tolist()[::5], strict=True):
        norm = RecordedNorm()
        monkeypatch.setattr("bmsn.ops.norm_relu._norm_reference", norm)
        nets(calibration, architecture, supernet)
        norm.applied = iter(norm.measured)
        predicted = nets(images, architecture, supernet).argmax(1)
        assert count == (predicted == labels).sum()
        monkeypatch.undo()
    assert found.correct.tolist() != score_architectures(nets, images, labels, pairs, batch_size=5).correct.tolist()


@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet50-cifar100"])
def test_supernets_may_share_a_run(name, norm, monkeypatch):
    """As where the kernels are ours; with frozen statistics these also scale what they convolve."""
    nets, images, labels, _ = make_case(name, "max")
    pairs = all_pairs(nets)
    pairs = pairs[:: len(pairs) // 24 | 1]  # an odd step: of both supernets
    arguments = dict(batch_size=5, norm=norm, calibration_images=images[:7] if norm == "calibrated" else None)
    expected = score_architectures(nets, images, labels, pairs, **arguments).correct.tolist()
    runs = []
    plain = bmsn.execution._runs
    monkeypatch.setattr("bmsn.execution._mixes", lambda images, backend: True)
    monkeypatch.setattr(
        "bmsn.execution._runs", lambda wave, mixed: runs.extend(plain(wave, mixed=mixed)) or plain(wave, mixed=mixed)
    )
    assert score_architectures(nets, images, labels, pairs, **arguments).correct.tolist() == expected
    assert any(len({state.supernet for state in run}) == 2 for run in runs)


@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize(("name", "pool"), [("resnet20-cifar10", "max"), ("resnet50-cifar100", "stride")])
def test_several_batches_at_once_are_groups_of_their_own(name, pool, norm, monkeypatch):
    """As on a GPU with memory for it: batches of 3, three at once, one, and a last one of 2."""
    nets, images, labels, pairs = make_case(name, pool, num_images=14)
    arguments = dict(batch_size=3, norm=norm, calibration_images=images[:7] if norm == "calibrated" else None)
    expected = score_architectures(nets, images, labels, pairs, **arguments).correct.tolist()
    sizes = []

    def plan_for_three(mixture, images, pairs, *, batch_size, max_bytes):
        if len(images) < 14:  # calibration: one group
            return make_plan(mixture, images, pairs, batch_size=batch_size, max_bytes=max_bytes)
        return make_plan(mixture, images, pairs, batch_size=3 * batch_size, max_bytes=max_bytes)

    plain = bmsn.evaluator.run_batches
    monkeypatch.setattr("bmsn.evaluator.make_plan", plan_for_three)
    monkeypatch.setattr("bmsn.evaluator.run_batches", lambda *a: sizes.append((len(a[3]), a[4])) or plain(*a))
    monkeypatch.setattr("bmsn.execution._mixes", lambda images, backend: True)
    assert score_architectures(nets, images, labels, pairs, **arguments).correct.tolist() == expected
    assert sizes == ([(9, 3), (3, 1), (2, 1)] if norm == "batch" else [(7, 1), (9, 1), (3, 1), (2, 1)])


def test_with_frozen_statistics_the_convolution_adds_and_relus(monkeypatch):
    """Where the kernels are ours: behind the last one of a layer pooling is left, and without it nothing."""
    nets, images, labels, pairs = make_case("resnet20-cifar10", "max")
    wanted, passes = [], []
    plain, scaled = bmsn.execution.bn_add_relu_pool, bmsn.execution._scaled

    def recorded(y, stats, *shortcuts, **maps):
        passes.append((shortcuts, maps.get("full"), maps["pooled"]))
        plain(y, stats, *shortcuts, **maps)

    def watched(work, x, full, pooled):
        wanted.extend([pooled] if pooled is not None else [])
        with monkeypatch.context() as patched:
            patched.setattr("bmsn.execution.bn_add_relu_pool", recorded)
            y = scaled(work, x, full, pooled)
        assert full is None or y is full
        return y

    monkeypatch.setattr("bmsn.execution._mixes", lambda images, backend: True)
    monkeypatch.setattr("bmsn.execution._scaled", watched)
    score_architectures(nets, images, labels, pairs, norm="calibrated", calibration_images=images)
    assert wanted
    assert [(shortcuts, full) for shortcuts, full, _ in passes] == [((), None)] * len(wanted)
    assert all(found is map for (*_, found), map in zip(passes, wanted, strict=True))


TRITON_SPACES = [
    pytest.param("resnet14-cifar10", "max", marks=needs_triton),
    *(pytest.param(n, p, marks=needs_gpu) for n, p in (("resnet50-cifar100", "stride"), ("resnet18-imagenet", "avg"))),
]


@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize(("name", "pool"), TRITON_SPACES)
def test_triton_scores_both_supernets_and_two_batches_at_once(name, pool, norm, monkeypatch):
    nets, images, labels, _ = make_case(name, pool, num_images=5, dtype=torch.float32)
    nets, device = nets.float().to(device_for("triton")), device_for("triton")
    pairs = [(nets.space[2], 0), (nets.space[2], 1)]
    arguments = dict(batch_size=2, norm=norm, calibration_images=images[:4] if norm == "calibrated" else None)
    expected = score_architectures(nets, images, labels, pairs, backend="reference", **arguments)
    plan = partial(make_plan, nets, images.to(device), pairs)
    monkeypatch.setattr("bmsn.evaluator.make_plan", lambda *a, batch_size, max_bytes: plan(batch_size=2 * batch_size))
    found = score_architectures(nets, images, labels, pairs, backend="triton", **arguments)
    assert (found.correct - expected.correct).abs().max() <= 1


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


def test_without_a_cap_it_takes_the_usual_one_or_what_a_state_needs(monkeypatch):
    nets, images, _, pairs = make_case("resnet14-cifar10")
    need = needed_bytes(nets, images, pairs, 5)
    for usual, cap in ((2**30, 2**30), (need + 1, need + 1), (need - 1, need), (1, need)):
        monkeypatch.setattr("bmsn.evaluator.DEFAULT_MAX_BYTES", usual)
        plan = make_plan(nets, images, pairs, batch_size=5)
        assert plan.max_bytes == cap
        assert plan.peak_bytes <= cap


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_named_by_the_environment_scores_all_there_is(dtype, monkeypatch):
    nets, images, labels, pairs = make_case("resnet14-cifar10", dtype=dtype)
    wanted = score_architectures(nets, images, labels, pairs, batch_size=5, backend="cpp")
    monkeypatch.setenv("BMSN_BACKEND", "cpp")
    assert score_architectures(nets, images, labels, pairs, batch_size=5).correct.tolist() == wanted.correct.tolist()


def test_statistics_measured_before_serve_many_calls():
    nets, images, labels, pairs = make_case("resnet14-cifar10")
    frozen = calibrate(nets, images[:7], pairs, images.dtype)
    for some in (pairs, pairs[3:5]):
        wanted = score_architectures(nets, images, labels, some, norm="calibrated", calibration_images=images[:7])
        found = score_architectures(nets, images, labels, some, norm=frozen)
        assert found.correct.tolist() == wanted.correct.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_differs_by_rounding_ties_alone(dtype):
    nets, images, labels, pairs = make_case("resnet20-cifar10", num_images=64, dtype=dtype)
    one_pass = score_architectures(nets, images, labels, pairs, batch_size=32)
    one_by_one = score_one_by_one(nets, images, labels, pairs, batch_size=32)
    differences = (one_pass.correct - one_by_one.correct).abs()
    assert differences.max() <= (1 if dtype == torch.float32 else 3)
    assert differences.sum() <= 0.01 * one_pass.total * len(pairs)


@pytest.mark.skipif(
    not (extension() and extension().has_conv_forward()), reason="bmsn._C was not built, or no AVX512-BF16"
)
@pytest.mark.parametrize("norm", ["batch", "calibrated"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_our_cpu_convolution_classifies_as_float64_does(pool, norm, monkeypatch):
    """At the widths that it is for. Labels are what float64 predicts: a map in the wrong place leaves chance."""
    monkeypatch.setattr("bmsn.ops.convolution._has_kernel", lambda: True)
    generator = torch.Generator().manual_seed(3)
    nets = SupernetMixture(SearchSpace.named("resnet14-cifar10", pool=pool), 2, 4, generator=generator)
    nets.arena.detach()[:, -4:] = 0
    images = torch.randn(96, 3, 16, 16, generator=generator, dtype=torch.double)
    wide, runs = deepcopy(nets).double(), []
    for op in ("conv_bn", "conv_scale"):
        module = import_module(f"bmsn.ops.{op}")
        plain = module.convolve_cpp
        monkeypatch.setattr(module, "convolve_cpp", lambda *a, plain=plain, **k: runs.append(a) or plain(*a, **k))
    for pair in all_pairs(nets)[::5]:
        frozen = {} if norm == "batch" else {"norm": norm, "calibration_images": images.bfloat16()}
        logits = network_from_supernet(wide, *pair, images)(images) if frozen else wide(images, *pair)
        labels = (logits - logits.mean(0)).argmax(1)
        shifted = deepcopy(nets)
        shifted.arena.detach()[:, -4:] = -logits.detach().mean(0).float()  # so that all classes are predicted
        scores = score_architectures(shifted, images.bfloat16(), labels, [pair], backend="cpp", **frozen)
        assert len(labels.unique()) > 2
        assert scores.correct.item() >= 88
    assert len(runs) >= 6 * 13  # every 3x3 convolution of every pair


def test_order_subset_and_memory_format_do_not_matter():
    nets, images, labels, pairs = make_case("resnet20-cifar10")
    counts = dict(
        zip(pairs, score_architectures(nets, images, labels, pairs, batch_size=8).correct.tolist(), strict=True)
    )
    some = [pairs[k] for k in (22, 3, 17, 4)]
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert score_architectures(nets, channels_last, labels, some, batch_size=8).correct.tolist() == [
        counts[p] for p in some
    ]


def test_all_pairs_are_architecture_major():
    nets, images, labels, _ = make_case("resnet14-cifar10")
    scores = score_architectures(nets, images, labels)
    assert [(a.index, m) for a, m in scores.pairs] == [(c, m) for c in range(15) for m in range(2)]
    assert scores.correct.shape == (30,)


def test_uint8_images_are_normalised_inside():
    nets, _, labels, pairs = make_case("resnet14-cifar10")
    pixels = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    nets.pixel_table = (torch.arange(256)[:, None] / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
        [0.2, 0.25, 0.3]
    )
    by_hand = (pixels.double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.3])
    expected = score_one_by_one(nets, by_hand.permute(0, 3, 1, 2), labels, pairs)
    assert score_architectures(nets, pixels, labels, pairs).correct.tolist() == expected.correct.tolist()


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
                    import weakref

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(batch_size=1), ["batch_size", "at least 2", "1"]),
        (dict(norm="layer"), ["norm", "batch", "calibrated", "layer"]),
        (dict(norm="calibrated"), ["calibration_images", "calibrated"]),
        (dict(calibration_images=torch.zeros(8, 3, 8, 8)), ["calibration_images", "batch"]),
        (dict(norm="calibrated", calibration_images=torch.zeros(8, 3, 9, 8)), ["calibration_images", "total stride 4"]),
        (dict(norm="calibrated", calibration_images=torch.zeros(0, 3, 8, 8)), ["calibration_images", "non-empty"]),
        (dict(batch_size=2.5), ["batch_size", "integer", "2.5"]),
        (dict(pairs=["a"]), ["pairs[0]", "(Architecture, supernet index)", "'a'"]),
        (dict(labels=torch.zeros(12, dtype=torch.bool)), ["labels", "12 integers", "bool"]),
        (dict(labels=torch.zeros(12, dtype=torch.long, device="meta")), ["labels", "CPU", "meta"]),
        (dict(images=torch.zeros(12, 3, 8, 8, device="meta")), ["images", "CPU", "meta"]),
        (dict(pairs=[]), ["pairs is empty"]),
        (dict(pairs="twice"), ["pairs[1] repeats pairs[0]"]),
        (dict(pairs="other"), ["not in resnet14"]),
        (dict(pairs="supernet"), ["pairs[0]", "0..1", "2"]),
        (dict(labels=torch.zeros(11, dtype=torch.long)), ["labels", "12"]),
        (dict(labels=torch.full((12,), 5)), ["labels[0]", "0..4", "5"]),
        (dict(images=torch.zeros(12, 3, 9, 8)), ["total stride 4"]),
        (dict(images=torch.zeros(12, 8, 8, 4, dtype=torch.uint8)), ["uint8", "(N, H, W, 3)"]),
        (dict(max_bytes=1000), ["max_bytes must be at least", "1000"]),
        (dict(backend="cuda"), ["cuda", "cpp"]),
    ],
)
def test_bad_input_is_named(change, words):
    nets, images, labels, pairs = make_case("resnet14-cifar10")
    a = nets.space[0]
    special = {
        "twice": [(a, 0), (a, 0)],
        "other": [(SearchSpace.named("resnet20-cifar10")[0], 0)],
        "supernet": [(a, 2)],
    }
    arguments = dict(images=images, labels=labels, pairs=pairs) | change
    if isinstance(arguments["pairs"], str):
        arguments["pairs"] = special[arguments["pairs"]]
    with pytest.raises(InputError) as caught:
        score_architectures(nets, **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_counted_as_nan_and_named_once(bad, caplog):
    nets, images, labels, _ = make_case("resnet14-cifar10")
    nets.arena.detach()[1, 100] = bad
    pairs = [(a, m) for a in nets.space for m in (0, 1)]
    scores = score_architectures(nets, images, labels, pairs, batch_size=5)
    assert scores.correct[1::2].tolist() == [int((labels == 0).sum())] * 15  # argmax of NaNs is the first class
    assert scores.correct[::2].tolist() == score_one_by_one(nets, images, labels, pairs[::2], 5).correct.tolist()
    (record,) = caplog.records
    assert record.getMessage().startswith("supernets [1] have weights that are not finite: the scores of their 15")
    score_architectures(nets, images, labels, pairs[::2], batch_size=5)  # the other supernet alone
    assert len(caplog.records) == 1


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


@pytest.mark.parametrize("name", [name for name in SPACES if "14" not in name])
def test_weights_of_all_supernets_keep_the_alignment_that_kernels_load_fast_by(name):
    """In bfloat16 rows, and weights in a row, lie multiples of 16 elements apart: the head's numbers are elsewhere."""
    nets = SupernetMixture(SearchSpace.named(name, width=0.25 if name != "resnet20-cifar10" else 1.0), 2, 10)
    weights = nets.weights(nets.arena.detach(), torch.bfloat16)
    for tensor in [w for layer in weights.layers for w in layer.values()]:
        assert tensor.stride(0) % 16 == 0
        assert tensor.storage_offset() % 16 == 0


def test_a_last_batch_with_one_value_a_channel_is_an_error():
    nets, _, _, pairs = make_case("resnet14-cifar10")
    images = torch.randn(9, 3, 4, 4, dtype=torch.double)  # last map 1x1, last batch 1 image
    with pytest.raises(InputError, match="at least 2 values"):
        score_architectures(nets, images, torch.zeros(9, dtype=torch.long), pairs, batch_size=8)


@pytest.mark.parametrize("score", [score_architectures, score_one_by_one])
def test_a_callback_counts_what_is_done_and_can_end_it(score):
    nets, images, labels, pairs = make_case("resnet14-cifar10")
    done = []
    score(nets, images, labels, pairs[:3], batch_size=5, after_batch=done.append)
    assert done == ([15, 15, 6] if score is score_architectures else [5, 5, 2] * 3)

    def stop(images):
        done.append(images)
        raise KeyError

    done.clear()
    with pytest.raises(KeyError):
        score(nets, images, labels, pairs[:3], batch_size=5, after_batch=stop)
    assert len(done) == 1
