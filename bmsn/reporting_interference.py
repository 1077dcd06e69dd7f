"""`write_interference`: the page about an interference experiment, and its numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from bmsn.checkpoint import write_atomically
from bmsn.command_line import command_line
from bmsn.figures import style
from bmsn.figures_interference import accuracy_figure, features_figure, filters_figure
from bmsn.interference import NETS, Interference, InterferenceConfig
from bmsn.reporting_page import Block, Code, Heading, Page, Plot, Row, Table, Text, cell, write_page


def write_interference(result: Interference, out: str | Path) -> Path:
    """Writes the page, its figures and a JSON file of its numbers; returns the HTML file.

        >>> from bmsn.interference import InterferenceConfig, run_interference
        >>> result = run_interference(
        ...     InterferenceConfig(space="resnet14-cifar10", data="npz:images.npz", epochs=1, batch_size=16)
        ... )
        >>> print(bmsn.reporting_interference.write_interference(result, "report.html"))
        report.html

    Args:
        result: of `run_interference`.
        out: a file that ends in .html, or a folder for interference.html.
    Raises:
        InputError: a place that cannot be written to.
    """
    with style():
        title = f"Interference in {result.config['space']} on {result.data['name']}"
        page = Page(title, _blocks(result))
        path = write_page(page, Path(out), "interference.html")
    write_atomically(path.with_suffix(".json"), _to_json(result).encode())
    return path


def _blocks(result: Interference) -> list[Block]:
    early, late = result.architectures
    scored = f"{result.num_scored} validation images, at the end all {result.num_validation}"
    return [
        Text(
            f"Three supernets with the same first weights: one trained on {early} alone, one on {late} alone, one on "
            f"both in turn. All have the same number of updates on an architecture, so the alternating one has twice "
            f"as many in all: what it lacks against the other two is interference, what it has beyond them comes from "
            f"sharing. What a supernet reaches with the architecture it was not trained on shows how far the two go "
            f"together."
        ),
        _table(result),
        Plot("interference-accuracy", "Accuracy over training", f"Accuracy on {scored}.", accuracy_figure(result)),
        Heading("The first layer"),
        Text(
            "Cosine between the filters that two supernets end with, and between those and the first ones, which all "
            "had in common; mean over the filters."
        ),
        _cosines(result),
        Plot("interference-filters", "First filters", "Filters of the first convolution.", filters_figure(result)),
        Plot(
            "interference-features", "First features", "One validation image (top left) behind the first layer.",
            features_figure(result),
        ),
        Heading("To reproduce"),
        Code(command_line("bmsn.report --interference", result.config, asdict(InterferenceConfig()))),
        Code(yaml.safe_dump(
            {"config": result.config, "data": result.data, "environment": result.environment,
             "seconds": round(result.seconds, 1)}, sort_keys=False,
        ).rstrip()),
    ]  # fmt: skip


def _table(result: Interference) -> Table:
    names = [f"with {architecture} %" for architecture in result.architectures]
    rows = [
        Row([cell(name), *(cell(100 * value, "{:.2f}") for value in result.accuracy[-1, net])])
        for net, name in enumerate(NETS)
    ]
    return Table(("supernet", *names), rows, f"After training, on {result.num_validation} validation images.")


def _cosines(result: Interference) -> Table:
    flat = result.filters.reshape(*result.filters.shape[:2], -1)  # (4, O, weights)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=2, keepdims=True), 1e-30)
    cosine = np.einsum("iof,jof->ij", unit, unit) / flat.shape[1]
    names = ("at the start", *NETS)
    rows = [Row([cell(name), *(cell(float(c), "{:.3f}") for c in cosine[i])]) for i, name in enumerate(names)]
    return Table(("", *names), rows)


def _to_json(result: Interference) -> str:
    content = {
        "architectures": [architecture.slug for architecture in result.architectures],
        "nets": NETS,
        "steps": result.steps.tolist(),
        "accuracy": result.accuracy.tolist(),
        "num_scored": result.num_scored,
        "num_validation": result.num_validation,
        "config": result.config,
        "environment": result.environment,
        "data": result.data,
        "seconds": result.seconds,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
