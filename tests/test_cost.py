"""Limits on MACs, the Pareto front, and latency."""

from __future__ import annotations

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch

import bmsn
import bmsn.latency
from bmsn.cost import pareto_front, parse_max_macs, within_macs
from bmsn.latency import fold_batch_norm
from bmsn.loop import SearchLoop
from bmsn.result import SearchResult
from bmsn.retraining import RetrainConfig, run_retraining
from bmsn.search import main
from searching import tiny_flags, write_tiny_images

SPACE = bmsn.SearchSpace.named("resnet14-cifar10").resized(8)  # images of the tiny sets
MACS = [SPACE.macs(a, num_classes=4) for a in SPACE]


def config(spec: str, **changes) -> bmsn.SearchConfig:
    settings = dict(
        space=SPACE.name, data=spec, supernets=2, epochs=2, batch_size=16, device="cpu", fast_eval=True
    )  # fmt: skip
    return bmsn.SearchConfig(**(settings | changes))


# The front. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed):
    """Against the definition, row by row; few values, so that there are ties in both."""
    rng = np.random.default_rng(seed)
    accuracy = [None if rng.random() < 0.1 else float(value) for value in rng.integers(0, 6, 12)]
    macs = rng.integers(1, 6, 12).tolist()
    expected = []
    for a, m in zip(accuracy, macs, strict=True):
        beaten = any(
            b is not None and a is not None and b >= a and n <= m and (b > a or n < m)
            for b, n in zip(accuracy, macs, strict=True)
        )
        expected.append(a is not None and not beaten)
    assert pareto_front(accuracy, macs) == expected


def test_the_front_of_nothing():
    assert pareto_front([], []) == []
    assert pareto_front([None, None], [1, 2]) == [False, False]


# The limit. -----------------------------------------------------------------------------------------------------------


def test_limits_as_text():
    assert parse_max_macs("1.0x") == (1.0, True)
    assert parse_max_macs(" .5x") == (0.5, True)
    assert parse_max_macs("40M") == (40e6, False)
    assert parse_max_macs("1.2G") == (1.2e9, False)
    assert parse_max_macs("26700000") == (26700000.0, False)
    for text in ("", "x", "0x", "-1x", "1e6", "40m", "40 MB", "nan"):
        with pytest.raises(bmsn.InputError, match="max_macs must be a positive number as 1"):
            parse_max_macs(text)


def test_what_is_left_is_at_most_the_limit():
    default = MACS[SPACE.default.index]
    assert SPACE.default in within_macs(SPACE, MACS, "1x")
    assert within_macs(SPACE, MACS, "0.75x") == [a for a in SPACE if MACS[a.index] <= 0.75 * default]
    assert within_macs(SPACE, MACS, str(MACS[4])) == [a for a in SPACE if MACS[a.index] <= MACS[4]]
    with pytest.raises(bmsn.InputError, match=r"at least 0\.465x or \d+\.\d\dM, those of \[1,1,5\], the cheapest of"):
        within_macs(SPACE, MACS, "0.2x")


def test_a_restricted_space_numbers_its_architectures_anew():
    few = [SPACE[i] for i in (1, 4, 9)]
    space = SPACE.restricted(few)
    assert len(space) == 3
    assert [a.stage_depths for a in space] == [a.stage_depths for a in few]
    assert [a.index for a in space] == [0, 1, 2]
    assert space.find(few[1].slug) == space[1]
    assert SPACE.find(few[1].slug) == few[1]  # the whole one is as it was
    assert few[2] not in space
    assert [state.pool_positions for state in space.prefix_tree()[-1]] == sorted(a.pool_positions for a in few)
    with pytest.raises(bmsn.InputError, match="not among the 3 of resnet14-cifar10 that are left"):
        space.find(SPACE[0].slug)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_tiny_images(tmp_path_factory.mktemp("data") / "tiny.npz")


