"""Whatever is called, the process stays as it was: threads, default dtype, random states, warnings, logging, ..."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sympy  # noqa: F401  # adds a warning filter of its own; torch imports it when it first needs it
import torch

import bmsn
import bmsn.exporting_files
from exports import MISSING
from global_state import unchanged
from searching import tiny_images, write_tiny_images, write_truth

SPACE = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
DATA = tiny_images(32, 8)
CPU = bmsn.Resources(device="cpu")
TRAINING = bmsn.TrainingSettings(epochs=1, batch_size=16)


class Workplace:
    """What the calls need: images in a file and, made when it is first asked for, a finished search."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = write_tiny_images(folder / "tiny.npz", num_train=32, num_test=8)
        self.truth = folder / "truth.csv"
        write_truth(self.truth, SPACE, missing="5-1-1")

    @property
    def config(self) -> bmsn.SearchConfig:
        return bmsn.SearchConfig(
            space="resnet14-cifar10", data=self.spec, supernets=2, epochs=1, batch_size=16, fast_eval=True,
            device="cpu", out=self.folder / "run", resume=(self.folder / "run").exists(),
        )  # fmt: skip

    @property
    def run(self) -> Path:
        bmsn.run_search(self.config)
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        """Without its graphs, which take most of the time."""
        folder = self.folder / "exported"
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bmsn.exporting_files, "_graphs", lambda network, shape: (b"program", b"onnx"))
                bmsn.run_export(self.export_to(folder))
        return folder

    def export_to(self, folder: Path) -> bmsn.ExportConfig:
        return bmsn.ExportConfig(
            run=self.run, architecture="3,2,2", from_supernet=True, calibration=8, out=folder, device="cpu"
        )


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


def supernets() -> bmsn.SupernetMixture:
    return bmsn.SupernetMixture(SPACE, 2, 4, generator=torch.Generator().manual_seed(0))


