"""What a run needs to go on after it died: files that are whole or absent, checkpoints, and where they were made.

A checkpoint reaches the disk in this order: its file, then the manifest that names it, then the removal of the one it
replaces. Whatever moment a kill picks, the manifest lists only files that were written to the end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bmsn.errors import InputError

_LOG = logging.getLogger(__name__)
_FILE_NAME = re.compile(r"checkpoint-\d{9,}(-again)?\.pt")
_BIT_EXACT_FIELDS = {"threads": "threads", "instruction_set": "instruction set", "torch": "torch version"}


class CheckpointWriteError(OSError):
    """A checkpoint could not be written (disk full, ...). Those before it are still there; training can go on."""


class Writable(Protocol):
    """The part of a binary file that `write_atomically` offers to a callable."""

    def write(self, data: bytes | memoryview, /) -> int: ...

    def flush(self) -> None: ...


class _UnbufferedFile:
    """Writes straight to a descriptor. Python's own buffer would try again, when closed, what a full disk refused."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        return size

    def flush(self) -> None:
        pass


class _MeasuredFile:
    """Passes writes on, counts and hashes them, and keeps the first error: none may be thrown through torch's C++."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview, /) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
                self._sha256.update(data)
            except BaseException as error:  # KeyboardInterrupt as well
                self.error = error
        self.size += size
        return size

    def flush(self) -> None:
        pass

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def write_atomically(path: str | Path, data: bytes | Callable[[Writable], object]) -> None:
    """Replaces a file: after a crash or a power cut at any moment there is the old content or the new, never a part.

    Args:
        path: the file; its folder exists.
        data: the content, or a function that writes it to the binary file that it is given.
    Raises:
        OSError: disk full, ...; it names `path`. The old file is unchanged and nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".bmsn-{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            file = _UnbufferedFile(descriptor)
            if callable(data):
                data(file)
            else:
                file.write(data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None  # a failed write names no file, others the temporary one
        raise
    sync_folder(path.parent)


def remove_stray_files(folder: Path) -> None:
    """Removes what a kill inside `write_atomically` left behind. Only for a folder that nobody else writes to."""
    for path in folder.glob(".bmsn-*.tmp"):
        with contextlib.suppress(OSError):
            os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut: a new file is not there without it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that can't sync folders
            raise
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One checkpoint in the manifest."""

    file: str
    step: int
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not (isinstance(self.step, int) and isinstance(self.size, int) and isinstance(self.sha256, str)):
            raise TypeError("step and size must be integers, sha256 a string")
        if not _FILE_NAME.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is no name of a checkpoint")


class CheckpointStore:
    """The checkpoints of one run. One process at a time: the run folder's lock sees to that.

    Args:
        folder: where they lie; made where it is missing. Leftovers of a killed `save` are removed.
        keep: how many of the last ones are kept; with 2 a damaged newest one costs steps, not the run.
    Raises:
        InputError: the folder cannot be made, or its manifest cannot be read.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep must be at least 1, not {keep}")
        self._folder = Path(folder)
        self._manifest = self._folder / "manifest.json"
        self._keep = keep
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.parent)
        except OSError as error:
            raise InputError(f"{self._folder}: no folder for checkpoints: {error.strerror}") from error
        remove_stray_files(self._folder)
        self._entries = self._read_manifest()  # by rising step

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Saves a state; when this returns it survives a power cut. Checkpoints of this step or later are superseded.

        Args:
            step: the number of steps done.
            state: nested dicts, lists and tuples of tensors, numpy arrays and scalars, int, float, bool, str, None.
                Arrays come back as tensors, tensors on the CPU.
        Returns:
            The file.
        Raises:
            CheckpointWriteError: the disk is full, ...; the checkpoints before it can still be loaded.
            TypeError: a value of another type; the message has its place in the state.
        """
        payload = {"step": step, "state": _storable(state, "state")}
        # A file that the manifest names is never overwritten: a kill before the new manifest would lose it.
        listed = {entry.file for entry in self._entries}
        name = f"checkpoint-{step:09d}.pt"
        name = name if name not in listed else f"checkpoint-{step:09d}-again.pt"
        path = self._folder / name
        try:
            size, sha256 = _write_checkpoint(path, payload)
            new = _Entry(file=name, step=step, size=size, sha256=sha256)
            entries = [*(entry for entry in self._entries if entry.step < step), new][-self._keep :]
            content = {"checkpoints": [asdict(entry) for entry in entries]}
            write_atomically(self._manifest, json.dumps(content, indent=1).encode())
        except OSError as error:
            self._remove_unlisted(path)
            reason = error.strerror or str(error)
            raise CheckpointWriteError(error.errno, f"no checkpoint at step {step}: {reason}", str(path)) from error
        self._entries = entries
        for old in self._folder.glob("checkpoint-*.pt"):
            if old.name not in {entry.file for entry in entries}:
                with contextlib.suppress(OSError):
                    os.unlink(old)
        return path

    def load_latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that is undamaged: its step and state. A damaged one is skipped with a warning.

        Returns:
            None where no checkpoint was ever completed.
        Raises:
            InputError: there are checkpoints and every one is damaged.
        """
        damages = []
        for index in reversed(range(len(self._entries))):
            entry = self._entries[index]
            try:
                payload = self._load(entry)
            except Exception as error:  # torch.load raises whatever its unpickler meets
                damages.append(f"{self._folder / entry.file}: {error}")
                _LOG.warning("checkpoint not used: %s", damages[-1])
                continue
            self._entries = self._entries[: index + 1]  # the damaged ones must not push this one out
            return entry.step, payload["state"]
        if damages:
            raise InputError("every checkpoint is damaged: " + "; ".join(damages))
        return None

    def _load(self, entry: _Entry) -> dict[str, Any]:
        try:
            file = open(self._folder / entry.file, "rb")  # noqa: SIM115 (the with below closes it)
        except FileNotFoundError:
            raise ValueError("missing") from None
        with file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                raise ValueError(f"{size} bytes instead of {entry.size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise ValueError("its content has changed: the sha256 is not that of the manifest")
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
        if payload["step"] != entry.step:
            raise ValueError(f"is of step {payload['step']}, the manifest says {entry.step}")
        return payload

    def _read_manifest(self) -> list[_Entry]:
        try:
            content = json.loads(self._manifest.read_bytes())
            return sorted((_Entry(**fields) for fields in content["checkpoints"]), key=lambda entry: entry.step)
        except FileNotFoundError:
            if unlisted := sorted(path.name for path in self._folder.glob("checkpoint-*.pt")):
                _LOG.warning("%s has no manifest.json: not used: %s", self._folder, ", ".join(unlisted))
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self._manifest}: damaged ({error}), so no checkpoint can be verified; "
                f"delete {self._folder} to start at step 0"
            ) from error

    def _remove_unlisted(self, path: Path) -> None:
        """Frees the disk after a failed save, unless the new manifest is in place and only its sync failed."""
        with contextlib.suppress(OSError, InputError):
            if path.name not in {entry.file for entry in self._read_manifest()}:
                os.unlink(path)


