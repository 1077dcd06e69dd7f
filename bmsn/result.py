"""`SearchResult`: the ranked architectures, and the files and the table that they are shown in."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from typing import Any

from bmsn.correlation import CORRELATIONS, why_undefined
from bmsn.cost import pareto_front
from bmsn.errors import InputError
from bmsn.space import Architecture, SearchSpace

SCHEMA_VERSION = 4
CSV_COLUMNS = (
    "rank",
    "architecture",
    "accuracy",
    "supernet",
    "macs_ratio",
    "ema_accuracy",
    "standard_error",
    "ema_rank",
    "macs",
    "images_seen",
    "pareto",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedArchitecture:
    """One row of the ranking.

    Attributes:
        rank: place from 1, by validation accuracy; architectures that a race dropped follow, by their accuracy on the
            images they saw, and then those not scored, by `ema_accuracy`. Some methods rank in their own way
            (`SearchResult.method`).
        accuracy: share of `images_seen` that is classified correctly, in [0, 1]; None: not scored.
        standard_error: binomial standard error of `accuracy`.
        images_seen: images of the validation half it was scored on: all, fewer if a race dropped it, 0: not scored.
        supernet: the supernet it was scored with; None: the method has none.
        macs: multiply-accumulates for one image; macs_ratio: relative to the space's default architecture.
        ema_accuracy: a[c, m*], the moving average from training, or another method's own estimate, larger is better;
            None: it has none. ema_rank: place by it.
        pareto: whether it is on the front of `accuracy` against `macs`, among those scored on all images.
        rank_value: what the rank is by, where it is made of several accuracies (`rank_by` mean, weighted or level); on
            the scale of an accuracy, but `level` may leave [0, 1].
    """

    rank: int
    architecture: Architecture
    accuracy: float | None
    standard_error: float | None
    images_seen: int
    supernet: int | None
    macs: int
    macs_ratio: float
    ema_accuracy: float | None
    ema_rank: int | None
    pareto: bool
    rank_value: float | None = None

    @property
    def value(self) -> float | None:
        """What a ranking by validation accuracies is by: `rank_value` where there is one, else `accuracy`."""
        return self.accuracy if self.rank_value is None else self.rank_value

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `architecture` as 4-3-3, `index` from 1."""
        row = {name: getattr(self, name) for name in self.__slots__}
        return row | {"architecture": self.architecture.slug, "index": self.architecture.index + 1}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranking: all architectures, best first.
        config: the settings that reproduce the run.
        environment: versions, machine, threads.
        data: name, fingerprint and sizes of the data set.
        timings: train_images_per_second, train_seconds, score_seconds, total_seconds.
        scores: correct counts of every scored pair: `architecture`, `supernet`, `correct` among `images_seen`, and
            `total`, the images of the validation half; where all pairs were scored also `probability`, their p(m|c).
        cost: training_images, validation_images, training_macs, validation_macs (`bmsn.methods.base.Cost`).
        method: ranked_by and estimate, what `rank` and `ema_accuracy` are in words, and what that method alone found.
        truth: agreement with stand-alone accuracies where `truth` was given, else empty: of the ranking, of the
            accuracy of the final scoring, of the estimates (ema) and of MACs alone; where all pairs were scored, of
            every rule of `bmsn.rank_rules` (rules).
        latency: of the networks trained alone, where it was asked for, else empty (`bmsn.latency.Latency.as_dict`).
        notes: what the reader must know, such as updates skipped for a loss that was not finite.
    """

    ranking: tuple[RankedArchitecture, ...]
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    timings: dict[str, float]
    scores: dict[str, Any]
    cost: dict[str, int]
    method: dict[str, Any]
    truth: dict[str, Any]
    latency: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> RankedArchitecture:
        return self.ranking[0]

    def to_json(self) -> str:
        """The content of result.json."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "ranking"}
        content = {"schema_version": SCHEMA_VERSION, "best": self.best.architecture.slug, **content}
        content["ranking"] = [row.as_dict() for row in self.ranking]
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> SearchResult:
        """Read back what `to_json` wrote. Raises InputError for another schema or a damaged file; `source` names it."""
        try:
            content = _upgraded(json.loads(text), source)
            space = SearchSpace.named(content["config"]["space"], pool=content["config"]["pool"])
            rows = [
                RankedArchitecture(
                    **{name: row[name] for name in RankedArchitecture.__slots__ if name != "architecture"},
                    architecture=space.find(row["architecture"]),
                )
                for row in content["ranking"]
            ]
            fields = {name: content[name] for name in cls.__dataclass_fields__ if name not in ("ranking", "notes")}
            return cls(ranking=tuple(rows), notes=tuple(content["notes"]), **fields)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{source}: not a result of bmsn.search: {error!r}") from error

    def to_csv(self) -> str:
        """The content of ranking.csv."""
        text = io.StringIO()
        by_value = ["rank_value"] if self._rule_in_words else []
        columns = [*CSV_COLUMNS, *by_value, *(f"latency_ms_{size}" for size in self._batch_sizes)]
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in self.ranking:
            cells = {k: "" if v is None else v for k, v in row.as_dict().items()}
            times = {f"latency_ms_{size}": f"{self._latency(row, size):.4f}" for size in self._batch_sizes}
            writer.writerow(cells | times)
        return text.getvalue()

    @property
    def _rule_in_words(self) -> str:
        """`by mean` and the like, where ranks are by other values than the accuracies that stand beside them."""
        return f"by {self.config['rank_by']}" if any(row.rank_value is not None for row in self.ranking) else ""

    @property
    def _batch_sizes(self) -> list[str]:
        """Those that latency was measured at."""
        return list(self.latency.get("spread", {}))

    def _latency(self, row: RankedArchitecture, batch_size: str) -> float:
        """Median in milliseconds."""
        return self.latency["milliseconds"][row.architecture.slug][batch_size][1]

    def to_table(self) -> str:
        """The table that `python -m bmsn.search` prints."""
        estimate = self.method["estimate"]
        lines = [
            f"{'rank':>4}  {'architecture':<12}  {'accuracy %':>14}  {'supernet':>8}  {'MACs':>6}  "
            f"{f'{estimate} rank':>11}"
        ]
        rule = self._rule_in_words
        if rule:
            lines[0] += f"  {f'{rule} %':>13}"
        raced = any(0 < row.images_seen < self.scores["total"] for row in self.ranking)
        if raced:
            lines[0] += f"  {'images':>7}"
        lines[0] += "".join(f"  {f'ms at {size}':>9}" for size in self._batch_sizes)
        for row in self.ranking:
            accuracy = (
                "not scored"
                if row.accuracy is None
                else f"{100 * row.accuracy:6.2f} ± {100 * (row.standard_error or 0):.2f}"
            )
            ema = "-" if row.ema_accuracy is None else f"{row.ema_rank:>3} ({100 * row.ema_accuracy:.1f})"
            supernet = "-" if row.supernet is None else row.supernet
            lines.append(
                f"{row.rank:>4}  {row.architecture!s:<12}  {accuracy:>14}  {supernet:>8}  "
                f"{row.macs_ratio:>5.2f}x{'*' if row.pareto else ' '} {ema:>11}"
                + (f"  {_percent(row.rank_value):>13}" if rule else "")
                + (f"  {row.images_seen:>7}" if raced else "")
                + "".join(f"  {self._latency(row, size):>9.2f}" for size in self._batch_sizes)
            )
        where = "No architecture was scored by itself." if self.cost.get("training_images") else "Nothing was trained."
        if any(row.accuracy is not None for row in self.ranking):
            where = "Accuracies are within a supernet, on the validation half; not after retraining."
        front = sum(row.pareto for row in self.ranking)
        if front:
            where += f" *: Pareto front, the {front} that no other is as cheap and more accurate than."
        best, total = self.best, self.timings["total_seconds"]
        positions = ", ".join(map(str, best.architecture.pool_positions))
        lines += [
            "",
            f"Best: {best.architecture} (pooling before layers {positions}), "
            f"{best.macs_ratio:.2f}x the MACs of the default. Ranked by {self.method['ranked_by']}. {where}",
            f"{self.data['name']}: {total:.0f} s in all, training {self.timings['train_seconds']:.0f} s "
            f"({self.timings['train_images_per_second']:.0f} images/s), scoring {self.timings['score_seconds']:.1f} s.",
        ]
        latency = [self.latency["note"]] if self.latency else []
        return "\n".join(lines + latency + self._truth_lines() + list(self.notes))

    def _truth_lines(self) -> list[str]:
        if not self.truth:
            return []
        lines = [
            "",
            f"{'against the truth':<20} {'tau-b':>7} {'Spearman':>9} {'tau-b | MACs':>13}   "
            "regret of top 1, 3, 5 (points)",
        ]
        own = f"by {self.method['estimate']}"
        figures_by = {
            "this ranking": self.truth["ranking"], "by accuracy": self.truth.get("accuracy"), own: self.truth["ema"],
            "by MACs alone": self.truth["macs"],
        }  # fmt: skip
        figures_by |= {f"rank_by {rule}": figures for rule, figures in self.truth.get("rules", {}).items()}
        for label, figures in figures_by.items():
            # Older results lack that by accuracy.
            if figures is None or figures["n"] == 0 or (label == "by accuracy" and figures == self.truth["ranking"]):
                continue
            cells = [
                _number(figures[key], width)
                for key, width in (("kendall_tau_b", 7), ("spearman", 9), ("partial_kendall", 13))
            ]
            regret = ", ".join(_number(figures[f"regret_top{k}"], 0) for k in (1, 3, 5))
            why = why_undefined(figures)
            lines.append(
                f"{label:<20} {' '.join(cells)}   {regret}  (n = {figures['n']})" + (f"  {why}" if why else "")
            )
        if self.truth["missing"]:
            lines.append(f"without a row in the truth: {', '.join(self.truth['missing'])}")
        return lines