def images_and_labels(number: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(number, 3, 8, 8), torch.zeros(number, dtype=torch.long)


def balanced_mixture(work: Workplace) -> None:
    bmsn.BalancedMixture(num_architectures=15, num_supernets=2).observe_and_draw(0, 1, 0.5, 10.0, 3, 0.2)


def search(work: Workplace) -> None:
    """Everything that a search can be asked for, and every form of what comes out."""
    result = bmsn.run_search(replace(work.config, out=None, resume=False, epochs=2, score_every=1, race=3), DATA)
    bmsn.SearchResult.from_json(result.to_json(), "here").to_table()
    result.to_csv()


def a_race(work: Workplace) -> None:
    bmsn.race(supernets(), *images_and_labels(8), 2, batch_size=4)


# How each is called; `work` has files.
CALLS: dict[str, Callable[[Workplace], object]] = {
    "Architecture": lambda work: str(bmsn.Architecture(0, (1, 2), (1, 1, 5))),
    "BalancedMixture": balanced_mixture,
    "Comparison": lambda work: bmsn.Comparison(
        rows=(), paired=(), runs=(), failed={}, missing=(), num_architectures=15
    ),
    "ComparisonConfig": lambda work: bmsn.ComparisonConfig(
        methods="macs", data=work.spec, truth="truth.csv", budget=1, out=work.folder
    ),
    "EvaluationPlan": lambda work: str(
        bmsn.EvaluationPlan(SPACE, [(SPACE[0], 0)], batch_size=4, image_size=(8, 8), itemsize=4)
    ),
    "Export": lambda work: bmsn.Export(folder=work.folder, config={}),
    "ExportConfig": lambda work: bmsn.ExportConfig(run=work.folder, architecture="3,2,2"),
    "GroundTruthConfig": lambda work: bmsn.GroundTruthConfig(out=work.folder),
    "ImageDataset": lambda work: tiny_images().fingerprint,
    "InputError": bmsn.InputError,
    "Interrupted": bmsn.Interrupted,
    "Latency": lambda work: bmsn.Latency(device="", dtype="", rounds=1, milliseconds={}, spread={1: 0.0}).note,
    "Race": lambda work: bmsn.Race((), torch.zeros(0), torch.zeros(0), 1, (), 1).ranking,
    "ResolutionPath": lambda work: str(bmsn.ResolutionPath((0, 0, 1, 1, 2, 2, 2))),
    "Resources": lambda work: bmsn.Resources(workers=2),
    "RetrainConfig": lambda work: bmsn.RetrainConfig(run=work.folder, top=1),
    "RunStopped": bmsn.RunStopped,
    "Scores": lambda work: bmsn.Scores(((SPACE[0], 0),), torch.ones(1), 2).accuracy,
    "SearchConfig": lambda work: bmsn.SearchConfig().filled().as_dict(),
    "SearchResult": lambda work: bmsn.SearchResult(
        ranking=(), config={}, environment={}, data={}, timings={}, scores={}, cost={}, method={}, truth={}
    ),
    "SearchSpace": lambda work: [SPACE.macs(a) for a in bmsn.SearchSpace(3, 1, (16, 16, 32))],
    "SupernetMixture": lambda work: supernets()(images_and_labels()[0], SPACE[3], 1).sum().backward(),
    "TrainingSettings": lambda work: bmsn.TrainingSettings(epochs=1),
    "backend_report": lambda work: bmsn.backend_report(),
    "balance": lambda work: bmsn.balance(np.eye(3, 2), 0.1),
    "build_network": lambda work: bmsn.build_network(SPACE, SPACE[0]),
    "build_path_network": lambda work: bmsn.build_path_network(SPACE, bmsn.ResolutionPath((0, 0, 1, 0, 2, 2, 2))),
    "load_network": lambda work: bmsn.load_network(work.exported),
    "measure_latency": lambda work: bmsn.measure_latency(
        SPACE, [SPACE[0], SPACE[1]], image_size=8, batch_sizes=(1,), device="cpu", rounds=1
    ),
    "network_from_supernet": lambda work: bmsn.network_from_supernet(
        supernets(), SPACE[0], 0, calibration_images=images_and_labels()[0]
    ),
    "open_dataset": lambda work: bmsn.open_dataset(work.spec),
    "race": a_race,
    "run_comparison": lambda work: bmsn.run_comparison(
        bmsn.ComparisonConfig(
            space="resnet14-cifar10",
            methods="macs",
            data=work.spec,
            truth=str(work.truth),
            budget=1,
            settings="batch_size=16",
            seeds=1,
            out=work.folder / "comparison",
            resources=CPU,
        )
    ),
    "run_export": lambda work: bmsn.run_export(work.export_to(work.folder / "own")),
    "run_ground_truth": lambda work: bmsn.run_ground_truth(
        bmsn.GroundTruthConfig(
            space="resnet14-cifar10",
            data=work.spec,
            seeds=1,
            out=work.folder / "truth",
            training=TRAINING,
            resources=CPU,
        )
    ),
    "run_retraining": lambda work: bmsn.run_retraining(
        bmsn.RetrainConfig(run=work.run, architecture=("3,2,2",), seeds=1, training=TRAINING, resources=CPU)
    ),
    "run_search": search,
    "score_architectures": lambda work: bmsn.score_architectures(supernets(), *images_and_labels()),
    "score_one_by_one": lambda work: bmsn.score_one_by_one(supernets(), *images_and_labels(), [(SPACE[0], 0)]),
}
# The user's own network, to be trained: its weights come from where those of every torch module come from.
CHANGES = {"build_network": ["torch RNG"], "build_path_network": ["torch RNG"]}


def test_every_public_name_is_called():
    assert set(CALLS) == {name for name in bmsn.__all__ if callable(getattr(bmsn, name))}


@pytest.mark.parametrize("name", CALLS)
def test_a_public_call_leaves_global_state_alone(name, work, monkeypatch):
    if name in ("run_export", "load_network") and MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(work.folder))  # torch sets it where it exports and it is not set
    with unchanged(*CHANGES.get(name, [])):
        CALLS[name](work)


@pytest.mark.parametrize("build", [CALLS["build_network"], CALLS["build_path_network"]])
def test_a_network_is_decided_by_the_seed(build):
    with torch.random.fork_rng(devices=[]):
        networks = [build(None) for seed in (5, 5, 6) if torch.default_generator.manual_seed(seed)]
    first, again, other = (torch.cat([p.flatten() for p in network.parameters()]) for network in networks)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
