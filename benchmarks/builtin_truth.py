"""Trains all 15 architectures of ResNet-14 alone on the built-in set and writes their test accuracies.

    python benchmarks/builtin_truth.py --variant default --seeds 0 1 2 --out benchmarks/results/synthetic_default.csv

Each (architecture, seed) is one network from `build_network` (affine BatchNorm, running statistics) on images of that
generator seed: SGD, momentum 0.9, learning rate 0.1 to 0 by cosine, weight decay 1e-3, batch 128, crop and flip, bf16
autocast where the CPU has it; the test accuracy of the last step. The seeds of the published tables were not used while
the generator was designed.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy import stats

import bmsn
from bmsn.data import BatchStream, normalisation, normalisation_table, normalise
from bmsn.data.synthetic import VARIANTS, generate_synthetic
from bmsn.rng import torch_seed
from bmsn.trainer import compute_dtype, learning_rate

SPACE = bmsn.SearchSpace.named("resnet14-cifar10")
BATCH = 128


def train_alone(variant: str, index: int, seed: int, num_images: int, threads: int) -> tuple[int, int, float]:
    """(index, seed, test accuracy in %) of one architecture after `num_images` training images."""
    torch.set_num_threads(threads)
    data = generate_synthetic(variant, seed=seed)
    table = normalisation_table(*normalisation(data.train_images))
    stream = BatchStream(
        data.train_images, data.train_labels, torch.arange(len(data.train_labels)).numpy(), table,
        batch_size=BATCH, dtype=torch.float32, seed=seed, purpose="truth", augment=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(seed, f"truth/{index}"))
        network = bmsn.build_network(SPACE, SPACE[index], data.num_classes).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype(torch.device("cpu")) == torch.bfloat16)
    num_steps, procedure = num_images // BATCH, bmsn.SearchConfig().procedure
    for step in range(num_steps):
        optimiser.param_groups[0]["lr"] = learning_rate(step / num_steps, 0.1, 0.0, procedure)
        images, labels = stream.batch(step)
        with autocast:
            logits = network(images)
        optimiser.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimiser.step()
    network.eval()
    test = normalise(data.test_images, table, torch.float32)
    with torch.no_grad(), autocast:
        predicted = torch.cat([network(batch).argmax(1) for batch in test.split(500)])
    return index, seed, 100 * (predicted == torch.from_numpy(data.test_labels)).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=30_000, help="training images seen by each network")
    parser.add_argument("--architectures", nargs="+", help="stage depths; all by default")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = [SPACE.find(a) for a in arguments.architectures] if arguments.architectures else list(SPACE)
    tasks = [(arguments.variant, a.index, seed, arguments.images, 1) for seed in arguments.seeds for a in chosen]
    accuracies: dict[int, list[float]] = {}
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for number, result in enumerate(pool.imap_unordered(_run, tasks), start=1):
            index, seed, accuracy = result
            accuracies.setdefault(index, []).append(accuracy)
            seconds = time.perf_counter() - started
            print(f"{number}/{len(tasks)} {SPACE[index]} seed {seed}: {accuracy:.2f} %, {seconds:.0f} s", flush=True)
    default = SPACE.macs(SPACE.default)
    rows = [
        {
            "stage_depths": SPACE[index].slug,
            "accuracy_mean": round(statistics.mean(values), 3),
            "accuracy_std": round(statistics.stdev(values), 3) if len(values) > 1 else "",
            "n": len(values),
            "macs_ratio": round(SPACE.macs(SPACE[index]) / default, 3),
        }
        for index, values in sorted(accuracies.items())
    ]
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            file.write(
                f"# synthetic:{arguments.variant}, resnet14-cifar10 trained alone by benchmarks/builtin_truth.py: "
            )
            file.write(f"seeds {arguments.seeds}, {arguments.images} training images each, torch {torch.__version__}\n")
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for row in sorted(rows, key=lambda row: -row["accuracy_mean"]):
        architecture = SPACE.find(row["stage_depths"])
        print(f"{architecture}  {row['accuracy_mean']:.2f} ± {row['accuracy_std'] or 0:.2f}  {row['macs_ratio']:.2f}x")
    if len(rows) > 2:
        tau = stats.kendalltau([r["macs_ratio"] for r in rows], [r["accuracy_mean"] for r in rows]).statistic
        print(f"tau-b with MACs: {tau:.3f}")


def _run(task: tuple[str, int, int, int, int]) -> tuple[int, int, float]:
    return train_alone(*task)


if __name__ == "__main__":
    main()
