"""`python -m bmsn.export`: its formats against networks in memory, which weights it takes, what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bmsn
import bmsn.exporting
import bmsn.exporting_files
from bmsn.checkpoint import CheckpointStore
from bmsn.data import split_halves
from bmsn.export import main
from bmsn.standalone import train_alone
from bmsn.tasks import Images, TaskResult, TaskStore
from bmsn.truth import make_task
from exports import SKIPPED_WITHOUT_PACKAGES, from_onnx, from_program, from_safetensors
from searching import tiny_images, write_tiny_images

pytestmark = SKIPPED_WITHOUT_PACKAGES

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")
CHOSEN = SPACE.find("2,3,2")
TRAINING = bmsn.TrainingSettings(epochs=2, batch_size=16)
DATA = tiny_images()


def search(folder: Path, spec: str, **changes: object) -> bmsn.SearchResult:
    settings = dict(space=SPACE.name, data=spec, epochs=1, batch_size=16, device="cpu", out=folder) | changes
    return bmsn.run_search(bmsn.SearchConfig(**settings))


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_tiny_images(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory) -> Path:
    """A finished search in which [2,3,2] and the default architecture were retrained with two seeds."""
    folder = tmp_path_factory.mktemp("search") / "runs" / "a"
    search(folder, spec, supernets=2, epochs=2, fast_eval=True, norm="calibrated")
    bmsn.run_retraining(
        bmsn.RetrainConfig(
            run=folder, architecture=("2,3,2",), seeds=2, training=TRAINING, resources=bmsn.Resources(device="cpu")
        )
    )
    return folder


@dataclasses.dataclass
class Exported:
    """An export, and the network that it has to equal: images (N, H, W, C) uint8 to logits."""

    folder: Path
    config: dict
    printed: str
    in_memory: Callable[[np.ndarray], np.ndarray]


def normalised(images: np.ndarray, indices: np.ndarray) -> torch.Tensor:
    """(N, C, H, W) float32, by mean and deviation of these training images, as the definition says."""
    known = DATA.train_images[indices] / 255
    scaled = (images / 255 - known.mean((0, 1, 2))) / known.std((0, 1, 2))
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()


@pytest.fixture(scope="module", params=["retrained", "supernet"])
def exported(request, run, tmp_path_factory) -> Exported:
    out = tmp_path_factory.mktemp("out") / request.param
    flags = ["--from-supernet"] if request.param == "supernet" else []
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert main([str(run), "--architecture", "2,3,2", "--out", str(out), *flags]) == 0
    if request.param == "retrained":
        indices = np.arange(len(DATA.train_labels))
        cpu = torch.device("cpu")
        network = train_alone(SPACE, CHOSEN, DATA, TRAINING, seed=0, device=cpu).network
    else:
        indices, _ = split_halves(DATA.train_labels, 0)
        saved = CheckpointStore(run / "checkpoints").load_latest()
        nets = bmsn.SupernetMixture(SPACE, 2, 4)
        nets.load_state_dict({"arena": saved[1]["loop"]["method"]["arena"], "_extra_state": nets.pixel_table})
        supernet = json.loads((out / "config.json").read_text())["weights"]["supernet"]
        calibration = normalised(DATA.train_images[indices], indices)
        network = bmsn.network_from_supernet(nets, CHOSEN, supernet, calibration)

    def in_memory(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(normalised(images, indices)).float().numpy()

    config = json.loads((out / "config.json").read_text())
    return Exported(out, config, "\n".join(printed), in_memory)


@pytest.mark.parametrize("load", [from_safetensors, from_program, from_onnx])
def test_each_format_predicts_what_the_network_in_memory_does(exported, load):
    """On all test images at once and on one alone; in [0, 1], as an image decoder gives them."""
    loaded = load(exported.folder)
    pixels = np.ascontiguousarray(DATA.test_images.transpose(0, 3, 1, 2) / np.float32(255))
    wanted, found = exported.in_memory(DATA.test_images), loaded(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert found.argmax(1).tolist() == wanted.argmax(1).tolist()
    assert len(set(found.argmax(1).tolist())) > 1
    np.testing.assert_allclose(loaded(pixels[:1]), wanted[:1], rtol=1e-4, atol=1e-4)


def test_the_accuracy_is_that_in_memory_and_is_printed(exported, run):
    accuracy = exported.config["accuracy"]
    if exported.config["weights"]["from"] == "retraining":
        images, labels, what = DATA.test_images, DATA.test_labels, "test images"
    else:
        _, held_out = split_halves(DATA.train_labels, 0)
        images, labels, what = DATA.train_images[held_out], DATA.train_labels[held_out], "images of the validation half"
    correct = int((exported.in_memory(images).argmax(1) == labels).sum())
    assert (accuracy["correct"], accuracy["total"], accuracy["images"]) == (correct, len(labels), what)
    assert f"{100 * correct / len(labels):.2f} % of the {len(labels)} {what}" in exported.printed
    assert str(exported.folder) in exported.printed

    # the search, which scored with norm calibrated, and the retraining: both perhaps in bfloat16
    if exported.config["weights"]["from"] == "retraining":
        assert abs(exported.config["weights"]["reported"]["correct"] - correct) <= 2
    else:
        ranked = json.loads((run / "result.json").read_text())["ranking"]
        (row,) = (row for row in ranked if row["architecture"] == "2-3-2")
        assert exported.config["weights"]["supernet"] == row["supernet"]
        assert abs(row["accuracy"] * len(labels) - correct) <= 2


def test_the_folder_describes_itself(exported):
    config = exported.config
    retrained = config["weights"]["from"] == "retraining"
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "config.json", "model.onnx", "model.pt2", "model.safetensors",
    ]  # fmt: skip
    assert config["schema_version"] == 1
    assert (config["architecture"], config["stage_depths"], config["pool_positions"]) == ("2-3-2", [2, 3, 2], [2, 5])
    assert config["space"]["widths"] == [16, 16, 16, 32, 32, 64, 64]
    assert config["class_names"] == ["0", "1", "2", "3"]
    assert config["input"] == {
        "name": "images", "shape": ["batch", 3, 8, 8], "dtype": "float32", "range": [0, 1], "normalised_inside": True,
    }  # fmt: skip
    assert config["batch_norm"] == ("affine" if retrained else "folded")
    assert config["versions"]["torch"] == torch.__version__
    modules = {type(module).__name__ for module in bmsn.load_network(exported.folder).modules()}
    assert ("BatchNorm2d" in modules) == retrained


def test_graphs_hold_plain_operators_and_no_path_of_this_machine(exported):
    import onnx

    program = torch.export.load(exported.folder / "model.pt2")
    called = {node.target.namespace for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten"}
    model = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.shape.dim[0].dim_param == logits.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {node.domain for node in model.graph.node} == {""}
    for path in exported.folder.iterdir():
        assert str(bmsn.__path__[0]).encode() not in path.read_bytes()


def test_retrained_weights_are_kept_bit_for_bit(run):
    """Both seeds, under the names of `build_network`; the smallest seed is the one that is exported."""
    for seed in (0, 1):
        (path,) = (run / "retrain").glob(f"2-3-2-seed{seed}-*.npz")
        trained = train_alone(SPACE, CHOSEN, DATA, TRAINING, seed=seed, device=torch.device("cpu"))
        with np.load(path, allow_pickle=False) as found:
            wanted = trained.network.state_dict()
            assert found.files == list(wanted)
            for name in found.files:
                assert found[name].tobytes() == wanted[name].contiguous().numpy().tobytes(), name
        assert json.loads(path.with_suffix(".json").read_text())["result"]["correct"] == trained.correct


# What is chosen, without writing graphs. ------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch, tmp_path) -> Callable[..., dict]:
    """config.json of an export, of which nothing is written."""
    monkeypatch.setattr(bmsn.exporting, "write_network", lambda folder, network, config: dict(config))
    return lambda run, architecture, **settings: (
        bmsn.run_export(
            bmsn.ExportConfig(run=run, architecture=architecture, out=tmp_path / "out", device="cpu", **settings)
        ).config
    )


def test_a_supernet_and_a_network_can_be_named(run, described):
    ranked = json.loads((run / "result.json").read_text())["ranking"]
    (row,) = (row for row in ranked if row["architecture"] == "2-3-2")
    other = described(run, "2-3-2", from_supernet=True, supernet=1 - row["supernet"], calibration=32)
    assert other["weights"]["supernet"] == 1 - row["supernet"]
    assert other["weights"]["calibration_images"] == 32
    assert described(run, "[2,3,2]")["weights"]["seed"] == 0
    second = described(run, "2,3,2", network="2-3-2-seed1")
    assert second["weights"]["seed"] == 1
    assert second["weights"]["settings"]["epochs"] == 2


def test_several_settings_need_a_name(run, described, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy") / "retrain"
    result = json.loads((run / "result.json").read_text())
    images = Images(spec=result["config"]["data"], generator_seed=None, fingerprint=result["data"]["fingerprint"])
    longer = make_task(SPACE, CHOSEN, images, 1, dataclasses.replace(TRAINING, epochs=7, milestones=(0.5,)))
    TaskStore(folder).write(longer, TaskResult(correct=9, total=36, loss=1.0, seconds=1.0, device="", torch=""))
    (weights,) = folder.glob("2-3-2-seed1-*.npz")
    shutil.copy(weights, folder / f"{longer.name}.npz")

    with pytest.raises(bmsn.InputError, match=rf"several settings: .* which: .*{longer.name} \(7 epochs\)"):
        described(folder.parent, "2,3,2")
    with pytest.raises(bmsn.InputError, match="several settings"):
        described(folder.parent, "2,3,2", network="2-3-2-seed1")
    assert described(folder.parent, "2,3,2", network=longer.name)["weights"]["reported"]["correct"] == 9
    assert described(folder.parent, "2,3,2", network="2-3-2-seed0")["weights"]["settings"]["epochs"] == 2
    with pytest.raises(bmsn.InputError, match=rf"network must be one of .*{longer.name}.*, or how it begins; got x"):
        described(folder.parent, "2,3,2", network="x")


def test_a_seed_is_not_the_beginning_of_another(run, described, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy") / "retrain"
    result = json.loads((run / "result.json").read_text())
    images = Images(spec=result["config"]["data"], generator_seed=None, fingerprint=result["data"]["fingerprint"])
    twentieth = make_task(SPACE, CHOSEN, images, 20, TRAINING)
    TaskStore(folder).write(twentieth, TaskResult(correct=9, total=36, loss=1.0, seconds=1.0, device="", torch=""))
    (weights,) = folder.glob("2-3-2-seed1-*.npz")
    shutil.copy(weights, folder / f"{twentieth.name}.npz")

    assert described(folder.parent, "2,3,2", network="2-3-2-seed20")["weights"]["seed"] == 20
    with pytest.raises(bmsn.InputError, match="network must be one of"):
        described(folder.parent, "2,3,2", network="2-3-2-seed2")


def test_weights_for_each_resolution_export_too_and_some_methods_have_none(spec, described, tmp_path):
    """The method's own count of the path, in batches of the whole half, differs by its statistics alone."""
    found = search(tmp_path / "unshared", spec, method="spos-unshared-all", epochs=4)
    config = described(tmp_path / "unshared", "0-1-0-0-1-2-1", from_supernet=True)
    assert (config["architecture"], config["stage_depths"]) == ("0-1-0-0-1-2-1", None)
    assert config["weights"]["supernet"] is None
    assert config["accuracy"]["total"] == found.data["num_validation"]
    with pytest.raises(bmsn.InputError, match="supernet does not fit method spos-unshared-all"):
        described(tmp_path / "unshared", "3,2,2", from_supernet=True, supernet=0)

    search(tmp_path / "macs", spec, method="macs")
    with pytest.raises(
        bmsn.InputError, match=r"by method macs has no weights of \[3,2,2\] alone: python -m bmsn.retrain"
    ):
        described(tmp_path / "macs", "3,2,2", from_supernet=True)

    search(tmp_path / "small", spec, supernets=1, max_macs="1.0x")
    with pytest.raises(bmsn.InputError, match=r"names no supernet for architecture \[5,1,1\]: .* in 0\.\.0"):
        described(tmp_path / "small", "5,1,1", from_supernet=True)
    assert described(tmp_path / "small", "5,1,1", from_supernet=True, supernet=0)["stage_depths"] == [5, 1, 1]


