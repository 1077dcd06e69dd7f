"""`SearchConfig`: every setting of a search, its presets, and how a preset's values are filled in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from bmsn import methods
from bmsn.cost import parse_max_macs
from bmsn.data.readers import check_spec, split_spec
from bmsn.errors import InputError
from bmsn.field_types import check_types
from bmsn.rank_rules import RankRule
from bmsn.space import PoolKind, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """What a preset decides beside the fields of `SearchConfig`.

    Attributes:
        ema_decay: beta of a[c,m].
        tol: KL(p(m) || uniform) at which balancing stops.
        milestones: fractions of the training at which the learning rate is multiplied by `factor`; none: cosine.
        factor: see `milestones`.
        anneal: learning rate and 1/tau change with every step, or with every epoch.
        visits: what is drawn for each step (`SearchConfig.draw`) is drawn on its own, or in blocks: shuffled, each
            choice once a block, so that no two are ever more than one visit apart.
        validate_every: steps from one validation batch to the next while one supernet trains alone, so that nothing is
            chosen by a[c,m]. With more of them, and with `evaluate_top`, every step has one.
    """

    ema_decay: float = 0.9
    tol: float = 1e-12
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    anneal: Literal["step", "epoch"] = "step"
    visits: Literal["independent", "blocks"] = "blocks"
    validate_every: int = 4


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of a search. A field that is None is filled in by the preset, the data set or the space.

    Attributes:
        space: name of a search space, or a JSON object of the arguments of `SearchSpace`; None: resnet14-cifar10 on
            synthetic data, else required.
        data: images as scheme:path (synthetic, cifar10, cifar100, parquet, folder, npz); None: synthetic, or those
            that `run_search` is given.
        method: how to search: mixture, spos, spos-unshared, spos-unshared-all, few-shot, mcts, boltzmann, darts,
            darts-unshared-same, darts-unshared-random, gaea, random or macs.
        supernets: M, number of supernets; None: as many as the method needs; mixture: 4, on synthetic data 2.
        epochs: passes over the training half; None: a base of the data set times M.
        preset: values for what is not given here: ours, the paper's, or those of its authors' code.
        batch_size: images in a training batch, a validation batch and a scoring batch.
        lr: learning rate at the start.
        min_lr: learning rate at the end of the cosine.
        momentum: of SGD.
        weight_decay: of SGD, on every parameter.
        schedule: 1/tau linear from 1 to 100 (inverse), or tau linear from 1 to 1/(100 M) (temperature).
        balance_every: steps from one balancing to the next, or "epoch".
        refresh_every: steps from one refresh of the whole table a[c,m] on a validation batch to the next; 0: never.
        start_accuracy: a[c,m] before its first visit: 1 is optimistic, unvisited pairs are tried first; that of chance
            is not.
        draw: what is drawn equally often: architectures (paper), or the positions of each pooling: one of the p, then
            where it is, then an architecture that has it there; else late first and early last poolings, which few
            architectures have, are hardly trained. first-pooling: positions of the first alone, in favour of late
            ones. None: by the preset, where the method (mixture, spos, spos-unshared) takes it.
        split_after: share of the steps, the first ones, in which one supernet trains alone; then the others begin as
            its copies. 0: all of them train from the start, each with weights of its own. None: as the preset says, 0
            for a method that has none.
        average_last: score the mean of the weights over this share of the steps, the last ones; 0: the last weights.
        warm_up: share of the steps in which architectures are drawn uniformly, at the start (mcts, boltzmann); the
            paper has searches with it and without.
        ucb_constant: c of mcts: how much it explores.
        alpha_lr: learning rate of alpha in darts and gaea; None: the method's own.
        pool: how a layer downsamples; None: as the space says.
        device: where to compute; auto: CUDA where there is a GPU.
        max_macs: propose and rank no architecture of more multiply-accumulates for one image: 1.0x, relative to the
            default architecture, or 40M.
        engine: how steps run: one by one (eager), or each as one CUDA graph (graphs); auto: graphs on CUDA.
        seed: of everything random.
        fast_eval: score all architectures in one pass instead of one by one. Changes no score but for rounding ties.
        adapt: steps of SGD that a copy of its supernet takes with an architecture alone before it is scored; 0: none.
        adapt_lr: their learning rate; the default is that at the end of the default cosine.
        norm: statistics of BatchNorm in scoring: of each scoring batch, or calibrated once on training images (needs
            fast_eval).
        score: score each architecture with its best supernet, or all (architecture, supernet) pairs; None: all pairs
            where `rank_by` needs them, the best supernet in a race, else as the preset says.
        rank_by: rank architectures by their accuracy in the supernet assigned to them, argmax_m p(m|c), or in the one
            where it is best; by the mean over all supernets, plain or weighted by p(m|c); or by the assigned one less
            that supernet's level. All but assigned need all pairs; None: best where all are scored, else assigned.
        score_every: epochs from one ranking of all architectures during training to the next; 0: only at the end.
        evaluate_top: score only the K best by a[c,m]; 0: all.
        race: find the K best without scoring the others on every image; 0: all see all images.
        confidence: probability that the K which the race finds are the K best on the whole validation half.
        latency: measure how long each architecture's network takes on this device, at batch 1 and 256.
        truth: stand-alone accuracies to compare with: "paper" or a CSV file.
        out: run folder; None: nothing is written.
        resume: go on with the run in `out`.
        checkpoint_every: steps from one checkpoint to the next.
        tensorboard: write TensorBoard events to `out`.
    """

    space: str | None = None
    data: str | None = None
    method: str = "mixture"
    supernets: int | None = None
    epochs: int | None = None
    preset: Literal["default", "paper", "authors"] = "default"
    batch_size: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    schedule: Literal["inverse", "temperature"] | None = None
    balance_every: int | Literal["epoch"] | None = None
    refresh_every: int = 0
    start_accuracy: float = 1.0
    draw: Literal["poolings", "first-pooling", "architectures"] | None = None
    split_after: float | None = None
    average_last: float = 0.0
    warm_up: float = 0.0
    ucb_constant: float = math.sqrt(2)
    alpha_lr: float | None = None
    pool: PoolKind | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_macs: str | None = None
    engine: Literal["auto", "eager", "graphs"] = "auto"
    seed: int = 0
    fast_eval: bool = False
    adapt: int = 0
    adapt_lr: float = 1e-3
    norm: Literal["batch", "calibrated"] = "batch"
    score: Literal["best", "pairs"] | None = None
    rank_by: RankRule | None = None
    score_every: int = 0
    evaluate_top: int = 0
    race: int = 0
    confidence: float = 0.95
    latency: bool = False
    truth: str | None = None
    out: Path | None = None
    resume: bool = False
    checkpoint_every: int = 500
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        methods.check_name(self.method)
        bounds: dict[str, tuple[float, float]] = {
            "supernets": (1, 4096),
            "epochs": (1, 10**6),
            "batch_size": (2, 10**6),
            "lr": (0, 100),
            "min_lr": (0, 100),
            "momentum": (0, 1),
            "weight_decay": (0, 1),
            "refresh_every": (0, 10**9),
            "start_accuracy": (0, 1),
            "split_after": (0, 1),
            "average_last": (0, 1),
            "warm_up": (0, 1),
            "ucb_constant": (0, 1000),
            "alpha_lr": (1e-9, 100),
            "seed": (0, 2**63 - 1),
            "score_every": (0, 10**6),
            "adapt": (0, 10**6),
            "adapt_lr": (0, 100),
            "evaluate_top": (0, 10**9),
            "race": (0, 10**9),
            "checkpoint_every": (1, 10**9),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} must be in [{low}, {high}]; got {value}")
        if isinstance(self.balance_every, int) and self.balance_every < 1:
            raise InputError(f"balance_every must be at least 1 or 'epoch'; got {self.balance_every}")
        if self.max_macs is not None:
            parse_max_macs(self.max_macs)
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence must be in (0, 1); got {self.confidence}")
        needs_pairs = self.rank_by not in (None, "assigned")
        if self.race and (self.score == "pairs" or needs_pairs):
            given = "score pairs" if self.score == "pairs" else f"rank_by {self.rank_by}"
            raise InputError(
                f"race ranks architectures, each with its best supernet: score must be best and rank_by assigned; "
                f"got {given}"
            )
        if self.race and self.adapt:
            raise InputError(f"adapt trains each architecture before it is scored: race must be 0; got {self.race}")
        if needs_pairs and self.score == "best":
            raise InputError(
                f"rank_by {self.rank_by} needs the accuracies of all pairs: score must be pairs, or not given; got best"
            )
        if self.norm == "calibrated" and not self.fast_eval:
            raise InputError(
                "norm calibrated needs fast_eval: one by one there are statistics of scoring batches alone"
            )
        if self.resume and self.out is None:
            raise InputError("resume needs out: the run folder to go on with")
        if self.lr is not None and self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"min_lr must be at most lr = {self.lr}; got {self.min_lr}")

    def filled(self) -> FilledConfig:
        """The same with every None replaced by what the preset, the data set and the space say (`pool` None: the
        space's own).

        Raises:
            InputError: an unknown scheme or variant of `data`, no space given where the data set has none, or a setting
                that does not fit the method.
        """
        data = "synthetic" if self.data is None else self.data
        check_spec(data)
        synthetic = split_spec(data)[0] == "synthetic"
        space = self.space or ("resnet14-cifar10" if synthetic else None)
        if space is None:
            raise InputError(f"space must be given for data {data!r} (only synthetic data has a default one)")
        preset, special = _PRESETS[self.preset], _SPECIAL.get((self.preset, space), {})
        supernets = self._supernets(space) or (2 if synthetic else 4)
        epochs = _SYNTHETIC_EPOCHS * supernets if synthetic else special.get("epochs", preset.epochs)
        if self.preset != "authors" and not synthetic:
            epochs *= supernets
        if synthetic and self.preset == "default":
            special = {**special, **_SYNTHETIC}
        taken = methods.get(self.method).settings
        special = {**special, **{name: value for name, value in _WITHOUT.items() if name not in taken}}
        values = {**preset.fields, **special, "space": space, "data": data, "supernets": supernets, "epochs": epochs}
        if self.rank_by not in (None, "assigned"):
            values["score"] = "pairs"
        elif self.race:
            values["score"] = "best"
        ranks_pairs = (self.score or values["score"]) == "pairs" and "rank_by" in taken
        values["rank_by"] = "best" if ranks_pairs else "assigned"
        known = {field.name for field in fields(self)}
        given = {name: getattr(self, name) for name in known}
        chosen = {k: v for k, v in values.items() if k in known and given[k] is None}
        return FilledConfig(**given | chosen)

    def _supernets(self, space: str) -> int | None:
        """M as given or as the method needs it; None: open."""
        method = methods.get(self.method)
        method.check(self)
        opened = SearchSpace.named(space)
        needed = method.num_supernets(opened)
        if needed is not None and self.supernets not in (None, needed):
            raise InputError(
                f"supernets must be {needed} for method {self.method} in {opened.name}; got {self.supernets}"
            )
        return needed or self.supernets

    @property
    def procedure(self) -> Procedure:
        """The preset's part of the method that has no flag of its own."""
        special = _SPECIAL.get((self.preset, self.space or ""), {})
        known = {entry.name for entry in fields(Procedure)}
        return replace(_PRESETS[self.preset].procedure, **{k: v for k, v in special.items() if k in known})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON that reproduce the run; not where it is kept (`out`, `resume`)."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "resume")}