def _upgraded(content: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of a result.json of any schema from 2 on as that of the present one."""
    version = content["schema_version"]
    if version not in range(2, SCHEMA_VERSION + 1):
        raise InputError(f"{source}: schema_version must be in 2..{SCHEMA_VERSION}; got {version}")
    if version < 3:  # the mixture was the only method, and its cost was not counted
        content["config"]["method"] = "mixture"
        content["cost"] = {}
        content["method"] = {"ranked_by": "validation accuracy", "estimate": "a[c,m]"}
    if version < 4:
        rows, total = content["ranking"], content["scores"]["total"]
        accuracies = [row["accuracy"] if row["images_seen"] == total else None for row in rows]
        for row, pareto in zip(rows, pareto_front(accuracies, [row["macs"] for row in rows]), strict=True):
            row["pareto"] = pareto
        content["latency"] = {}
    # Additions that need no schema of their own: what they say is not said by older results.
    content["config"].setdefault("rank_by", "best" if content["config"].get("score") == "pairs" else "assigned")
    for row in content["ranking"]:
        row.setdefault("rank_value", None)
    truth = content.get("truth") or {}
    for figures in (
        *(truth.get(name, {}) for name in ("ranking", "accuracy", "ema", "macs")),
        *truth.get("rules", {}).values(),
    ):
        if isinstance(figures.get("undefined"), str):  # one reason for all correlations
            figures["undefined"] = dict.fromkeys(CORRELATIONS, figures["undefined"])
    return content


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _number(value: float | None, width: int) -> str:
    return f"{'-' if value is None or math.isnan(value) else format(value, '.3f'):>{width}}"