def test_the_weights_are_those_that_were_scored(spec, described, tmp_path, monkeypatch):
    """Averaged where the search averaged; before adaptation, and it says so."""
    search(tmp_path / "averaged", spec, supernets=1, fast_eval=True, average_last=1.0)
    exported = []
    monkeypatch.setattr(bmsn.exporting, "write_network", lambda folder, network, config: exported.append(network))
    bmsn.run_export(
        bmsn.ExportConfig(run=tmp_path / "averaged", architecture="2,3,2", from_supernet=True, out=tmp_path / "out")
    )
    state = CheckpointStore(tmp_path / "averaged" / "checkpoints").load_latest()[1]["loop"]["method"]
    indices, _ = split_halves(DATA.train_labels, 0)
    calibration, pixels = normalised(DATA.train_images[indices], indices), DATA.test_images.transpose(0, 3, 1, 2) / 255
    logits = []
    with torch.no_grad():
        for rows in (state["average"]["arena"], state["arena"]):
            nets = bmsn.SupernetMixture(SPACE, 1, 4)
            nets.load_state_dict({"arena": rows, "_extra_state": nets.pixel_table})
            network = bmsn.network_from_supernet(nets, CHOSEN, 0, calibration)
            logits.append(network(normalised(DATA.test_images, indices)))
        found = exported[0].cpu()(torch.from_numpy(pixels).float())
    torch.testing.assert_close(found, logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[1] - logits[0]).abs().max() > 0.1  # the case does tell them apart

    monkeypatch.setattr(bmsn.exporting, "write_network", lambda folder, network, config: dict(config))
    search(tmp_path / "adapted", spec, supernets=1, fast_eval=True, adapt=3)
    text = described(tmp_path / "adapted", "2,3,2", from_supernet=True)["weights"]["text"]
    assert text.endswith("before the 3 steps of adaptation after which the search scored it")


