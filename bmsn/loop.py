"""The search loop: draw an architecture, train its supernet, validate, update the mixture; then score and rank.

Source: Javan et al. 2023, section 2 (algorithm 1). Thin: what it calls does the work.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bmsn.config import SearchConfig
from bmsn.correlation import agreement, load_truth
from bmsn.data import BatchStream, ImageDataset, normalisation, normalisation_table, normalise, split_halves
from bmsn.errors import InputError, RunStopped
from bmsn.evaluator import Scores, all_pairs, score_architectures, score_one_by_one
from bmsn.mixture import BalancedMixture, inverse_temperature, mean_entropy
from bmsn.network import SupernetMixture
from bmsn.ops.balance import BalanceError
from bmsn.racing import Race, images_seen, race
from bmsn.result import RankedArchitecture
from bmsn.rng import generator, torch_seed
from bmsn.space import Architecture, SearchSpace
from bmsn.trainer import batch_accuracy, compute_dtype, learning_rate, resolve_device, train_step

_log = logging.getLogger("bmsn.search")

MAX_NAN_STEPS = 20
NUM_SNAPSHOTS = 50
NUM_CALIBRATION = 1024  # training images that calibrated statistics are measured on


def draw_architectures(num_architectures: int, num_steps: int, seed: int, *, in_blocks: bool) -> np.ndarray:
    """(num_steps,) int64: each step's architecture, uniform: independently, or in shuffled blocks of each once."""
    random = generator(seed, "architectures")
    if not in_blocks:
        return random.integers(num_architectures, size=num_steps)
    blocks = np.tile(np.arange(num_architectures), (-(-num_steps // num_architectures), 1))
    return random.permuted(blocks, axis=1).ravel()[:num_steps]


class SearchLoop:
    """One search: its networks, mixture, data and step number.

    Args:
        config: settings; missing ones are filled in.
        data: images; the training part is split into a training and a validation half, the test part is not looked at.
        write: called with each metrics record (a dict with "step" and "kind").
    Raises:
        InputError: settings that do not fit the space or the data.
    """

    def __init__(
        self, config: SearchConfig, data: ImageDataset, write: Callable[[dict[str, Any]], None] = lambda record: None
    ) -> None:
        self.config = config = config.filled()
        self.data, self.write = data, write
        self.space = SearchSpace.named(config.space, pool=config.pool)
        if data.image_size % self.space.total_stride:
            raise InputError(
                f"data {config.data}: images of {data.image_size} pixels; "
                f"{config.space} needs a multiple of {self.space.total_stride}"
            )
        if config.evaluate_top > len(self.space):
            raise InputError(
                f"evaluate_top must be at most {len(self.space)}, the architectures of {config.space}; "
                f"got {config.evaluate_top}"
            )
        num_scored = config.evaluate_top or len(self.space)
        if config.race > num_scored:
            raise InputError(f"race must be at most {num_scored}, the architectures scored; got {config.race}")
        self.truth = load_truth(config.truth, self.space) if config.truth else None
        self.macs = [self.space.macs(a, num_classes=data.num_classes, in_channels=data.in_channels) for a in self.space]
        self.device = resolve_device(config.device)
        self.dtype = compute_dtype(self.device)

        train, self.validation = split_halves(data.train_labels, config.seed)
        self.table = normalisation_table(*normalisation(data.train_images, train))
        streams = [
            BatchStream(
                data.train_images, data.train_labels, indices, self.table,
                batch_size=config.batch_size, dtype=self.dtype, seed=config.seed, purpose=purpose,
                augment=purpose == "train",
            )
            for purpose, indices in (("train", train), ("validation", self.validation))
        ]  # fmt: skip
        self.train_stream, self.validation_stream = streams
        self.steps_per_epoch = self.train_stream.steps_per_epoch
        self.num_steps = config.epochs * self.steps_per_epoch

        weights = torch.Generator().manual_seed(torch_seed(config.seed, "weights"))
        self.nets = SupernetMixture(self.space, config.supernets, data.num_classes, data.in_channels, generator=weights)
        self.nets.pixel_table = self.table
        self.nets.to(self.device)
        self.velocity = torch.zeros_like(self.nets.arena.detach())
        self.mixture = BalancedMixture(
            num_architectures=len(self.space),
            num_supernets=config.supernets,
            ema_decay=config.procedure.ema_decay,
            tol=config.procedure.tol,
            balance_every=self.steps_per_epoch if config.balance_every == "epoch" else config.balance_every,
        )
        # What is trained at each step depends on (seed, step) alone: drawn ahead for all steps.
        self.drawn = draw_architectures(
            len(self.space), self.num_steps + 1, config.seed, in_blocks=config.procedure.visits == "blocks"
        )
        self.uniforms = generator(config.seed, "supernets").random(self.num_steps + 1)
        self.step = 0
        self.supernet = self.mixture.draw(int(self.drawn[0]), self.inverse_temperature(0), float(self.uniforms[0]))
        self.nan_steps = self.nan_in_a_row = 0
        self.train_seconds = 0.0
        self._snapshots = {round(k * self.num_steps / NUM_SNAPSHOTS) for k in range(1, NUM_SNAPSHOTS + 1)}
        self._every = max(1, min(50, self.num_steps // 20))
        self._recent: list[tuple[float, float]] = []  # (loss, accuracy) since the last record

    # One step. --------------------------------------------------------------------------------------------------------

    def progress(self, step: int) -> float:
        if self.config.procedure.anneal == "epoch":
            step -= step % self.steps_per_epoch
        return step / self.num_steps

    def inverse_temperature(self, step: int) -> float:
        return inverse_temperature(self.progress(step), self.config.schedule, self.config.supernets)

    def advance(self) -> None:
        """One step: train the drawn pair, validate it, tell the mixture, draw the next one."""
        config, step, start = self.config, self.step, time.perf_counter()
        architecture, supernet = self.space[int(self.drawn[step])], self.supernet
        images, labels = (t.to(self.device) for t in self.train_stream.batch(step))
        lr = learning_rate(self.progress(step), config.lr, config.min_lr, config.procedure)
        loss = train_step(
            self.nets, self.velocity, architecture, supernet, images, labels,
            lr=lr, momentum=config.momentum, weight_decay=config.weight_decay,
        )  # fmt: skip
        accuracy: float | None = None
        if math.isfinite(loss):
            self.nan_in_a_row = 0
            accuracy = batch_accuracy(
                self.nets, architecture, supernet, *(t.to(self.device) for t in self.validation_stream.batch(step))
            )
            self._recent.append((loss, accuracy))
        else:
            self._skipped(architecture, supernet)
        try:
            if config.refresh_every and (step + 1) % config.refresh_every == 0:
                self._refresh(step)
            self.supernet = self.mixture.observe_and_draw(
                architecture.index, supernet, accuracy, self.inverse_temperature(step + 1),
                int(self.drawn[step + 1]), float(self.uniforms[step + 1]),
            )  # fmt: skip
        except BalanceError as error:
            raise RunStopped(f"step {step}, architecture {architecture}, supernet {supernet}: {error}") from error
        self.step += 1
        self.train_seconds += time.perf_counter() - start
        self._record(lr)

    def _skipped(self, architecture: Architecture, supernet: int) -> None:
        self.nan_steps += 1
        self.nan_in_a_row += 1
        _log.warning(
            "step %d: the loss of %s with supernet %d is not finite; the update is skipped",
            self.step,
            architecture,
            supernet,
        )
        if self.nan_in_a_row >= MAX_NAN_STEPS:
            raise RunStopped(
                f"step {self.step}: the loss of architecture {architecture} with supernet {supernet} is not finite, "
                f"as in the {MAX_NAN_STEPS - 1} steps before; a lower lr may help (now {self.config.lr})"
            )

    def _refresh(self, step: int) -> None:
        """All of a[c,m] from one validation batch, scored in one pass."""
        images, labels = self.validation_stream.batch(step)
        scores = score_architectures(self.nets, images, labels, batch_size=len(images))
        self.mixture.refresh(scores.accuracy.view(len(self.space), -1).numpy(), ema=False)

    def _record(self, lr: float) -> None:
        """Metrics, every few steps; the whole mixture at the snapshots; the ranking every `score_every` epochs."""
        step = self.step
        if step % self._every == 0 or step == self.num_steps:
            losses, accuracies = zip(*self._recent, strict=True) if self._recent else ((), ())
            self._recent = []
            p = self.mixture.assignment(self.inverse_temperature(step))
            self.write({
                "kind": "step", "step": step, "epoch": step / self.steps_per_epoch,
                "loss": float(np.mean(losses)) if losses else None,
                "accuracy": float(np.mean(accuracies)) if losses else None, "lr": lr,
                "inverse_temperature": self.inverse_temperature(step), "entropy": mean_entropy(p),
                "load": p.mean(0), "mean_score": float(self.mixture.scores.mean()), "nan_steps": self.nan_steps,
                "train_seconds": self.train_seconds,
            })  # fmt: skip
        if step in self._snapshots:
            self.write({
                "kind": "mixture", "step": step, "scores": self.mixture.scores, "visits": self.mixture.visits,
                "assignment": self.mixture.assignment(self.inverse_temperature(step)),
                "last_visit": self.mixture.last_visit,
            })  # fmt: skip
        every = self.config.score_every * self.steps_per_epoch
        if every and step % every == 0 and step < self.num_steps:
            ranked = self.rank(self.score())
            self.write({
                "kind": "ranking", "step": step, "epoch": step // self.steps_per_epoch,
                "best": ranked[0].architecture.slug,
                "accuracy": {row.architecture.slug: row.accuracy for row in ranked},
                "supernet": {row.architecture.slug: row.supernet for row in ranked},
                "truth": self.against_truth(ranked),
            })  # fmt: skip

    # Scoring and ranking. ---------------------------------------------------------------------------------------------

    def best_supernets(self) -> np.ndarray:
        """m* = argmax_m p(m|c) of each architecture."""
        return self.mixture.best_supernet(self.inverse_temperature(self.num_steps))

    def score(self) -> Scores | Race:
        """Validation counts of each architecture with its best supernet, or of all pairs, as `config.score` says.

        With `config.race` the final ones are those of a race, where of equal counts the larger a[c, m*] is better.
        """
        config, best = self.config, self.best_supernets()
        if config.score == "pairs":
            pairs = list(all_pairs(self.nets))
        else:
            pairs = [(a, int(best[a.index])) for a in self.space]
        by_ema = np.argsort(-self.mixture.scores[np.arange(len(best)), best], kind="stable").tolist()
        if config.evaluate_top:
            pairs = [(a, m) for a, m in pairs if a.index in by_ema[: config.evaluate_top]]
        images = normalise(self.data.train_images, self.table, self.dtype, indices=self.validation)
        labels = torch.from_numpy(self.data.train_labels[self.validation])
        scorer: Callable[..., Scores] = score_architectures if config.fast_eval else score_one_by_one
        if config.norm == "calibrated":
            known = normalise(
                self.data.train_images, self.table, self.dtype, self.train_stream.indices[:NUM_CALIBRATION]
            )
            scorer = partial(score_architectures, norm="calibrated", calibration_images=known)
        if config.race and self.step == self.num_steps:
            pairs.sort(key=lambda pair: by_ema.index(pair[0].index))
            return race(
                self.nets, images, labels, config.race, confidence=config.confidence, pairs=pairs,
                batch_size=config.batch_size, seed=config.seed, score=scorer,
            )  # fmt: skip
        return scorer(self.nets, images, labels, pairs, batch_size=config.batch_size)

    def rank(self, scores: Scores | Race) -> tuple[RankedArchitecture, ...]:
        """Architectures from best to worst by validation accuracy.

        After those scored on all images come those that a race dropped, by their accuracy on the images they saw, and
        then those not scored, by a[c, m*].
        """
        best = self.best_supernets()
        counts: dict[int, tuple[int, int, int]] = {}  # correct, images seen, supernet
        for (a, supernet), *count in zip(scores.pairs, scores.correct.tolist(), images_seen(scores), strict=True):
            if a.index not in counts or count[0] > counts[a.index][0]:
                counts[a.index] = (count[0], count[1], supernet)
        ema = self.mixture.scores[np.arange(len(best)), best]
        ema_order = np.argsort(-ema, kind="stable").tolist()

        def key(a: Architecture) -> tuple[bool, bool, float, float, int]:
            correct, seen, _ = counts.get(a.index, (0, 0, 0))
            return seen < scores.total, seen == 0, -correct / max(1, seen), -ema[a.index], a.index

        rows = []
        for place, a in enumerate(sorted(self.space, key=key), start=1):
            correct, seen, supernet = counts.get(a.index, (0, 0, int(best[a.index])))
            accuracy = correct / seen if seen else None
            rows.append(
                RankedArchitecture(
                    rank=place,
                    architecture=a,
                    accuracy=accuracy,
                    standard_error=None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / seen),
                    images_seen=seen,
                    supernet=supernet,
                    macs=self.macs[a.index],
                    macs_ratio=self.macs[a.index] / self.macs[self.space.default.index],
                    ema_accuracy=float(ema[a.index]),
                    ema_rank=ema_order.index(a.index) + 1,
                )
            )
        return tuple(rows)

    def against_truth(self, ranked: Sequence[RankedArchitecture]) -> dict[str, Any]:
        """Agreement of the ranking, of a[c,m] and of MACs alone with the truth; empty where there is none.

        Of the ranking the rows scored on all images count, and no others: a race leaves accuracies on fewer images,
        which are not to be compared with them.
        """
        if self.truth is None:
            return {}
        macs = dict(enumerate(map(float, self.macs)))
        whole = [row for row in ranked if row.images_seen == len(self.validation)]
        accuracy = {row.architecture.index: row.accuracy for row in whole if row.accuracy is not None}
        ema = {row.architecture.index: row.ema_accuracy for row in ranked}
        return {
            "ranking": agreement(accuracy, self.truth, macs),
            "ema": agreement(ema, self.truth, macs),
            "macs": agreement(macs, self.truth, macs) | {"partial_kendall": None},
            "missing": [a.slug for a in self.space if a.index not in self.truth],
        }

    # Saving and going on. ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on; no generator state."""
        return {
            "step": self.step, "supernet": self.supernet,
            "arena": self.nets.arena.detach().cpu().clone(), "velocity": self.velocity.cpu().clone(),
            "mixture": self.mixture.state_dict(), "nan_steps": self.nan_steps, "nan_in_a_row": self.nan_in_a_row,
            "recent": [list(pair) for pair in self._recent], "train_seconds": self.train_seconds,
            "data_fingerprint": self.data.fingerprint,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises InputError where the data set is another one than was saved."""
        if state["data_fingerprint"] != self.data.fingerprint:
            raise InputError(
                f"data {self.config.data}: its content has changed since the run was saved "
                f"(sha256 {state['data_fingerprint'][:12]} then, {self.data.fingerprint[:12]} now)"
            )
        with torch.no_grad():
            self.nets.arena.copy_(state["arena"])
        self.velocity.copy_(state["velocity"])
        self.mixture.load_state_dict(state["mixture"])
        self.step, self.supernet = state["step"], state["supernet"]
        self.nan_steps, self.nan_in_a_row = state["nan_steps"], state["nan_in_a_row"]
        self._recent = [(loss, accuracy) for loss, accuracy in state["recent"]]
        self.train_seconds = state["train_seconds"]
