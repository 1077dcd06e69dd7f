"""Draws examples of the built-in set: a row for each class, a panel for each variant.

python benchmarks/picture_synthetic.py OUT.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written, so no display is needed
import matplotlib.pyplot as plt
import numpy as np

from bmsn.data.synthetic import VARIANTS, generate_synthetic

COLUMNS = 6
PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))  # a white frame of one pixel round each image
IMAGES = 400  # enough that every class has COLUMNS of them


def draw(path: Path, seed: int) -> None:
    """Write the picture; rows are classes, the variants stand side by side."""
    sets = [generate_synthetic(variant, IMAGES, 0, seed) for variant in VARIANTS]
    rows = max(data.num_classes for data in sets)
    figure, panels = plt.subplots(1, len(sets), figsize=(len(sets) * COLUMNS * 0.8, rows * 0.85), squeeze=False)
    for panel, data, variant in zip(panels[0], sets, VARIANTS, strict=True):
        framed = np.pad(data.train_images, PADDING, constant_values=255)
        lines = [
            np.concatenate(list(framed[data.train_labels == label][:COLUMNS]), axis=1)
            for label in range(data.num_classes)
        ]
        panel.imshow(np.concatenate(lines), interpolation="nearest")
        panel.set_title(variant)
        side = data.image_size + 2
        panel.set_yticks([side * (label + 0.5) for label in range(data.num_classes)], data.class_names)
        panel.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw examples of the built-in set.")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--seed", type=int, default=100, help="seed of the generator")
    arguments = parser.parse_args()
    draw(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