METHODS = {
    "mixture": 2,
    "spos": 1,
    "few-shot": 5,
    "mcts": 1,
    "boltzmann": 1,
    "spos-unshared": None,
    "random": 1,
    "macs": 1,
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_dearer_is_neither_trained_nor_ranked(spec, tmp_path, method, monkeypatch):
    """0.9x leaves 7 of 15, without the default. What is trained is what the networks are asked to compute."""
    trained = set()
    forward = bmsn.SupernetMixture.forward_row

    def watched(self, row, images, architecture):
        trained.add(architecture.stage_depths)
        return forward(self, row, images, architecture)

    monkeypatch.setattr(bmsn.SupernetMixture, "forward_row", watched)
    truth = tmp_path / "truth.csv"
    truth.write_text("stage_depths,accuracy_mean\n" + "".join(f"{a.slug},{50 + a.index}\n" for a in SPACE))
    settings = config(spec, method=method, supernets=METHODS[method], max_macs="0.9x", truth=str(truth), epochs=3)
    result = bmsn.run_search(settings)
    allowed = {a for a in SPACE if MACS[a.index] <= 0.9 * MACS[SPACE.default.index]}
    assert 3 < len(allowed) < 15
    assert SPACE.default not in allowed
    assert {row.architecture for row in result.ranking} == allowed
    assert trained <= {a.stage_depths for a in allowed}
    for row in result.ranking:
        assert row.macs == MACS[row.architecture.index]
        assert row.macs_ratio == pytest.approx(row.macs / MACS[SPACE.default.index])
    assert result.truth["ranking"]["n"] == len(allowed)
    assert result.truth["macs"]["n"] == len(allowed)
    by_accuracy = {row.architecture.slug: row.accuracy for row in result.ranking}
    for slug, correct in zip(result.scores["architecture"], result.scores["correct"], strict=True):
        assert by_accuracy[slug] == correct / result.scores["total"]


def test_a_limit_changes_nothing_that_is_within_it(spec):
    """No limit, and one above all: the same search."""
    assert bmsn.run_search(config(spec)).ranking == bmsn.run_search(config(spec, max_macs="9x")).ranking


def test_bad_limits(spec):
    for changes, message in [
        (dict(max_macs="0.1x"), "max_macs must be at least 0.465x"),
        (dict(max_macs="many"), "max_macs must be a positive number"),
        (dict(max_macs="0.5x", evaluate_top=9), "evaluate_top must be at most 2"),
        (dict(max_macs="0.5x", method="darts", supernets=None), "max_macs does not fit method darts"),
    ]:
        with pytest.raises(bmsn.InputError, match=message):
            bmsn.run_search(config(spec, **changes))


def test_the_default_is_retrained_though_it_was_not_ranked(tmp_path):
    spec = write_tiny_images(tmp_path / "tiny.npz")
    bmsn.run_search(config(spec, max_macs="0.5x", out=tmp_path / "run"))
    retraining = run_retraining(RetrainConfig(
        run=tmp_path / "run", top=1, seeds=1, training=bmsn.TrainingSettings(epochs=1, batch_size=16),
        resources=bmsn.Resources(device="cpu"),
    ))  # fmt: skip
    assert [row.is_default for row in retraining.rows] == [False, True]
    assert retraining.rows[1].searched is None


# In a search: the marks, the columns, older files. --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(spec, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    return out, bmsn.run_search(config(spec, out=out, latency=True, max_macs="1x"))


def test_marks_and_columns(finished):
    out, result = finished
    front = pareto_front([row.accuracy for row in result.ranking], [row.macs for row in result.ranking])
    assert [row.pareto for row in result.ranking] == front
    rows = list(csv.DictReader((out / "ranking.csv").read_text().splitlines()))
    assert list(rows[0])[-3:] == ["pareto", "latency_ms_1", "latency_ms_256"]
    assert [row["pareto"] == "True" for row in rows] == front
    assert all(float(row["latency_ms_1"]) > 0 for row in rows)
    table = result.to_table()
    marked = [line for line in table.splitlines() if "x*" in line]
    assert len(marked) == sum(front)
    assert "*: Pareto front" in table
    assert "ms at 256" in table.splitlines()[0]
    assert "Latency on " in table
    stored = SearchResult.from_json((out / "result.json").read_text(), "result.json")
    assert stored.ranking == result.ranking
    assert stored.latency == json.loads(json.dumps(result.latency))
    assert bmsn.run_search(config(result.config["data"], out=out, resume=True, max_macs="1x")).ranking == result.ranking


def test_results_of_older_schemas_are_read(finished):
    out, result = finished
    content = json.loads((out / "result.json").read_text())
    del content["latency"]
    for row in content["ranking"]:
        del row["pareto"]
    third = SearchResult.from_json(json.dumps(content | {"schema_version": 3}), "three")
    assert third.ranking == result.ranking
    assert third.latency == {}
    del content["cost"], content["method"], content["config"]["method"]
    second = SearchResult.from_json(json.dumps(content | {"schema_version": 2}), "two")
    assert second.ranking == result.ranking
    assert second.config["method"] == "mixture"
    assert "Ranked by validation accuracy" in second.to_table()
    for version in (1, 5):
        with pytest.raises(bmsn.InputError, match=rf"file: schema_version must be in 2\.\.4; got {version}"):
            SearchResult.from_json(json.dumps(content | {"schema_version": version}), "file")


# Latency. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet14-cifar10", "resnet50-food101"])
def test_folding_changes_no_output(name):
    """In float64, with statistics and affine parameters that are not those of a new network."""
    space = bmsn.SearchSpace.named(name, width=0.1)
    torch.manual_seed(0)
    network = bmsn.build_network(space, space.default, 4).double().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        expected = network(images)
        folded = fold_batch_norm(network)(images)
    torch.testing.assert_close(folded, expected)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_networks_share_weights_and_compute_what_they_should():
    networks = bmsn.latency._networks(SPACE, list(SPACE), 4, 3, torch.device("cpu"), torch.float32)
    state = [parameter.data_ptr() for parameter in networks[0].parameters()]
    images = torch.rand(2, 3, 32, 32)
    for architecture, network in zip(SPACE, networks, strict=True):
        assert [parameter.data_ptr() for parameter in network.parameters()] == state
        alone = fold_batch_norm(bmsn.build_network(SPACE, architecture, 4).eval())
        with torch.no_grad():
            for mine, theirs in zip(alone.parameters(), networks[0].parameters(), strict=True):
                mine.copy_(theirs)
            torch.testing.assert_close(network(images), alone(images))


def test_rounds_are_interleaved_and_the_median_is_taken(monkeypatch):
    """A clock of our own: a pass takes its MACs in nanoseconds, in the last of three rounds ten times as long."""
    calls: list[int] = []
    chosen = [SPACE[i] for i in (0, 5, 14)]
    monkeypatch.setattr(bmsn.latency, "_networks", lambda *arguments: [torch.nn.Flatten() for _ in chosen])
    order = {}

    def seconds(network, images, repeats):
        number = order.setdefault(id(network), len(order))
        calls.append(number)
        slow = 10 if len(calls) > 9 else 1  # one call a network to learn how long it takes, then three rounds
        return slow * MACS[chosen[number].index] * 1e-9

    monkeypatch.setattr(bmsn.latency, "_seconds", seconds)
    latency = bmsn.measure_latency(SPACE, chosen, num_classes=4, batch_sizes=(4,), device="cpu", rounds=3)
    for architecture in chosen:
        low, median, high = latency.milliseconds[architecture.slug][4]
        assert median == pytest.approx(MACS[architecture.index] * 1e-6)
        assert low <= median < high
    assert latency.spread[4] == pytest.approx((5.5 - 1.0) / 1.0)  # quartiles of 1, 1, 10
    assert "the machine was busy, so do not trust small differences" in latency.note
    rounds = [set(calls[i : i + 3]) for i in range(len(calls) - 9, len(calls), 3)]
    assert rounds == [{0, 1, 2}] * 3


@pytest.fixture
def heeds_sigint():
    """A shell's background job inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_sigint")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_measurement_of_a_search(number, exit_code, spec, tmp_path, monkeypatch, capsys):
    """Between two networks; what was trained is kept."""
    out, timed = tmp_path / "run", []

    def signalled(*arguments) -> float:
        timed.append(arguments)
        if len(timed) == 4:
            os.kill(os.getpid(), number)
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(bmsn.latency, "_seconds", signalled)
        assert main(tiny_flags(spec, fast_eval=True, latency=True, out=out)) == exit_code
    assert len(timed) == 4
    assert f"interrupted while measuring latency at step 8 of 8; go on with --resume --out {out}" in (
        capsys.readouterr().err
    )
    assert not (out / "result.json").exists()
    monkeypatch.setattr(SearchLoop, "advance", lambda loop: pytest.fail("it trains again"))
    monkeypatch.setattr(bmsn.latency, "_seconds", lambda *arguments: 1.0)
    assert main(["--resume", "--out", str(out)]) == 0
    assert "Latency on " in capsys.readouterr().out


def test_a_signal_ends_the_building_of_networks():
    """Of 560 large ones that takes longer than their timing."""

    def stop() -> None:
        raise bmsn.Interrupted("asked to")

    with pytest.raises(bmsn.Interrupted):
        bmsn.latency._networks(SPACE, list(SPACE), 4, 3, torch.device("cpu"), torch.float32, stop)


def test_a_quiet_machine_is_not_called_busy():
    quiet = bmsn.Latency(device="a CPU", dtype="float32", rounds=9, milliseconds={}, spread={1: 0.02, 256: 0.03})
    assert quiet.note == (
        "Latency on a CPU, float32, median of 9 rounds; quartiles apart by 2 % at batch 1, 3 % at batch 256."
    )


def test_bad_latency_input():
    with pytest.raises(bmsn.InputError, match="rounds and batch_sizes must be at least 1; got 0"):
        bmsn.measure_latency(SPACE, rounds=0)
    with pytest.raises(bmsn.InputError, match=r"got 9 and \(0,\)"):
        bmsn.measure_latency(SPACE, batch_sizes=(0,))
    with pytest.raises(bmsn.InputError, match="is not in resnet14-cifar10"):
        bmsn.measure_latency(SPACE, [bmsn.SearchSpace.named("resnet20-cifar10")[30]], device="cpu")
