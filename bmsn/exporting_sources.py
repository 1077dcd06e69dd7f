"""Where the weights of an export come from: a supernet of the search, or the networks that were retrained for it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bmsn import methods
from bmsn.checkpoint import CheckpointStore, environment
from bmsn.data import ImageDataset, normalisation, normalisation_table, normalise, split_halves
from bmsn.errors import InputError
from bmsn.exporting_network import network_from_row, unit_table, with_normalisation
from bmsn.methods.multires import gather_path
from bmsn.methods.supernet import NUM_CALIBRATION, SupernetMethod
from bmsn.methods.unshared import UnsharedPaths
from bmsn.network import SupernetMixture, build_path_network
from bmsn.paths import Candidate, ResolutionPath, as_path
from bmsn.result import SearchResult
from bmsn.retraining import RETRAIN_FOLDER
from bmsn.space import SearchSpace
from bmsn.standalone import TrainingSettings, count_correct
from bmsn.tasks import Images, Task, TaskResult
from bmsn.weights import read_weights


@dataclass(frozen=True, kw_only=True)
class Source:
    """An architecture of a finished search.

    Attributes:
        run: its folder; result: what it found.
        space, architecture: what is wanted.
        images: those of the search; opened when everything else is there.
        device: where to compute.
    """

    run: Path
    result: SearchResult
    space: SearchSpace
    architecture: Candidate
    images: Images
    device: torch.device


# A network for images in [0, 1], the images, and what config.json says of its weights.
Found = tuple[nn.Sequential, ImageDataset, dict[str, Any]]


def untrained(source: Source, supernet: int | None, num_calibration: int | None) -> Found:
    """The architecture with the weights that it has in a supernet: BatchNorm calibrated and folded.

    The weights are those that the search scored, the last ones or their mean; with `adapt`, those before adaptation.

    Args:
        source: run and architecture.
        supernet: which one; None: the one that ranked it.
        num_calibration: training images to calibrate on; None: 1,024. The training half's first ones, as when a search
            scores with norm calibrated.
    Raises:
        InputError: no such supernet, no checkpoint of the search's end, weights that no step trained, or images that
            have changed.
    """
    chosen = _supernet(source, supernet)
    state = _last_state(source)
    average, path = state.get("average"), as_path(source.space, source.architecture)
    rows: Tensor = average["arena"] if average and average["count"] else state["arena"]  # what was scored
    if chosen is None:
        _check_visited(source, path, state["visits"])
    data = source.images.open(source.space)
    train, validation = split_halves(data.train_labels, source.result.config["seed"])
    mean, std = normalisation(data.train_images, train)
    indices = train[: num_calibration or NUM_CALIBRATION]
    calibration = normalise(data.train_images, normalisation_table(mean, std), torch.float32, indices=indices)
    nets = SupernetMixture(source.space, len(rows), data.num_classes, data.in_channels)
    row = gather_path(nets, rows, path) if chosen is None else rows[chosen]
    bare = network_from_row(nets, row.to(source.device), path, calibration.to(source.device))
    network = _with_normalisation(source, bare, mean, std)
    where = "its weights at each resolution" if chosen is None else f"supernet {chosen}"
    text = f"{where}, not retrained, BatchNorm calibrated on {len(indices)} training images and folded"
    adapt = source.result.config.get("adapt", 0)
    if adapt:
        text += f"; before the {adapt} steps of adaptation after which the search scored it"
    held_out = data.train_images[validation], data.train_labels[validation]
    return network, data, {
        "batch_norm": "folded", "normalisation": {"mean": mean.tolist(), "std": std.tolist()},
        "accuracy": _accuracy(source, network, *held_out, "images of the validation half"),
        "weights": {
            "text": text, "from": "supernet", "supernet": chosen, "calibration_images": len(indices),
            "method": source.result.config["method"],
        },
    }  # fmt: skip


def _supernet(source: Source, asked: int | None) -> int | None:
    """The supernet as asked for, or as the ranking has it; None: the method has weights for each resolution instead."""
    name, run, architecture = source.result.config["method"], source.run, source.architecture
    method = methods.get(name)
    if issubclass(method, UnsharedPaths):
        if asked is not None:
            raise InputError(f"supernet does not fit method {name}, which has weights for each resolution")
        return None
    if not issubclass(method, SupernetMethod) or isinstance(architecture, ResolutionPath):
        raise InputError(
            f"from_supernet: the search in {run} by method {name} has no weights of {architecture} alone: "
            f"{_retrain_command(source)} trains it"
        )
    number = source.result.config["supernets"]
    if asked is not None:
        if not 0 <= asked < number:
            raise InputError(f"supernet must be in 0..{number - 1}; got {asked}")
        return asked
    ranked = next((row.supernet for row in source.result.ranking if row.architecture == architecture), None)
    if ranked is None:
        raise InputError(
            f"the ranking of {run} names no supernet for architecture {architecture}: supernet must be given, "
            f"in 0..{number - 1}"
        )
    return ranked


def _check_visited(source: Source, path: ResolutionPath, visits: np.ndarray) -> None:
    """Raises InputError where no step of the search passed a layer at the path's resolution: its weights are random."""
    unseen = [layer for layer, resolution in enumerate(path.resolutions) if not visits[layer, resolution]]
    if unseen:
        raise InputError(
            f"from_supernet: no step of the search in {source.run} trained {source.architecture} in layer "
            f"{', '.join(map(str, unseen))} at its resolution: {_retrain_command(source)} trains it"
        )


