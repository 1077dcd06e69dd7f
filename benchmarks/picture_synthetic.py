"""Draws examples of the built-in set, a row for each class.

python benchmarks/picture_synthetic.py OUT.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written, so no display is needed
import matplotlib.pyplot as plt
import numpy as np

from bmsn.data.synthetic import generate_synthetic

COLUMNS = 10
PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))  # a white frame of one pixel round each image
IMAGES = 600  # enough that every class has COLUMNS of them


def draw(path: Path, seed: int) -> None:
    """Write the picture."""
    data = generate_synthetic("default", IMAGES, 0, seed)
    framed = np.pad(data.train_images, PADDING, constant_values=255)
    lines = [np.concatenate(framed[data.train_labels == label][:COLUMNS], axis=1) for label in range(data.num_classes)]
    side = data.image_size + 2
    figure = plt.figure(figsize=(COLUMNS * side / 50, len(lines) * side / 50))  # at 100 dpi two pixels for one
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow(np.concatenate(lines), interpolation="nearest")
    panel.set_yticks([side * (row + 0.5) for row in range(len(lines))], data.class_names)
    panel.set_xticks([])
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw examples of the built-in set.")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--seed", type=int, default=100, help="seed of the generator")
    arguments = parser.parse_args()
    draw(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