@dataclass(frozen=True, kw_only=True)
class FilledConfig(SearchConfig):
    """What `SearchConfig.filled` returns: settings that a search can start from, none of these left open."""

    # `field()`: required, where a bare redeclaration would inherit the default None.
    space: str = field()
    data: str = field()
    supernets: int = field()
    epochs: int = field()
    batch_size: int = field()
    lr: float = field()
    min_lr: float = field()
    momentum: float = field()
    weight_decay: float = field()
    schedule: Literal["inverse", "temperature"] = field()
    balance_every: int | Literal["epoch"] = field()
    split_after: float = field()
    score: Literal["best", "pairs"] = field()
    rank_by: RankRule = field()


# Presets. Sources: Javan et al. 2023, section 3 and appendix ("paper"); the settings of the code released with it
# ("authors").

# The built-in set is small: it takes many steps to learn, and scoring every pair costs seconds. With two supernets the
# balance gives each half of the architectures, so the assigned one need not be the best (benchmarks/results).
_SYNTHETIC_EPOCHS = 18
_SYNTHETIC = {"batch_size": 64, "score": "pairs"}

_WITHOUT = {"draw": None, "split_after": 0.0}  # of methods that do not take them


@dataclass(frozen=True, kw_only=True)
class _Preset:
    epochs: int
    fields: dict[str, Any]
    procedure: Procedure


