"""Time of scoring all architectures against their number: one pass and one by one, ResNet-20-like nets, two poolings.

    python benchmarks/scaling.py OUT.png [--layers 10 14 18 22 26] [--batch-size 64]

Nets of L layers in three widths (16, 32, 64; as even as they come) have C = (L-1)(L-2)/2 architectures. One by one is
eager, bfloat16, channels_last where the CPU has it, on six architectures evenly spaced in MACs and scaled by MACs. The
numbers go to OUT.csv as well.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written, so no display is needed
import matplotlib.pyplot as plt
import torch
from peers import EagerNet, interleaved, spread_in_macs

from bmsn.evaluator import score_architectures
from bmsn.memory import keep_freed_memory
from bmsn.network import SupernetMixture
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype

FIELDS = ("layers", "architectures", "states", "one_pass_s", "one_by_one_s", "ratio", "ratio_min", "ratio_max")


def space_of(num_layers: int) -> SearchSpace:
    wide = [num_layers // 3] * 2
    widths = [16] * (num_layers - sum(wide)) + [32] * wide[0] + [64] * wide[1]
    return SearchSpace(
        num_layers=num_layers, num_pools=2, widths=widths, block="basic", stem="small", pool="max", image_size=32
    )


def measure(num_layers: int, batch_size: int, rounds: int) -> dict[str, float]:
    space, dtype = space_of(num_layers), compute_dtype(torch.device("cpu"))
    nets = SupernetMixture(space, 1, 10, generator=torch.Generator().manual_seed(0))
    images = torch.randn(batch_size, 3, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    six, scale = spread_in_macs(nets, 6)
    peers = [EagerNet(nets, architecture).to(dtype).to(memory_format=torch.channels_last) for architecture in six]

    @torch.no_grad()
    def one_by_one() -> list[int]:
        return [int((net(images).argmax(1) == labels).sum()) for net in peers]

    def one_pass() -> list[int]:
        return score_architectures(nets, images, labels, batch_size=batch_size).correct.tolist()

    counts = one_pass()  # the gate: the same images but for those that rounding decides
    assert all(abs(counts[a.index] - peer) <= batch_size // 10 for a, peer in zip(six, one_by_one(), strict=True))
    seconds = interleaved({"pass": one_pass, "peer": one_by_one}, rounds)
    ratios = [scale * peer / ours for ours, peer in zip(seconds["pass"], seconds["peer"], strict=True)]
    return {
        "layers": num_layers,
        "architectures": len(space),
        "states": sum(len(layer) for layer in space.prefix_tree()),
        "one_pass_s": statistics.median(seconds["pass"]),
        "one_by_one_s": scale * statistics.median(seconds["peer"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def draw(rows: list[dict[str, float]], path: Path, title: str) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for field, name in (("one_by_one_s", "one by one"), ("one_pass_s", "one pass")):
        axes.plot([row["architectures"] for row in rows], [row[field] for row in rows], "o-", label=name)
    for row in rows:
        place = (row["architectures"], row["one_by_one_s"])
        axes.annotate(f"{row['ratio']:.1f}x", place, xytext=(-4, 8), textcoords="offset points", ha="right")
    axes.margins(y=0.1)  # room for the topmost ratio
    axes.set(xlabel="architectures C", ylabel="seconds for all", title=title, xlim=0, ylim=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the time of scoring against the number of architectures.")
    parser.add_argument("out", type=Path, help="picture to write; the numbers go beside it as .csv")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 14, 18, 22, 26])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    keep_freed_memory()
    rows = []
    for num_layers in given.layers:
        rows.append(measure(num_layers, given.batch_size, given.rounds))
        print(rows[-1], flush=True)
    with given.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({name: round(value, 4) for name, value in row.items()} for row in rows)
    draw(rows, given.out, f"two poolings, batch of {given.batch_size}, {torch.get_num_threads()} cores")


if __name__ == "__main__":
    main()
