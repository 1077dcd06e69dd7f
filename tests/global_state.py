"""What a library must leave alone: settings of the process that belong to the program that embeds it."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def global_state() -> dict[str, str]:
    """Everything compared, by name, as text."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    return {
        "threads": f"{torch.get_num_threads()} {torch.get_num_interop_threads()}",
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch RNG": str(torch.get_rng_state().tolist()),
        "CUDA RNG": str(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else "not started"),
        "numpy RNG": str([part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]),
        "python RNG": str(random.getstate()),
        "gradients": f"{torch.is_grad_enabled()} {torch.is_anomaly_enabled()}",
        "algorithms": f"{torch.are_deterministic_algorithms_enabled()} {torch.get_float32_matmul_precision()}",
        "TF32": str([backend.allow_tf32 for backend in backends]),
        "cuDNN": f"{torch.backends.cudnn.benchmark} {torch.backends.cudnn.deterministic}",
        "warnings": str(warnings.filters),
        "logging": str([(logger.handlers, logger.level) for logger in (logging.root, logging.getLogger("bmsn"))]),
        "errors of numpy": str(np.geterr()),
        "environment": str(sorted(os.environ.items())),
        "signals": str([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]),
        "hooks": str([sys.excepthook, sys.displayhook, sys.stdout, sys.stderr]),
        "folder": os.getcwd(),
    }


@contextmanager
def unchanged(*but: str) -> Iterator[None]:
    """Asserts that the block changes nothing of `global_state` but what is named, which it must change."""
    before = global_state()
    yield
    after = global_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert set(changed) == set(but), f"changed: {changed}"