def _last_state(source: Source) -> dict[str, Any]:
    """What the method saved at the end of the search."""
    folder = source.run / "checkpoints"
    saved = CheckpointStore(folder).load_latest() if folder.is_dir() else None
    if saved is None:
        raise InputError(f"{folder}: holds no checkpoint; the weights of a search lie in its last one")
    step, config = saved[0], source.result.config
    num_steps = config["epochs"] * (source.result.data["num_train"] // config["batch_size"])
    if step != num_steps:
        raise InputError(
            f"{folder}: the last checkpoint that can be read is of step {step}; the search had {num_steps}"
        )
    return saved[1]["loop"]["method"]


def retrained(source: Source, name: str | None) -> Found:
    """The architecture as `python -m bmsn.retrain` trained it.

    Args:
        source: run and architecture.
        name: of the network, or how that begins; None: the one of the smallest seed.
    Raises:
        InputError: it was not retrained, or with several settings and no name says which; weights that are missing or
            damaged; images that have changed.
    """
    task, trained = _chosen_network(source, name)
    path = source.run / RETRAIN_FOLDER / f"{task.name}.npz"
    weights = read_weights(path)
    data = source.images.open(source.space)
    own_path = as_path(source.space, source.architecture)
    bare = build_path_network(source.space, own_path, data.num_classes, data.in_channels)
    try:
        bare.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path}: holds no weights of {source.architecture}: {error}") from error
    mean, std = normalisation(data.train_images)
    network = _with_normalisation(source, bare, mean, std)
    return network, data, {
        "batch_norm": "affine", "normalisation": {"mean": mean.tolist(), "std": std.tolist()},
        "accuracy": _accuracy(source, network, data.test_images, data.test_labels, "test images"),
        "weights": {
            "text": f"retrained, seed {task.seed}", "from": "retraining", "network": task.name, "seed": task.seed,
            "settings": asdict(task.settings), "reported": asdict(trained) | {"percent": trained.accuracy},
        },
    }  # fmt: skip


def _chosen_network(source: Source, name: str | None) -> tuple[Task, TaskResult]:
    """One of the architecture's networks in the run's folder retrain, with its weights beside it."""
    folder = source.run / RETRAIN_FOLDER
    found = _networks(source, folder)
    if not found:
        raise InputError(
            f"architecture {source.architecture} was not retrained in {source.run}: {_retrain_command(source)} does "
            "it; --from-supernet exports it without"
        )
    if name is not None:
        beginning = f"{name}-" if re.search(r"-seed\d+$", name) else name  # seed1 is not how seed10 begins
        fitting = [(task, trained) for task, trained in found if task.name.startswith(beginning)]
        if not fitting:
            names = ", ".join(task.name for task, _ in found)
            raise InputError(f"network must be one of {names}, or how it begins; got {name}")
        found = fitting
    if len({task.settings for task, _ in found}) > 1:
        names = ", ".join(f"{task.name} ({task.settings.epochs} epochs)" for task, _ in found)
        raise InputError(
            f"architecture {source.architecture} was retrained with several settings: network must say which: {names}"
        )
    task, trained = min(found, key=lambda pair: pair[0].seed)
    if not (folder / f"{task.name}.npz").is_file():
        raise InputError(
            f"{folder}: the weights of {task.name} were not kept; remove {task.name}.json, and "
            f"{_retrain_command(source)} trains it again"
        )
    return task, trained


def _networks(source: Source, folder: Path) -> list[tuple[Task, TaskResult]]:
    """All that were trained on these images, by name. Files that are damaged or of other images are passed over."""
    found = []
    for path in sorted(folder.glob(f"{source.architecture.slug}-seed*.json")):
        try:
            content = json.loads(path.read_bytes())
            settings = content["key"]["settings"]
            task = Task(
                space=source.space.spec, pool=source.space.pool, architecture=source.architecture.slug,
                images=source.images, seed=content["key"]["seed"],
                settings=TrainingSettings(**settings | {"milestones": tuple(settings["milestones"])}),
            )  # fmt: skip
            trained = TaskResult(**content["result"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if task.name == path.stem:  # else of other images, or of an older format
            found.append((task, trained))
    return found


def _retrain_command(source: Source) -> str:
    return f"python -m bmsn.retrain {source.run} --architecture {source.architecture.slug}"


def _with_normalisation(source: Source, bare: nn.Sequential, mean: np.ndarray, std: np.ndarray) -> nn.Sequential:
    return with_normalisation(bare, torch.from_numpy(mean), torch.from_numpy(std)).to(source.device)


def _accuracy(
    source: Source, network: nn.Sequential, images: np.ndarray, labels: np.ndarray, what: str
) -> dict[str, Any]:
    """Counted in memory, in float32."""
    table = unit_table(images.shape[3])
    correct = count_correct(network, images, labels, table, torch.float32, source.device)
    here = environment(source.device.type)
    return {
        "correct": correct, "total": len(labels), "percent": 100 * correct / len(labels), "images": what,
        "dtype": "float32", "device": here["cuda_device"] or here["cpu_model"],
    }  # fmt: skip
