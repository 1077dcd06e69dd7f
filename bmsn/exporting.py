"""`run_export`: one architecture of a search as files that need no bmsn: safetensors, `torch.export` and ONNX.

Its weights are those of `python -m bmsn.retrain`, or without retraining those that it has in a supernet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bmsn.errors import InputError
from bmsn.exporting_files import check_free, check_installed, write_network
from bmsn.exporting_network import describe_architecture
from bmsn.exporting_sources import Source, retrained, untrained
from bmsn.field_types import check_types
from bmsn.ops.convolution import without_tf32
from bmsn.paths import find_candidate
from bmsn.retraining import read_result
from bmsn.space import SearchSpace
from bmsn.tasks import Images
from bmsn.trainer import out_of_memory_said, resolve_device


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
        run: folder of a finished search.
        architecture: what to export, as 5,3,2 or as a path of resolutions, one a layer: 0-0-1-2-1 and so on.
        from_supernet: the weights that it has in a supernet, without retraining: BatchNorm is calibrated on training
            images and folded into the convolutions. Else those of python -m bmsn.retrain.
        supernet: which one, from 0, with from_supernet; None: the one that ranked it.
        calibration: training images to calibrate on, with from_supernet; None: 1,024.
        network: which of several retrained networks, as their files in the run's folder retrain are called, or how
            that begins: 5-3-2-seed1; None: that of the smallest seed. The best on the test images would be a choice by
            them.
        out: a new or empty folder; None: export/5-3-2, or export/5-3-2-supernet, in the run folder.
        device: where to calibrate and to count.
    """

    run: Path
    architecture: str
    from_supernet: bool = False
    supernet: int | None = None
    calibration: int | None = None
    network: str | None = None
    out: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        if self.calibration is not None and self.calibration < 2:
            raise InputError(f"calibration must be at least 2 images; got {self.calibration}")
        for name, needed in (("supernet", True), ("calibration", True), ("network", False)):
            value = getattr(self, name)
            if value is not None and self.from_supernet != needed:
                raise InputError(
                    f"{name} is for an export {'with' if needed else 'without'} from_supernet; got {value}"
                )


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written: the folder, and the content of its config.json."""

    folder: Path
    config: dict[str, Any]

    @property
    def summary(self) -> str:
        """Where it is and how good, in words."""
        found, depths = self.config["accuracy"], self.config["stage_depths"]
        name = self.config["architecture"] if depths is None else str(depths).replace(" ", "")
        return (
            f"{name}, {self.config['weights']['text']}: {found['percent']:.2f} % of the {found['total']} "
            f"{found['images']}\n{self.folder}: {', '.join([*self.config['sha256'], 'config.json'])}"
        )


def run_export(config: ExportConfig) -> Export:
    """Writes model.safetensors, config.json, model.pt2 (`torch.export`) and model.onnx into one folder.

    All of them take RGB images in [0, 1] and normalise inside (`bmsn.exporting_files` says why), and give logits. The
    accuracy in config.json is counted in float32 on the network that is then written: on the test images where it was
    retrained, on the validation half where its weights are a supernet's, which was ranked by those images.

        >>> exported = bmsn.run_export(
        ...     bmsn.ExportConfig(run=Path("runs/a"), architecture="3,2,2", from_supernet=True)
        ... )
        >>> print(exported.folder, exported.config["accuracy"]["images"])
        runs/a/export/3-2-2-supernet images of the validation half
        >>> network = bmsn.load_network(exported.folder)

    Args:
        config: settings.
    Raises:
        InputError: a run that is unfinished, of another schema, without its weights or whose images have changed; an
            architecture that is not in the space, or was not retrained; settings that cannot be; a package that is not
            installed.
        RunStopped: no memory left.
    """
    check_installed()
    result = read_result(config.run)
    space = SearchSpace.named(result.config["space"], pool=result.config["pool"])
    architecture = find_candidate(space, config.architecture)
    default = f"{architecture.slug}-supernet" if config.from_supernet else architecture.slug
    folder = config.run / "export" / default if config.out is None else config.out
    check_free(folder)
    source = Source(
        run=config.run, result=result, space=space, architecture=architecture,
        images=Images(spec=result.config["data"], generator_seed=None, fingerprint=result.data["fingerprint"]),
        device=resolve_device(config.device),
    )  # fmt: skip
    # Networks are built to be filled with weights: what they draw before is not to come from the caller's random state.
    out_of_memory = out_of_memory_said(lambda: f"export of {architecture}", source.device)
    with out_of_memory, without_tf32(source.device), torch.random.fork_rng(devices=[]):
        if config.from_supernet:
            network, data, described = untrained(source, config.supernet, config.calibration)
        else:
            network, data, described = retrained(source, config.network)
    whole = {
        **describe_architecture(space, architecture), "space": space.arguments(), "num_classes": data.num_classes,
        "in_channels": data.in_channels, "image_size": data.image_size, "class_names": list(data.class_names),
        **described, "data": {"name": data.name, "fingerprint": data.fingerprint}, "run": str(config.run),
    }  # fmt: skip
    return Export(folder=folder, config=write_network(folder, network.cpu(), whole))
