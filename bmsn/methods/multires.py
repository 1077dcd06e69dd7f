"""Supernets with weights for each (layer, resolution), or with every resolution at once in each layer.

Both keep their weights in a `SupernetMixture` of R rows, R the number of resolutions: what layer l does at resolution r
is row r's layer l. Stem, layer 0 and head belong to row 0, which is all there is where resolutions share their weights;
their copies in the other rows are never used.

Source: Javan et al. 2023, eq. 4 and 5 (multi-resolution layer), section 3 (SPOS without sharing between resolutions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bmsn.network import SupernetMixture, Weights, resample, run_head, run_layer, run_stem
from bmsn.paths import ResolutionPath, num_resolutions


def path_places(nets: SupernetMixture, path: ResolutionPath) -> list[tuple[int, slice]]:
    """(row, columns) of the weights that a path uses, in the order of the columns, of which none is left out."""
    layers = nets.layer_columns
    return [
        (0, slice(0, layers[0].start)),
        *zip(path.resolutions, layers, strict=True),
        (0, slice(layers[-1].stop, nets.arena.shape[1])),
    ]


def gather_path(nets: SupernetMixture, rows: Tensor, path: ResolutionPath) -> Tensor:
    """The path's weights as one row (P,), as `SupernetMixture.weights` takes it: a copy from (R, P) `rows`."""
    return torch.cat([rows[row, columns] for row, columns in path_places(nets, path)])


@torch.no_grad()
def scatter_path(nets: SupernetMixture, rows: Tensor, path: ResolutionPath, gathered: Tensor) -> None:
    """Puts a gathered row (P,) back into (R, P) `rows`; what the path does not use stays."""
    for row, columns in path_places(nets, path):
        rows[row, columns] = gathered[columns]


def forward_path(nets: SupernetMixture, row: Tensor, images: Tensor, path: ResolutionPath) -> Tensor:
    """Logits (N, num_classes) of one batch along a path with the weights of one row (P,).

    `images` as in `SupernetMixture.forward`, channels_last; unchecked, as is the path.
    """
    weights = nets.weights(row, images.dtype)
    x = run_stem(images, weights)
    for layer in range(nets.space.num_layers):
        x = _step(nets, weights, x, layer, path.steps[layer])
    return run_head(x, weights)


def _step(nets: SupernetMixture, weights: Weights, x: Tensor, layer: int, step: int) -> Tensor:
    strides = nets.space.pool == "stride" and step == 1
    if not strides:
        x = resample(x, step, nets.space.pool)
    return run_layer(x, nets.space.layers[layer], weights.layers[layer], stride=1 + strides)


def forward_mixed(nets: SupernetMixture, rows: Tensor, images: Tensor, shares: Tensor) -> Tensor:
    """Logits (N, num_classes) of the network whose every layer but the first works at all resolutions at once.

        h' = sum over r of shares[l, r] U_r(f_{l,r}(S_r(h)))

    S_r pools by 2^r (max or average, as the space's poolings), U_r repeats pixels 2^r times in both directions.

    Source: Javan et al. 2023, eq. 4 and 5. BatchNorm takes batch statistics within each f_{l,r}.

    Args:
        nets: of a space whose pool is max or avg.
        rows: (R, P), or (1, P) where all resolutions share their weights.
        images: as in `SupernetMixture.forward`, channels_last; unchecked.
        shares: (L, R), float32 or wider; row 0 is not used. Not necessarily summing to 1.
    """
    space, weights = nets.space, nets.weights(rows, images.dtype)
    own = [_row(weights, r if len(rows) > 1 else 0) for r in range(num_resolutions(space))]
    x = run_layer(run_stem(images, own[0]), space.layers[0], own[0].layers[0])
    for layer in range(1, space.num_layers):
        below, total = x, None
        for r, w in enumerate(own):
            if r:
                below = resample(below, 1, space.pool)  # S_r of S_{r-1}: no need to read the full map again
            y = run_layer(below, space.layers[layer], w.layers[layer])
            y = resample(y * shares[layer, r], -r, space.pool)
            total = y if total is None else total + y
        assert total is not None
        x = total
    return run_head(x, own[0])


def _row(weights: Weights, row: int) -> Weights:
    """One of several rows of views."""
    return Weights(
        stem=None if weights.stem is None else weights.stem[row],
        layers=tuple({name: w[row] for name, w in layer.items()} for layer in weights.layers),
        head_weight=weights.head_weight[row],
        head_bias=weights.head_bias[row],
    )


@torch.no_grad()
def count_correct_paths(
    nets: SupernetMixture,
    images: Tensor,
    labels: Tensor,
    paths: Sequence[ResolutionPath],
    batch_size: int,
    after_batch: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """How many images each path classifies correctly, (len(paths),) int64; layers that paths share are computed once.

    Two paths of the same resolutions up to a layer have the same map there: weights and batch statistics are the same.

    Args:
        nets: R rows.
        images: (N, C, H, W) float32, bfloat16 or float64, normalised, channels_last, on the device of the weights.
        labels: (N,) int64, likewise.
        paths: that fit the space.
        batch_size: images in a statistics group; the last, smaller one is a group of its own.
        after_batch: as for `bmsn.score_architectures`.
    """
    weights = nets.weights(nets.arena, images.dtype)
    rows = [_row(weights, r) for r in range(nets.num_supernets)]
    correct = torch.zeros(len(paths), dtype=torch.int64, device=images.device)

    def visit(x: Tensor, layer: int, chosen: list[int]) -> None:
        """`x` is the map before `layer` that all `chosen` paths have in common."""
        if layer == nets.space.num_layers:
            correct[chosen] += (run_head(x, rows[0]).argmax(1) == group_labels).sum()
            return
        for r in sorted({paths[i].resolutions[layer] for i in chosen}):
            here = [i for i in chosen if paths[i].resolutions[layer] == r]
            visit(_step(nets, rows[r], x, layer, paths[here[0]].steps[layer]), layer + 1, here)

    for start in range(0, len(images), batch_size):
        group_labels = labels[start : start + batch_size]
        visit(run_stem(images[start : start + batch_size], rows[0]), 0, list(range(len(paths))))
        after_batch(len(group_labels) * len(paths))
    return correct.cpu()