_PRESETS = {
    "default": _Preset(
        epochs=100,
        fields=dict(
            batch_size=256,
            lr=0.1,
            min_lr=1e-3,
            momentum=0.9,
            weight_decay=1e-3,
            schedule="inverse",
            balance_every=1,
            draw="poolings",
            split_after=0.5,
            score="best",
        ),
        procedure=Procedure(),
    ),
    "paper": _Preset(
        epochs=100,
        fields=dict(
            batch_size=256,
            lr=0.1,
            min_lr=0.0,
            momentum=0.9,
            weight_decay=1e-3,
            schedule="temperature",
            balance_every=1,
            draw="architectures",
            split_after=0.0,
            score="best",
        ),
        procedure=Procedure(tol=1e-4, visits="independent", validate_every=1),
    ),
    "authors": _Preset(
        epochs=101,
        fields=dict(
            batch_size=128,
            lr=0.1,
            min_lr=1e-3,
            momentum=0.9,
            weight_decay=0.0,
            schedule="inverse",
            balance_every="epoch",
            draw="architectures",
            split_after=0.0,
            score="best",
        ),
        procedure=Procedure(tol=1e-4, anneal="epoch", visits="independent", validate_every=1),
    ),
}
_RESNET18 = dict(epochs=400, milestones=(0.5, 0.75), factor=0.1, weight_decay=5e-3)
_RESNET50 = dict(epochs=250, milestones=(60 / 250, 120 / 250, 160 / 250), factor=0.2)
_SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    ("paper", "resnet18-cifar10"): _RESNET18,
    ("authors", "resnet18-cifar10"): _RESNET18 | dict(ema_decay=0.95),
    ("paper", "resnet50-cifar100"): _RESNET50,
    ("authors", "resnet50-cifar100"): _RESNET50,
    ("authors", "resnet50-food101"): dict(weight_decay=1e-3),
    ("authors", "resnet20-cifar10"): dict(score="pairs"),
}