def _write_checkpoint(path: Path, payload: dict[str, Any]) -> tuple[int, str]:
    """Size and sha256 of what was meant to be written, so that a disk that changes it is found out as well."""
    measured: _MeasuredFile

    def write(file: Writable) -> None:
        nonlocal measured
        measured = _MeasuredFile(file)
        torch.save(payload, measured)  # type: ignore[arg-type]  # it needs write and flush alone
        if measured.error is not None:
            raise measured.error

    write_atomically(path, write)
    return measured.size, measured.sha256


def _storable(value: Any, place: str) -> Any:
    """The value as `torch.load(weights_only=True)` accepts it: arrays as tensors, each tensor with its own storage."""
    if value is None or type(value) in (bool, int, float, str):  # not an IntEnum: it would be saved and not be loaded
        return value
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        # torch.save writes the whole storage of a view: a row of an arena would bring the arena along
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    if isinstance(value, np.generic):
        return _storable(value.item(), place)
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.array(value, order="C"))
        except TypeError as error:
            raise TypeError(f"{place}: {error}") from error
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{place}: a key must be a str or an int, not {key!r}")
        return {key: _storable(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_storable(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{place}: a checkpoint cannot hold a {type(value).__name__}")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where a run takes place: versions, threads, processor, commit. For checkpoints, results and benchmarks.

    Args:
        device: what the run computes on; "cuda..." names the GPU, which starts CUDA. "cpu" does not start it.
    """
    cpu_model, flags = _cpu_model_and_flags()
    capability = torch.backends.cpu.get_cpu_capability()
    # oneDNN picks its kernels by these, which torch's own name for the instruction set does not tell apart
    matrix = sorted(flag for flag in flags if flag.startswith("amx_") or flag in ("avx512_bf16", "avx512_fp16"))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    on_cuda = device.startswith("cuda")
    return {
        "bmsn": _bmsn_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_model": cpu_model,
        "cpu_capability": capability,
        "instruction_set": " ".join([capability, *matrix, *([f"limit:{limit}"] if limit else [])]),
        "cuda_device": torch.cuda.get_device_name(device if on_cuda else None)
        if on_cuda or torch.cuda.is_initialized()
        else None,
        "git_commit": _git_commit(),
    }


def environment_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps a resume on the CPU from being bit-exact: one sentence a field, empty where nothing does."""
    return [
        f"{name}: {stored.get(field)} when it was saved, {now.get(field)} now"
        for field, name in _BIT_EXACT_FIELDS.items()
        if stored.get(field) != now.get(field)
    ]


def _bmsn_version() -> str:
    try:
        return importlib.metadata.version("bmsn")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model_and_flags() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name") or platform.processor() or platform.machine(), set(fields.get("flags", "").split())


def _git_commit() -> str | None:
    """The commit of the checkout that this package lies in ("-dirty" where it was changed); None without a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
