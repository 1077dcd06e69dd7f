"""Which backend runs an op: `reference` (plain torch or numpy, always there), `cpp` (bmsn._C), `triton` (bmsn.kernels).

An op asks `resolve` once a call; a person asks `backend_report`. Importing this module starts nothing: the extension
is loaded at the first question about it, Triton is looked for without being imported, CUDA is counted through NVML.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from bmsn.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpp", "triton")

CONVOLUTIONS = ("auto", "ours", "library")  # of the Triton backend
OLDEST_TRITON = (3, 6)  # as in pyproject.toml

# What each op has, best first: `auto` takes the first that can run. A new op is one line here.
OPS: Mapping[str, tuple[str, ...]] = {
    "balance": ("cpp", "reference"),
    "mixture_step": ("cpp", "triton", "reference"),
    "augment": ("cpp", "triton", "reference"),
    "conv2d": ("cpp", "reference"),
    "norm_relu": ("cpp", "triton", "reference"),
    "conv_bn": ("cpp", "triton", "reference"),
    "conv_scale": ("cpp", "triton", "reference"),
    "batch_statistics": ("cpp", "triton", "reference"),
    "bn_add_relu_pool": ("cpp", "triton", "reference"),
    "head": ("triton", "reference"),
    "cross_entropy": ("cpp", "triton", "reference"),
    "sgd": ("cpp", "triton", "reference"),
}


@functools.cache
def _load_extension() -> tuple[ModuleType | None, str]:
    """Imports bmsn._C, after torch (so that both share torch's libgomp and thread count), and says what came of it."""
    if importlib.util.find_spec("bmsn._C") is None:
        return None, "bmsn._C was not built (no C++ compiler at installation, or BMSN_BUILD_EXT=0)"
    try:
        return importlib.import_module("bmsn._C"), "bmsn._C is loaded"
    except ImportError as error:  # a missing libgomp, another Python's ABI: the reference still runs
        return None, f"bmsn._C does not load: {error}"


def extension() -> ModuleType | None:
    """The C++ extension, or None where it was not built or does not load (`backend_report` says why)."""
    return _load_extension()[0]


@functools.cache
def _find_triton() -> tuple[bool, str]:
    """Whether there is a Triton that runs bmsn.kernels, without importing it, and what is wrong where there is not."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (pip install 'bmsn[triton]')"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built from source, or shipped in a package of another name
        return True, "Triton of an unknown version"
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is not None and tuple(map(int, number.groups())) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return False, f"Triton {version} is too old, bmsn.kernels needs {oldest} (pip install 'bmsn[triton]')"
    return True, f"Triton {version}"


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("bmsn runs on its slow reference backend: %s", reason)


def _state(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend can run on `device`, and the reason either way."""
    if backend == "reference":
        return True, "plain torch, always there"
    if backend == "cpp":
        module, reason = _load_extension()
        if module is not None and device.type != "cpu":
            return False, f"cpp runs on the CPU alone, the tensors are on {device}"
        return module is not None, reason
    usable, found = _find_triton()
    if not usable:
        return False, found
    if device.type == "cuda":
        return True, f"{found} on {device}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, f"{found}, its interpreter (TRITON_INTERPRET=1)"
    return False, f"Triton needs CUDA tensors (or TRITON_INTERPRET=1), the tensors are on {device}"


def resolve(
    op: str,
    backend: str = "auto",
    available: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> str:
    """Chooses the backend of one call: `backend`, or BMSN_BACKEND where that is "auto", or the best that can run.

    Args:
        op: a key of `OPS`.
        backend: "auto", or the name of the one that shall run.
        available: the backends that can do this particular call, best first; None means all that the op has.
        device: where the tensors are.
    Returns:
        "reference", "cpp" or "triton".
    Raises:
        InputError: no backend of that name, or the op has none of that name, or it was asked for by name and cannot run
            here; the message says why.
    """
    asked, source = backend, "backend"
    if backend == "auto":
        asked, source = os.environ.get("BMSN_BACKEND") or "auto", "BMSN_BACKEND"
    if asked not in BACKENDS:
        raise InputError(f"{source} is {asked!r}{did_you_mean(asked, BACKENDS)}; accepted: {', '.join(BACKENDS)}")
    choices = OPS[op] if available is None else tuple(available)
    device = torch.device(device)
    if asked == "auto":
        chosen = next(name for name in choices if _state(name, device)[0])
        if chosen == "reference" and "cpp" in choices and device.type == "cpu":
            _warn_once(_state("cpp", device)[1])
        return chosen
    if asked not in choices:
        raise InputError(f"{source} is {asked!r}, but {op} has only: {', '.join(choices)}")
    runs, reason = _state(asked, device)
    if not runs:
        raise InputError(f"{op}: {source} asks for {asked!r}, which cannot run: {reason}")
    return asked


def convolution_choice() -> str:
    """BMSN_CONVOLUTION: what the Triton backend convolves with; auto: see `bmsn.ops.convolution_choice`.

    Raises:
        InputError: it is none of `CONVOLUTIONS`.
    """
    asked = os.environ.get("BMSN_CONVOLUTION") or "auto"
    if asked not in CONVOLUTIONS:
        raise InputError(f"BMSN_CONVOLUTION is {asked!r}; accepted: {', '.join(CONVOLUTIONS)}")
    return asked


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """What runs on this machine and why; `print` it."""

    machine: Mapping[str, str]
    backends: Mapping[str, str]  # why each runs or does not, and with what convolution
    ops: Mapping[str, str]  # what a call with default arguments takes, on the CPU and, where there is one, on the GPU

    def __str__(self) -> str:
        groups = (self.machine, self.backends, self.ops)
        return "\n".join(f"{name:<10} {text}" for group in groups for name, text in group.items())


def _choice(op: str, device: torch.device) -> str:
    try:
        return resolve(op, device=device)
    except InputError as error:  # BMSN_BACKEND names one that cannot run: the report says so
        return f"error: {error}"


def _convolution() -> str:
    try:
        return f"BMSN_CONVOLUTION={convolution_choice()} on Triton"
    except InputError as error:
        return f"error: {error}"


def backend_report() -> BackendReport:
    """Says for every op which backend `auto` (or BMSN_BACKEND) takes on this machine, and why others do not run."""
    num_gpus = torch.cuda.device_count()  # through NVML: starts no CUDA context, unlike is_available
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if num_gpus else [])
    bfloat16 = [
        name
        for name, there in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
        )
        if there
    ]
    return BackendReport(
        machine={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 by {' and '.join(bfloat16) or 'emulation'}",
            "threads": str(torch.get_num_threads()),
            "cuda": f"{num_gpus} GPU(s), CUDA {torch.version.cuda}" if num_gpus else "no GPU",
        },
        backends={
            **{name: _state(name, devices[-1] if name == "triton" else devices[0])[1] for name in BACKENDS[1:]},
            "convolution": _convolution(),
        },
        ops={op: "; ".join(f"{_choice(op, device)} ({device.type})" for device in devices) for op in OPS},
    )
