"""The files of an export: model.safetensors, config.json, model.pt2 and model.onnx, in a folder that appears at once.

Images enter the graphs as they come from a decoder, RGB in [0, 1] as float32, and are normalised inside: whoever uses a
file needs no constants of ours, and a forgotten or doubled normalisation, which costs accuracy without an error, cannot
happen. The batch is dynamic, height and width are fixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmsn.checkpoint import sync_folder, write_atomically
from bmsn.errors import InputError
from bmsn.exporting_network import rebuild

SCHEMA_VERSION = 1
OPSET = 18
WEIGHTS, CONFIG, PROGRAM, ONNX = "model.safetensors", "config.json", "model.pt2", "model.onnx"
INPUT, OUTPUT = "images", "logits"
_WRITERS = ("safetensors", "onnx", "onnxscript")


def check_installed(*packages: str) -> None:
    """Raise InputError, which says what to install, unless the packages (none named: those that write) are there."""
    missing = [name for name in packages or _WRITERS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"export needs {', '.join(missing)}: pip install 'bmsn[export]'")


def check_free(folder: Path) -> None:
    """Raise InputError unless `folder` is absent or empty, so that nothing is mixed and nothing is lost."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out {folder}: must be a new or an empty folder; something is there")
    except OSError as error:
        raise InputError(f"out {folder}: cannot be read: {error.strerror}") from error


def write_network(folder: Path, network: nn.Sequential, config: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the network in all formats; the folder is there with all of its files, or not at all.

    Args:
        folder: absent or empty; folders above it are made.
        network: on the CPU, in evaluation mode, for images in [0, 1].
        config: what config.json says of it; `rebuild` reads it. in_channels, image_size are those of the graphs.
    Returns:
        The content of config.json: `config`, the input and output of the graphs, versions, sha256 of each file.
    Raises:
        InputError: no folder can be made there.
    """
    from safetensors.torch import save

    shape = (config["in_channels"], config["image_size"], config["image_size"])
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    contents = {WEIGHTS: save(weights, metadata={"format": "pt"})}
    contents[PROGRAM], contents[ONNX] = _graphs(network, shape)
    whole = {
        "schema_version": SCHEMA_VERSION, **config,
        "input": {
            "name": INPUT, "shape": ["batch", *shape], "dtype": "float32", "range": [0, 1], "normalised_inside": True,
        },
        "output": {"name": OUTPUT, "shape": ["batch", config["num_classes"]], "dtype": "float32"},
        "onnx_opset": OPSET,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *_WRITERS)},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }  # fmt: skip
    contents[CONFIG] = (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()
    try:
        with _appearing(folder) as temporary:
            for name, content in contents.items():
                write_atomically(temporary / name, content)
    except OSError as error:
        raise InputError(f"out {folder}: cannot be written: {error.strerror}") from error
    return whole


def load_network(folder: str | Path) -> nn.Sequential:
    """The network in a folder of `python -m bmsn.export`, from model.safetensors and config.json.

        >>> network = bmsn.load_network("runs/a/export/5-1-1-supernet")
        >>> images = torch.rand(5, 3, 8, 8)  # RGB in [0, 1], as in all of the folder's formats
        >>> network(images).shape
        torch.Size([5, 4])

    Returns:
        Plain torch modules in evaluation mode: images (N, C, H, W) in [0, 1], float32, to logits (N, num_classes). H
        and W may be any multiples of the space's total stride. `normalise` is its first child; the others are those of
        `build_network`, with BatchNorm unless config.json says that it is folded.
    Raises:
        InputError: no such folder, a newer schema, a damaged file, or safetensors is not installed.
    """
    check_installed("safetensors")
    import safetensors.torch

    folder = Path(folder)
    config, content = _read(folder)
    try:
        return rebuild(config, safetensors.torch.load(content))
    except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder / CONFIG}: describes no network that fits {WEIGHTS}: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The content of config.json and of model.safetensors, which belong together."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        content = (folder / WEIGHTS).read_bytes()
        schema, sha256 = config["schema_version"], config["sha256"][WEIGHTS]
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no exported network: it has no {Path(error.filename).name}") from None
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG}: not written by bmsn.export: {error!r}") from error
    if schema != SCHEMA_VERSION:
        raise InputError(f"{folder / CONFIG}: schema_version must be {SCHEMA_VERSION}; got {schema}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{folder / WEIGHTS}: its content has changed: the sha256 is not that of {CONFIG}")
    return config, content


def _graphs(network: nn.Module, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """model.pt2 and model.onnx; the network's parameters are left as they are."""
    example = torch.zeros(2, *shape)
    with torch.no_grad(), _quiet():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        packed = io.BytesIO()
        torch.export.save(program, packed)
        onnx = torch.onnx.export(
            program, (example,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},), verbose=False,
        )  # fmt: skip
    assert onnx is not None
    return packed.getvalue(), onnx.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's words about packages that are not there and about its own deprecations."""
    log = logging.getLogger("torch.onnx._internal.exporter")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder that takes its name when the block has ended, and is gone where it raised."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".bmsn-{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of this number: in containers it comes back
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, folder)  # replaces an empty one, and no other
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)