def test_weights_that_no_step_trained_are_refused(spec, described, tmp_path):
    """Architectures of the space never pool before layer 1 by 2 steps; a random layer would be exported in silence."""
    search(tmp_path / "unshared", spec, method="spos-unshared", epochs=4)
    assert described(tmp_path / "unshared", "3,2,2", from_supernet=True)["accuracy"]["total"] == 64
    with pytest.raises(bmsn.InputError, match=r"trained 0-2-2-2-2-2-2 in layer 1 at its resolution: python -m bmsn.re"):
        described(tmp_path / "unshared", "0-2-2-2-2-2-2", from_supernet=True)


# Bad input. -----------------------------------------------------------------------------------------------------------


def test_runs_and_settings_that_cannot_be_exported(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")

    def refused(*flags: str, folder: Path = copy) -> str:
        try:
            code = main([str(folder), *flags])
        except SystemExit as stopped:  # found while the flags are read
            code = stopped.code
        captured = capsys.readouterr()
        assert code == 2
        return " ".join((captured.err + captured.out).replace("│", " ").split())

    chosen = ("--architecture", "2,3,2")
    supernet = (*chosen, "--from-supernet")
    assert f"{tmp_path}: holds no run of bmsn.search" in refused(*chosen, folder=tmp_path)
    assert "architecture (4, 3, 3) is not in resnet14-cifar10" in refused("--architecture", "4,3,3")
    message = refused("--architecture", "1,1,5")
    assert f"[1,1,5] was not retrained in {copy}: python -m bmsn.retrain {copy} --architecture 1-1-5 does it" in message
    assert "supernet must be in 0..1; got 2" in refused(*supernet, "--supernet", "2")
    assert "supernet must be in 0..1; got -1" in refused(*supernet, "--supernet", "-1")
    assert "supernet is for an export with from_supernet; got 1" in refused(*chosen, "--supernet", "1")
    assert "network is for an export without from_supernet; got x" in refused(*supernet, "--network", "x")
    assert "calibration must be at least 2 images; got 1" in refused(*supernet, "--calibration", "1")
    path = ("--architecture", "0-1-0-0-1-2-1", "--from-supernet")
    assert "by method mixture has no weights of 0-1-0-0-1-2-1 alone" in refused(*path)
    (copy / "export" / "2-3-2").mkdir(parents=True)
    (copy / "export" / "2-3-2" / "mine").touch()
    assert f"out {copy}/export/2-3-2: must be a new or an empty folder" in refused(*chosen)
    assert "must be a new or an empty folder" in refused(*chosen, "--out", str(copy / "config.yaml"))

    shutil.rmtree(copy / "export")
    (copy / "retrain").rename(copy / "away")
    assert "was not retrained" in refused(*chosen)
    (copy / "away").rename(copy / "retrain")
    (weights,) = (copy / "retrain").glob("2-3-2-seed0-*.npz")
    weights.rename(copy / "weights")
    out = ("--out", str(tmp_path / "out"))
    message = refused(*chosen, *out)
    assert f"the weights of {weights.stem} were not kept; remove {weights.stem}.json, and python -m bmsn" in message
    weights.write_bytes((copy / "weights").read_bytes()[:-100])
    assert f"{weights}: is damaged" in refused(*chosen, *out)

    (copy / "checkpoints").rename(copy / "away")
    assert "holds no checkpoint; the weights of a search lie in its last one" in refused(*supernet, *out)
    result = copy / "result.json"
    whole = json.loads(result.read_text())
    (copy / "away").rename(copy / "checkpoints")
    result.write_text(json.dumps(whole | {"config": whole["config"] | {"epochs": 3}}))
    assert "the last checkpoint that can be read is of step 8; the search had 12" in refused(*supernet, *out)
    result.write_text(json.dumps(whole | {"schema_version": 99}))
    assert "schema_version must be in 2..4; got 99" in refused(*chosen, *out)
    result.unlink()
    assert "the search is not finished" in refused(*chosen, *out)
    assert not (tmp_path / "out").exists()


def test_images_that_have_changed_are_refused(run, spec, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    result = json.loads((copy / "result.json").read_text())
    result["config"]["data"] = write_tiny_images(tmp_path / "other.npz", seed=5)
    (copy / "result.json").write_text(json.dumps(result))
    assert main([str(copy), "--architecture", "2,3,2"]) == 2
    assert "it is not the set that was asked for" in capsys.readouterr().err
    assert not (copy / "export").exists()


def test_a_package_that_is_not_installed_is_named(run, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert main([str(run), "--architecture", "2,3,2"]) == 2
    assert "export needs onnxscript: pip install 'bmsn[export]'" in capsys.readouterr().err


def test_it_stops_where_memory_runs_out(run, monkeypatch, tmp_path, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("bmsn.exporting.untrained", full)
    flags = ["--architecture", "2,3,2", "--from-supernet", "--out", str(tmp_path / "out")]
    assert main([str(run), *flags]) == 3
    assert "stopped: export of [2,3,2]: out of memory on cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
