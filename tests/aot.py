"""Compiles what the Triton launchers would launch, ahead of time and without a GPU, and reads what it needs.

The launchers themselves run, on tensors without memory (device "meta") and with recorders in place of the kernels, so
that what is compiled is what a call would launch, tuned configuration included.

    python tests/aot.py     # `make check-gpu`: every case for every architecture, as a table; exit code 1 for a spill
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ARCHITECTURES = (90, 80, 100)  # H100 and H200; A100; B200
DTYPES = (torch.bfloat16, torch.float32)
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES |= {torch.bool: "i1", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
SHARED = ("statistics", "bn_add_relu_pool")  # whose launchers others call


@dataclass(frozen=True)
class Case:
    """A launch: its name, the dtype of its maps, whether the ordinary run compiles it, and the call that makes it."""

    name: str
    dtype: torch.dtype
    ordinary: bool
    launch: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.name}-{TYPES[self.dtype]}"


@dataclass(frozen=True)
class Launch:
    """What a launcher gave a kernel."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes of local memory and stack a thread, shared bytes."""

    kernel: str
    registers: int
    local: int
    stack: int
    shared: int


def record(launch: Callable[[], None], grids: list[int] | None = None) -> list[Launch]:
    """Runs a launcher with recorders in place of all kernels; into `grids`: how many programs each has."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            if grids is not None:
                grids.append(grid[0])
            return lambda *args, **options: launches.append(Launch(self.kernel, args, options))

    modules = {*(kernels(name) for name in SHARED), importlib.import_module(_module_of(launch))}
    with ExitStack() as stack:
        for module in modules:
            found = {name: Recorder(value) for name, value in vars(module).items() if name.endswith("_kernel")}
            stack.enter_context(patch.multiple(module, **found))
        launch()
    return launches


def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Compiles a recorded launch as the JIT would for these arguments: same specialisation, same options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {name: launch.options[name] for name in names if name in launch.options}
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], constants[place,] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Usage(launch.kernel.__name__, *_resources(compiled.asm["cubin"]), compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, local memory and stack, from the cuobjdump that Triton ships: without a GPU it does not say itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = [re.search(rf"\b{name}:(\d+)", done.stdout) for name in ("REG", "LOCAL", "STACK")]
    assert all(found), f"cuobjdump printed no resource usage:\n{done.stdout}"
    registers, local, stack = (int(match[1]) for match in found if match)
    return registers, local, stack


def kernels(name: str) -> ModuleType:
    return importlib.import_module(f"bmsn.kernels.{name}")


def _module_of(launch: Callable[[], None]) -> str:
    return launch.func.__module__ if isinstance(launch, partial) else launch.__module__


# The cases. -----------------------------------------------------------------------------------------------------------


def _map(channels: int, size: int, dtype: torch.dtype, batch: int = 512) -> Tensor:
    return torch.empty((batch, channels, size, size), dtype=dtype, device="meta", memory_format=torch.channels_last)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(out_channels: int, in_channels: int, kernel: int, dtype: torch.dtype, apart: int = 0) -> Tensor:
    """Four sets; `apart`: elements between one and the next, as in an arena. An odd number takes away all alignment."""
    shape = (out_channels, kernel, kernel, in_channels)
    rows = _meta(4, torch.Size(shape).numel() + apart, dtype=dtype)
    return rows[:, : torch.Size(shape).numel()].unflatten(1, shape).permute(0, 1, 4, 2, 3)


def _conv_case(
    dtype: torch.dtype,
    i: int,
    o: int,
    kernel: int,
    stride: int,
    stats: bool,
    shortcut: bool,
    ordinary: bool,
    apart: int = 0,
) -> Case:
    out = [_map(o, 32 // stride, dtype), _meta(2, 2, o)]
    launch = partial(
        kernels("conv_bn").launch_conv_bn,
        *(_map(i, 32, dtype), _weight(o, i, kernel, dtype, apart), 2, _meta(2, 2, i) if stats else None),
        *(_meta(2, dtype=torch.int32), stride, _weight(o, i, 1, dtype, apart) if shortcut else None),
        *(out * 2 if shortcut else out),
    )
    words = ["normed"] * stats + ["shortcut"] * shortcut + ["unaligned"] * (apart > 0)
    return Case(f"conv_bn {i}->{o} {kernel}x{kernel}/{stride} {' '.join(words)}".strip(), dtype, ordinary, launch)


def _scale_case(dtype: torch.dtype, i: int, o: int, kernel: int, stride: int, ordinary: bool) -> Case:
    y = _map(o, 32 // stride, dtype)
    launch = partial(
        kernels("conv_bn").launch_conv_scale,
        *(_map(i, 32, dtype), _weight(o, i, kernel, dtype), 2, _meta(2, o), _meta(2, o), True, y),
        *(_meta(2, dtype=torch.int32), stride, y),
    )
    return Case(f"conv_scale {i}->{o} {kernel}x{kernel}/{stride} added relu", dtype, ordinary, launch)


def _pool_case(dtype: torch.dtype, channels: int, pool: str | None, shortcut: str, ordinary: bool) -> Case:
    y = _map(channels, 32, dtype)
    stats = _meta(2, 2, channels)
    launch = partial(
        kernels("bn_add_relu_pool").launch_bn_add_relu_pool,
        *(y, stats, None if shortcut == "none" else y, stats if shortcut == "normed" else None),
        *(y, _map(channels, 16, dtype) if pool else None, pool or "max"),
    )
    return Case(f"bn_add_relu_pool {channels} pool={pool} shortcut={shortcut}", dtype, ordinary, launch)


def _head_case(dtype: torch.dtype, channels: int, classes: int, ordinary: bool) -> Case:
    launch = partial(
        kernels("head").launch_head,
        *(_map(channels, 8, dtype), _meta(256, dtype=torch.int64), _meta(4, classes, channels), _meta(4, classes)),
        *(2, _meta(2, dtype=torch.int32), _meta(2, dtype=torch.int64)),
    )
    return Case(f"head {channels}->{classes}", dtype, ordinary, launch)


def _norm_relu_case(
    dtype: torch.dtype, channels: int, shortcut: str, pool: str | None, ordinary: bool, affine: bool = False
) -> Case:
    """Forward and backward; an affine step has one group."""
    branches = 1 + (shortcut == "normed")
    x, stats = _map(channels, 32, dtype), _meta(branches, 2, 1 if affine else 2, channels)
    steps = _meta(branches, 2, channels) if affine else None
    y = _map(channels, 16, dtype) if pool else x
    index = _map(channels, 16, torch.uint8) if pool else None
    module = kernels("norm_relu")

    def launch() -> None:
        module.launch_norm_relu(x, None if shortcut == "none" else x, steps, y, stats, index, pool)
        masks = y if pool == "max" or (pool is None and shortcut != "none") else None
        module.launch_norm_relu_backward(
            *(y, masks, x, x if shortcut == "normed" else None, steps, stats, index, pool),
            *(x, None if shortcut == "none" else x, steps),
        )

    launch.__module__ = module.__name__
    return Case(f"norm_relu {channels} pool={pool} shortcut={shortcut}{' affine' * affine}", dtype, ordinary, launch)


def _cross_entropy_case(images: int, classes: int, ordinary: bool) -> Case:
    logits, labels = _meta(images, classes), _meta(images, dtype=torch.int64)
    outputs = (_meta(), _meta(dtype=torch.int64), logits)
    launch = partial(kernels("cross_entropy").launch_cross_entropy, logits, labels, *outputs)
    return Case(f"cross_entropy {images}x{classes}", torch.float32, ordinary, launch)


def _sgd_case(size: int, copies: bool, ordinary: bool) -> Case:
    rows, scalar = _meta(4, size), _meta()
    low = _meta(4, size, dtype=torch.bfloat16) if copies else None
    row = _meta(dtype=torch.int64)
    launch = partial(kernels("sgd").launch_sgd, rows, rows, low, _meta(size), row, scalar, scalar, 0.9, 1e-3)
    return Case(f"sgd {size} copies={copies}", torch.float32, ordinary, launch)


def _statistics_case(dtype: torch.dtype, channels: int, ordinary: bool) -> Case:
    launch = partial(kernels("statistics").launch_batch_statistics, _map(channels, 32, dtype), 2, _meta(2, 2, channels))
    return Case(f"batch_statistics {channels}", dtype, ordinary, launch)


def _augment_case(dtype: torch.dtype, size: int, channels: int, crop: bool, ordinary: bool) -> Case:
    images, step = _meta(1000, size, size, channels, dtype=torch.uint8), _meta(dtype=torch.int64)
    labels = _meta(1000, dtype=torch.int64) if crop else None
    pixels, chosen = _meta(256, size, size, channels, dtype=dtype).permute(0, 3, 1, 2), _meta(256, dtype=torch.int64)
    launch = partial(
        kernels("batches").launch_augment,
        *(images, labels, _meta(500, dtype=torch.int64), _meta(256, channels, dtype=dtype), step, 2**62 + 7, crop, 4),
        *(pixels, chosen),
    )
    return Case(f"augment {size}x{size}x{channels}{' cropped' * crop}", dtype, ordinary, launch)


def _mixture_case(architectures: int, supernets: int, ordinary: bool) -> Case:
    double, counter = partial(_meta, dtype=torch.float64), partial(_meta, dtype=torch.int64)
    shape = architectures, supernets
    launch = partial(
        kernels("balance").launch_mixture_step,
        *(double(*shape[::-1]), double(supernets), counter(*shape), counter(*shape), double(7), counter()),
        *(double(architectures), counter(), counter(1001), double(1001), double(1001), counter()),
        *(_meta(dtype=torch.bool), 256, 0.9, 1e-12, 1, 500),
    )
    return Case(f"mixture_step {architectures}x{supernets}", torch.float64, ordinary, launch)


def cases() -> list[Case]:
    """All cases; the ordinary ones, first, have every tuned configuration in its heaviest variant."""
    found: list[Case] = []
    for dtype in DTYPES:
        for shortcut in (False, True):
            for config in _configs(dtype, shortcut):  # as many input channels as the configuration takes at a time
                i, o = max(config.block_n, config.block_k), config.block_n
                found.append(_conv_case(dtype, i, o, 3, 1, True, shortcut, True))
        found += [
            _conv_case(dtype, 16, 16, 3, 1, True, False, True),
            _conv_case(dtype, 3, 16, 3, 1, False, False, True),
        ]
        for config in _configs(dtype, False):
            stride = 2 if config.block_n == 16 else 1  # it changes addresses alone
            found.append(_scale_case(dtype, max(config.block_n, config.block_k), config.block_n, 3, stride, True))
        found += [_statistics_case(dtype, 64, True), _pool_case(dtype, 64, "max", "normed", True)]
        found += [_pool_case(dtype, 64, None, "normed", True), _head_case(dtype, 2048, 512, True)]
        found += [_head_case(dtype, 64, classes, True) for classes in (10, 32, 64, 101)]
        found += [_augment_case(dtype, 32, 3, True, True), _augment_case(dtype, 32, 3, False, True)]
        for kind in ("normed", "plain", "none"):  # each leaves other code away
            found += [_norm_relu_case(dtype, 64, kind, pool, True) for pool in (None, "max")]
        found += [_norm_relu_case(dtype, 64, "normed", pool, True, affine=True) for pool in (None, "max", "avg")]
        found += [_norm_relu_case(dtype, 64, "none", None, True, affine=True)]
    found += [_mixture_case(36, 4, True), _mixture_case(1024, 16, True)]
    found += [_mixture_case(560, 8, False), _mixture_case(1, 1, False), _mixture_case(3, 64, False)]
    found += [_cross_entropy_case(128, 10, True), _cross_entropy_case(256, 100, True), _sgd_case(270896, True, True)]
    for dtype in DTYPES:
        for shortcut in (False, True):
            for config in _configs(dtype, shortcut):
                found.append(_conv_case(dtype, 64, config.block_n, 3, 1, True, shortcut, False, apart=7))
                for i in (3, 64):
                    for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
                        for stats in (False, True):
                            found.append(_conv_case(dtype, i, config.block_n, kernel, stride, stats, shortcut, False))
        for config in _configs(dtype, False):
            for i in (3, 64):
                for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
                    found.append(_scale_case(dtype, i, config.block_n, kernel, stride, False))
        found += [_statistics_case(dtype, channels, False) for channels in (16, 32, 2048)]
        for channels in (16, 32, 256):
            for pool in (None, "max", "avg"):
                found += [_pool_case(dtype, channels, pool, kind, False) for kind in ("none", "plain", "normed")]
        found += [_head_case(dtype, channels, 10, False) for channels in (16, 512)]
        for channels in (16, 32, 256):
            for pool in (None, "max", "avg"):
                for affine in (False, True):
                    kinds = ("none", "plain", "normed")
                    found += [_norm_relu_case(dtype, channels, kind, pool, False, affine) for kind in kinds]
    found += [_cross_entropy_case(1024, 1000, False), _sgd_case(270895, True, False), _sgd_case(64, False, False)]
    unique: dict[str, Case] = {}
    for case in found:
        unique.setdefault(str(case), case)
    return list(unique.values())


def _configs(dtype: torch.dtype, shortcut: bool) -> tuple[Any, ...]:
    return kernels("conv_bn").CONFIGS[dtype.itemsize, shortcut]


def row(case: Case, architecture: int, usage: Usage) -> str:
    spill = "spills" if usage.local or usage.stack else ""
    return (
        f"sm_{architecture:<4}{case!s:<52}{usage.kernel:<28}{usage.registers:>4} registers"
        f"{usage.local:>6} local{usage.stack:>6} stack{usage.shared:>8} shared  {spill}"
    ).rstrip()


def may_spill(case: Case, architecture: int) -> bool:
    """What is tuned for, bfloat16 on sm_90, may not; elsewhere a spill is listed."""
    return architecture != 90 or case.dtype != torch.bfloat16


def main() -> int:
    failed = 0
    for case in cases():
        for launch in record(case.launch):
            for architecture in ARCHITECTURES:
                usage = compile_launch(launch, architecture)
                print(row(case, architecture, usage), flush=True)
                failed += bool(usage.local or usage.stack) and not may_spill(case, architecture)
    print(f"{failed} kernels in bfloat16 for sm_90 spill" if failed else "no kernel in bfloat16 for sm_90 spills")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
