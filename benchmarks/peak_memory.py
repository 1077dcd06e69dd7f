"""Scores all architectures of a space on one batch and prints, as JSON, what that added to the process's peak memory.

python benchmarks/peak_memory.py --space resnet50-cifar100 --batch-size 64 --max-mib 2048
"""

from __future__ import annotations

import argparse
import json
import resource

import torch

from bmsn.evaluator import all_pairs, make_plan, score_architectures
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of scoring all architectures of a space.")
    parser.add_argument("--space", default="resnet50-cifar100")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-mib", type=int, default=2048, help="max_bytes of the scoring, in MiB")
    given = parser.parse_args()
    space = SearchSpace.named(given.space)
    nets = SupernetMixture(space, 1, 100, generator=torch.Generator().manual_seed(0))
    images = torch.randn(given.batch_size, 3, space.image_size, space.image_size).to(compute_dtype(torch.device("cpu")))
    labels = torch.randint(100, (given.batch_size,))
    pairs, cap = all_pairs(nets), given.max_mib * 2**20
    planned = make_plan(nets, images, pairs, batch_size=given.batch_size, max_bytes=cap).peak_bytes
    one = pairs[:1]  # loads libraries, starts threads, and takes what oneDNN needs for its kernels
    score_architectures(nets, images, labels, one, batch_size=given.batch_size, max_bytes=cap)
    before = peak_mib()
    score_architectures(nets, images, labels, pairs, batch_size=given.batch_size, max_bytes=cap)
    found = {"before (MiB)": before, "added (MiB)": peak_mib() - before, "planned (MiB)": planned / 2**20}
    print(json.dumps({name: round(value) for name, value in found.items()} | {"cap (MiB)": given.max_mib}))


if __name__ == "__main__":
    main()
