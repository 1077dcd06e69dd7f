"""A network alone while it is trained: its weights in one row of an arena, one pass between two convolutions.

`build_path_network` makes plain modules; a `FusedNetwork` takes their weights and running statistics, is trained by
`bmsn.trainer.arena_step`, and writes both back. It computes what the modules compute in training mode.

Source: Ioffe & Szegedy 2015, alg. 1 and section 3.1 for BatchNorm's running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from bmsn.network import SupernetMixture, copy_weights, resample, run_head, run_layer, run_stem
from bmsn.ops.norm_relu import EPS, Pool, affine_norm_relu
from bmsn.paths import ResolutionPath
from bmsn.space import SearchSpace

MOMENTUM = 0.1  # of running statistics, that of torch.nn.BatchNorm2d


class FusedNetwork:
    """The training form of a network of `build_path_network`.

    Attributes:
        arena: (1, P), dtype of the network: convolutions and head as in a row of `SupernetMixture`, then weight and
            bias of each BatchNorm.
        num_convs: how many weights of the row are those of convolutions.

    Args:
        space, path: what `network` was built for.
        network: on the device of the training; it is read here and changed by `write_back` alone.
    """

    def __init__(self, space: SearchSpace, path: ResolutionPath, network: nn.Module) -> None:
        self._space, self._path, self._network = space, path, network
        found = list(network.modules())
        convs = [module for module in found if isinstance(module, nn.Conv2d)]
        self._norms = [module for module in found if isinstance(module, nn.BatchNorm2d)]
        (head,) = (module for module in found if isinstance(module, nn.Linear))
        # It only says where what lies in a row; a generator of its own, because torch's belongs to the caller.
        own, channels = torch.Generator(), convs[0].in_channels
        self._layout = SupernetMixture(space, 1, head.out_features, channels, generator=own)
        self.num_convs, self._num_head = self._layout.part_sizes
        # What one call of the op normalises: branches and channels. The last of a layer takes its shortcut's along.
        self._calls = [(1, space.stem_width)] if space.stem == "large" else []
        for layer in space.layers:
            self._calls += [(1, conv.out_channels) for conv in layer.main[:-1]]
            self._calls.append((1 if layer.shortcut is None else 2, layer.out_channels))
        with torch.no_grad():
            parts = [conv.weight.permute(0, 2, 3, 1).flatten() for conv in convs]
            parts += [head.weight.flatten(), head.bias]
            parts += [part for norm in self._norms for part in (norm.weight, norm.bias)]
            self.arena = torch.cat(parts)[None]
            statistics = [part for norm in self._norms for part in (norm.running_mean, norm.running_var)]
            self._running = torch.cat([part for part in statistics if part is not None])

    def forward(self, convs: Tensor, others: Tensor, images: Tensor) -> Tensor:
        """Logits (N, num_classes) in training mode; running statistics follow the batch.

        Args:
            convs, others: the row's first `num_convs` weights and the rest, as `arena_step` hands them over.
            images: (N, C, H, W), channels_last, in the dtype of `convs`; one statistics group.
        """
        head, affine = others.tensor_split([self._num_head])
        weights = self._layout.views(convs, head)
        norm = _Norm(self._by_call(affine), self._by_call(self._running))
        x = run_stem(images, weights, norm)
        kind, steps = self._space.pool, self._path.steps
        layers = zip(self._space.layers, weights.layers, steps, (*steps[1:], 0), strict=True)
        for layer, w, step, following in layers:
            # A pooling before the next layer ends this one, as in a supernet.
            pool: Pool | None = kind if kind != "stride" and following > 0 else None
            x = run_layer(x, layer, w, stride=1 + (kind == "stride" and step == 1), pool=pool, norm=norm)
            x = resample(x, min(following, 0) if pool is None else following - 1, kind)
        return run_head(x, weights)

    @torch.no_grad()
    def write_back(self, num_steps: int) -> None:
        """Puts weights, running statistics and the number of batches behind them into the network."""
        convs, head, affine = self.arena[0].split([self.num_convs, self._num_head, 2 * self._num_channels])
        copy_weights(self._layout.views(convs, head), self._network)
        pairs, running = (chain.from_iterable(self._by_call(values)) for values in (affine, self._running))
        for norm, (weight, bias), (mean, variance) in zip(self._norms, pairs, running, strict=True):
            values = (weight, bias, mean, variance, torch.tensor(num_steps))
            for target, value in zip((*norm.parameters(), *norm.buffers()), values, strict=True):
                target.copy_(value)

    @property
    def _num_channels(self) -> int:
        return sum(branches * channels for branches, channels in self._calls)

    def _by_call(self, values: Tensor) -> Iterator[Tensor]:
        """Two numbers a channel, for each call of the op as (branches, 2, channels)."""
        parts = values.split([branches * 2 * channels for branches, channels in self._calls])
        return (part.view(branches, 2, -1) for part, (branches, _) in zip(parts, self._calls, strict=True))


class _Norm:
    """Affine BatchNorm, call after call, whose running statistics follow."""

    def __init__(self, affine: Iterator[Tensor], running: Iterator[Tensor]) -> None:
        self._affine, self._running = affine, running

    def __call__(
        self,
        x: Tensor,
        shortcut: Tensor | None = None,
        *,
        normalise_shortcut: bool = False,
        stats: Tensor | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        y, found = affine_norm_relu(x, next(self._affine), shortcut, stats=stats, pool=pool)
        mean, rstd = found.unbind(1)  # (branches, C)
        count = x.numel() // x.shape[1]
        variance = (rstd**-2 - EPS).clamp_(min=0) * (count / (count - 1))  # unbiased
        next(self._running).lerp_(torch.stack((mean, variance), 1), MOMENTUM)
        return y
