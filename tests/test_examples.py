"""The examples of the documentation: every `>>>` of the package, and every ```python block of README.md."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bmsn
from bmsn.data.synthetic import generate_synthetic
from bmsn.run import run_search
from exports import MISSING, SKIPPED_WITHOUT_PACKAGES
from searching import write_tiny_images, write_truth

PACKAGE = Path(bmsn.__file__).parent
SPACE = bmsn.SearchSpace.named("resnet14-cifar10")
ENTRY_POINTS = {
    "bmsn", "bmsn.evaluator.score_architectures", "bmsn.exporting_files.load_network",
    "bmsn.exporting_network.network_from_supernet", "bmsn.latency.measure_latency", "bmsn.methods.base.Sampler",
    "bmsn.methods.get", "bmsn.interference.run_interference", "bmsn.reporting.write_report",
    "bmsn.reporting_interference.write_interference",
}  # fmt: skip
ENTRY_POINTS |= {f"{getattr(bmsn, name).__module__}.{name}" for name in bmsn.__all__ if name.startswith("run_")}


def find_examples() -> dict[str, doctest.DocTest]:
    """Those of the whole package, by the name of what they are about."""
    found: dict[str, doctest.DocTest] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if ">>>" in file.read_text():  # the others are not imported: some need packages that are optional
            module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            tests = doctest.DocTestFinder().find(importlib.import_module(module), globs={})
            found |= {test.name: test for test in tests if test.examples}
    return found


EXAMPLES = find_examples()
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL | re.MULTILINE
)

# What each block of README.md presupposes, by a word that it alone has.
PRESUPPOSED = {
    "num_supernets=4": lambda: {"images": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)},
    "ImageDataset": lambda: {
        "bmsn": bmsn,
        "train_images": np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8),
        "train_labels": np.arange(64) % 2,
        "test_images": np.zeros((0, 64, 64, 3), np.uint8), "test_labels": np.zeros(0, np.int64),
    },
    "load_network": lambda: {
        "bmsn": bmsn, "torch": torch, "space": SPACE, "nets": bmsn.SupernetMixture(SPACE, 2, num_classes=4),
        "calibration_images": torch.randn(8, 3, 8, 8),
    },
}  # fmt: skip


def marked(name: str) -> object:
    """The parameter; skipped where the packages are missing that exporting or loading a network needs."""
    needs_packages = name.endswith(("run_export", "load_network"))
    return pytest.param(name, marks=[SKIPPED_WITHOUT_PACKAGES] if needs_packages else [])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Iterator[Path]:
    """images.npz, truth.csv, and in runs/a a finished search and what was exported from it."""
    folder = tmp_path_factory.mktemp("prepared")
    spec = write_tiny_images(folder / "images.npz")
    write_truth(folder / "truth.csv", SPACE, missing="")
    run = folder / "runs" / "a"
    bmsn.run_search(
        bmsn.SearchConfig(space=SPACE.name, data=spec, supernets=1, epochs=1, batch_size=16, fast_eval=True, out=run)
    )
    with pytest.MonkeyPatch.context() as patch:
        # ONNX takes seconds, in each export; tests/test_export.py has it.
        onnx = SimpleNamespace(model_proto=SimpleNamespace(SerializeToString=lambda: b""))
        patch.setattr(torch.onnx, "export", lambda *args, **kwargs: onnx)
        if not MISSING:
            bmsn.run_export(bmsn.ExportConfig(run=run, architecture="5,1,1", from_supernet=True))
            # That of README.md is of another space, but how to load it is the same.
            shutil.copytree(run / "export" / "5-1-1-supernet", run / "export" / "5-3-2")
        yield folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> None:
    """A copy of it as the working directory: no example sees what another one wrote."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "here"))


def test_every_entry_point_has_an_example():
    assert set(EXAMPLES) >= ENTRY_POINTS


@pytest.mark.parametrize("name", [*map(marked, EXAMPLES)])
def test_docstring(here, name):
    EXAMPLES[name].globs = {
        "bmsn": bmsn, "torch": torch, "Path": Path, "nets": bmsn.SupernetMixture(SPACE, 2, num_classes=4),
        "images": torch.randn(8, 3, 8, 8), "labels": torch.arange(8) % 4,
    }  # fmt: skip
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=report.append)
    assert not report, "".join(report)


def quick_search(
    config: bmsn.SearchConfig, data: bmsn.ImageDataset | None = None, **given: bmsn.SearchSpace
) -> bmsn.SearchResult:
    """A search of README.md, which takes minutes, for one epoch and on few images."""
    few = generate_synthetic(num_train=128, num_test=0) if data is None else data
    return run_search(replace(config, epochs=1, supernets=1, batch_size=16, fast_eval=True), few, **given)


@pytest.mark.parametrize("word", [*map(marked, PRESUPPOSED)])
def test_readme(here, word, monkeypatch):
    monkeypatch.setattr(bmsn, "run_search", quick_search)
    (block,) = (block for block in BLOCKS if word in block)
    exec(block, PRESUPPOSED[word]())


def test_every_block_of_the_readme_is_run():
    assert len(BLOCKS) == len(PRESUPPOSED)
