"""The weights of a network as an npz file: plain arrays by the names of its `state_dict`, nothing pickled."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bmsn.checkpoint import write_atomically
from bmsn.errors import InputError


def write_weights(path: Path, network: nn.Module) -> None:
    """Writes all parameters and buffers; the file appears whole or not at all."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in network.state_dict().items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def read_weights(path: Path) -> dict[str, Tensor]:
    """What `write_weights` wrote. Raises InputError where the file is missing or damaged (each array has a CRC)."""
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: is missing") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:  # what zipfile meets in flags
        raise InputError(f"{path}: is damaged: {error}") from error
