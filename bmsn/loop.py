"""The search loop: step after step of a method, its metrics, then scores and the ranking.

Thin: the methods (`bmsn.methods`) do the work.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bmsn import methods
from bmsn.config import SearchConfig
from bmsn.correlation import agreement, load_truth, ranking_agreement
from bmsn.cost import within_macs
from bmsn.data import BatchStream, ImageDataset, normalisation, normalisation_table, split_halves
from bmsn.data.batches import as_tensor
from bmsn.engine_mixture import image_device
from bmsn.errors import InputError, RunStopped
from bmsn.evaluator import Scores
from bmsn.methods.base import Cost
from bmsn.methods.problem import Problem
from bmsn.network import check_group
from bmsn.racing import Race
from bmsn.rank_rules import IN_WORDS
from bmsn.ranking import rank_architectures, record_scores, rules_against_truth
from bmsn.result import RankedArchitecture
from bmsn.space import SearchSpace
from bmsn.trainer import compute_dtype, resolve_device

_log = logging.getLogger("bmsn.search")

MAX_NAN_STEPS = 20
NUM_SNAPSHOTS = 50


class SearchLoop:
    """One search: its method, data and step number.

    Args:
        config: settings; missing ones are filled in.
        data: images; the training part is split into a training and a validation half, the test part is not looked at.
        write: called with each metrics record (a dict with "step" and "kind").
    Attributes:
        scored: called after each batch of a scoring with how many pairs are scored, and of how many; it may raise.
    Raises:
        InputError: settings that do not fit the method, the space or the data.
    """

    def __init__(
        self, config: SearchConfig, data: ImageDataset, write: Callable[[dict[str, Any]], None] = lambda record: None
    ) -> None:
        self.config = config = config.filled()
        self.data, self.write = data, write
        self.scored: Callable[[int, int], None] = lambda scored, total: None
        self.space = SearchSpace.named(config.space, pool=config.pool)
        method = methods.get(config.method)
        if data.image_size % self.space.total_stride:
            raise InputError(
                f"data {config.data}: images of {data.image_size} pixels; "
                f"{self.space.name} needs a multiple of {self.space.total_stride}"
            )
        self.space = self.space.resized(data.image_size)
        self.macs = tuple(
            self.space.macs(a, num_classes=data.num_classes, in_channels=data.in_channels) for a in self.space
        )
        # What the method sees: it numbers the architectures that are left anew.
        self.searched = list(self.space)
        if config.max_macs is not None:
            self.searched = within_macs(self.space, self.macs, config.max_macs)
        if config.evaluate_top > len(self.searched):
            raise InputError(
                f"evaluate_top must be at most {len(self.searched)}, the architectures of {self.space.name}; "
                f"got {config.evaluate_top}"
            )
        num_scored = config.evaluate_top or len(self.searched)
        if config.race > num_scored:
            raise InputError(f"race must be at most {num_scored}, the architectures scored; got {config.race}")
        self.truth = load_truth(config.truth, self.space) if config.truth else None
        self.device = resolve_device(config.device)
        self.dtype = compute_dtype(self.device)

        train, self.validation = split_halves(data.train_labels, config.seed)
        table = normalisation_table(*normalisation(data.train_images, train))
        images = as_tensor(data.train_images, image_device(data.train_images.nbytes, self.device))
        self.train_stream, validation_stream = (
            BatchStream(
                images, data.train_labels, indices, table,
                batch_size=config.batch_size, dtype=self.dtype, seed=config.seed, purpose=purpose,
                augment=purpose == "train", device=images.device,
            )
            for purpose, indices in (("train", train), ("validation", self.validation))
        )  # fmt: skip
        self.steps_per_epoch = self.train_stream.steps_per_epoch
        self.num_steps = config.epochs * self.steps_per_epoch if method.trains else 0
        self.problem = Problem(
            config=config,
            space=self.space.restricted(self.searched),
            data=data,
            train=self.train_stream,
            validation=validation_stream,
            table=table,
            device=self.device,
            dtype=self.dtype,
            num_steps=self.num_steps,
            macs=tuple(self.macs[a.index] for a in self.searched),
        )
        self.method = method(self.problem)
        last_group = len(self.validation) % config.batch_size
        if last_group and self.method.pairs():  # else nothing is scored
            try:
                check_group(self.space, last_group, data.image_size, data.image_size)
            except InputError as error:
                raise InputError(
                    f"batch_size must not leave the last {last_group} of {len(self.validation)} validation images to "
                    f"be scored by themselves; got {config.batch_size}: {error}"
                ) from error
        self.step = 0
        self.nan_steps = self.nan_in_a_row = 0
        self.train_seconds = 0.0
        self._snapshots = {round(k * self.num_steps / NUM_SNAPSHOTS) for k in range(1, NUM_SNAPSHOTS + 1)}
        self._every = max(1, min(50, self.num_steps // 20))
        self._recent: list[tuple[float, float | None]] = []  # (loss, accuracy) since the last record
        self._ranking_is_due = False  # of `score_every`, at this step: a scoring that was stopped is done again

    # One step. --------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One step of the method or more, and their metrics."""
        if self._ranking_is_due:
            self._write_ranking()
        start = time.perf_counter()
        for outcome in self.method.steps(self.step, self._next_look()):
            if math.isfinite(outcome.loss):
                self.nan_in_a_row = 0
                self._recent.append((outcome.loss, outcome.accuracy))
            else:
                self._skipped(outcome.trained)
            self.step += 1
        self.train_seconds += time.perf_counter() - start
        self._record()

    def _next_look(self) -> int:
        """The step after which something is written, saved, scored or refreshed."""
        config = self.config
        periods = self._every, config.checkpoint_every, config.score_every * self.steps_per_epoch, config.refresh_every
        due = {self.step - self.step % period + period for period in periods if period}
        return min(due | {step for step in self._snapshots if step > self.step} | {self.num_steps})

    def _skipped(self, trained: str) -> None:
        self.nan_steps += 1
        self.nan_in_a_row += 1
        _log.warning("step %d: the loss of %s is not finite; the update is skipped", self.step, trained)
        if self.nan_in_a_row >= MAX_NAN_STEPS:
            raise RunStopped(
                f"step {self.step}: the loss of {trained} is not finite, "
                f"as in the {MAX_NAN_STEPS - 1} steps before; a lower lr may help (now {self.config.lr})"
            )

    def _record(self) -> None:
        """Metrics, every few steps; the whole state at the snapshots; the ranking every `score_every` epochs."""
        step = self.step
        if step % self._every == 0 or step == self.num_steps:
            losses = [loss for loss, _ in self._recent]
            accuracies = [accuracy for _, accuracy in self._recent if accuracy is not None]
            self._recent = []
            self.write({
                "kind": "step", "step": step, "epoch": step / self.steps_per_epoch,
                "loss": float(np.mean(losses)) if losses else None,
                "accuracy": float(np.mean(accuracies)) if accuracies else None,
                "lr": self.problem.learning_rate(step - 1), **self.method.metrics(step),
                "nan_steps": self.nan_steps, "train_seconds": self.train_seconds,
            })  # fmt: skip
        if step in self._snapshots:
            snapshot = self.method.snapshot(step)
            if snapshot is not None:
                self.write({"step": step, **snapshot})
        every = self.config.score_every * self.steps_per_epoch
        if every and step % every == 0 and step < self.num_steps:
            self._ranking_is_due = True
            self._write_ranking()

    def _write_ranking(self) -> None:
        scores = self.score()
        ranked = self.rank(scores)
        values = {row.architecture.slug: row.rank_value for row in ranked if row.rank_value is not None}
        self.write({
            "kind": "ranking", "step": self.step, "epoch": self.step // self.steps_per_epoch,
            "best": ranked[0].architecture.slug,
            "accuracy": {row.architecture.slug: row.accuracy for row in ranked},
            "supernet": {row.architecture.slug: row.supernet for row in ranked},
            "truth": self.against_truth(ranked, scores), "cost": self.method.cost.as_dict(),
        } | ({"rank_value": values} if values else {}))  # fmt: skip
        self._ranking_is_due = False

    @property
    def recent_accuracy(self) -> float | None:
        """Mean over the validation batches since the last record of kind "step"; None: there was none."""
        accuracies = [accuracy for _, accuracy in self._recent if accuracy is not None]
        return sum(accuracies) / len(accuracies) if accuracies else None

    # Scoring and ranking. ---------------------------------------------------------------------------------------------

    def score(self) -> Scores | Race:
        """Validation counts of each architecture with its supernet, or of all pairs, as `config.score` says.

        With `config.race` the final ones are those of a race, where of equal counts the larger estimate is better.
        """
        config, own = self.config, self.method.rank()
        if config.score == "pairs":
            pairs = self.method.pairs()
        else:
            pairs = [(a, int(own.supernet[a.index])) for a in self.problem.space if own.supernet[a.index] >= 0]
        order = own.order.tolist()
        if config.evaluate_top:
            pairs = [(a, m) for a, m in pairs if a.index in order[: config.evaluate_top]]
        watching = self.step < self.num_steps
        if config.race and not watching:
            pairs.sort(key=lambda pair: order.index(pair[0].index))
        images_done, num_images = 0, max(1, len(self.validation))

        def after_batch(images: int) -> None:
            nonlocal images_done
            images_done += images
            self.scored(min(images_done // num_images, len(pairs)), len(pairs))  # a method may score paths besides

        self.method.after_batch = after_batch
        return self.method.score(pairs, watching=watching)

    def record(self, scores: Scores | Race) -> dict[str, Any]:
        """The counts as plain values, which rankings are made from."""
        return record_scores(scores, self.method.rank().assignment if self.config.score == "pairs" else None)

    def rank(self, scores: Scores | Race) -> tuple[RankedArchitecture, ...]:
        """Architectures from best to worst: by validation accuracies, as `config.rank_by` says, or as the method ranks
        them itself.
        """
        return rank_architectures(
            self.record(scores), self.method.rank(), self.config.rank_by if self.method.by_accuracy else None,
            self.searched, self.problem.macs, self.macs[self.space.default.index],
        )  # fmt: skip

    @property
    def ranked_by(self) -> str:
        """In words."""
        return IN_WORDS[self.config.rank_by] if self.method.by_accuracy else self.method.ranked_by

    def against_truth(self, ranked: Sequence[RankedArchitecture], scores: Scores | Race) -> dict[str, Any]:
        """Agreement of the ranking, of the final scoring, of the estimates, of MACs alone and of every rule that the
        scores suffice for with the truth; empty where there is none.

        Of accuracies those on all images count, and no others: a race leaves some on fewer images, which are not to be
        compared with them.
        """
        if self.truth is None:
            return {}
        macs = {row.architecture.index: float(row.macs) for row in ranked}
        whole = [row for row in ranked if row.images_seen == len(self.validation)]
        accuracy = {row.architecture.index: row.accuracy for row in whole if row.accuracy is not None}
        ema = {row.architecture.index: row.ema_accuracy for row in ranked if row.ema_accuracy is not None}
        return {
            "ranking": ranking_agreement(
                ranked, whole, self.truth, method=self.config.method, by_accuracy=self.method.by_accuracy
            ),
            "accuracy": agreement(accuracy, self.truth, macs),
            "ema": agreement(ema, self.truth, macs),
            "macs": agreement(macs, self.truth, macs),
            "rules": rules_against_truth(self.record(scores), ranked, self.truth, macs),
            "missing": [a.slug for a in self.searched if a.index not in self.truth],
        }

    # Saving and going on. ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on; no generator state."""
        return {
            "step": self.step, "method": self.method.state_dict(), "cost": self.method.cost.as_dict(),
            "nan_steps": self.nan_steps, "nan_in_a_row": self.nan_in_a_row,
            "recent": [list(pair) for pair in self._recent], "ranking_is_due": self._ranking_is_due,
            "train_seconds": self.train_seconds, "data_fingerprint": self.data.fingerprint,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises InputError where the data set is another one than was saved."""
        if state["data_fingerprint"] != self.data.fingerprint:
            raise InputError(
                f"data {self.config.data}: its content has changed since the run was saved "
                f"(sha256 {state['data_fingerprint'][:12]} then, {self.data.fingerprint[:12]} now)"
            )
        self.method.load_state_dict(state["method"])
        self.method.cost = Cost(**state["cost"])
        self.step = state["step"]
        self.nan_steps, self.nan_in_a_row = state["nan_steps"], state["nan_in_a_row"]
        self._recent = [(loss, accuracy) for loss, accuracy in state["recent"]]
        self._ranking_is_due = state.get("ranking_is_due", False)  # absent from older checkpoints
        self.train_seconds = state["train_seconds"]
