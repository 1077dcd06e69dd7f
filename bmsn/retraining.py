"""`run_retraining`: what a search found, trained from scratch, and the default architecture beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bmsn.accuracy_table import CSV_COLUMNS, AccuracyRow, accuracy_rows, describe, write_csv
from bmsn.errors import InputError
from bmsn.executors import run_tasks
from bmsn.field_types import check_types
from bmsn.paths import Candidate, find_candidate
from bmsn.result import RankedArchitecture, SearchResult
from bmsn.scheduler import Resources, TaskProgress
from bmsn.space import SearchSpace
from bmsn.standalone import TrainingSettings
from bmsn.tasks import Images, TaskStore
from bmsn.truth import check_seeds, check_training, failures, make_task

RETRAIN_FOLDER = "retrain"  # in the run folder: for each network NAME.json, its result, and NAME.npz, its weights


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Settings of a retraining.

    Attributes:
        run: folder of a finished search.
        top: train the best K of its ranking, and the path of resolutions where its method found one.
        architecture: train these instead, as 5,3,2 or as a path of resolutions, one a layer: 0-0-1-2-1 and so on.
        seeds: networks of each architecture, with seeds 0, 1, ...
        training: how each network is trained, on the training and the validation half together.
        resources: what they are trained on.
    """

    run: Path
    top: int | None = None
    architecture: tuple[str, ...] = ()
    seeds: int = 3
    training: TrainingSettings = field(default_factory=TrainingSettings)
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        check_types(self)
        check_seeds(self.seeds, 0)
        if (self.top is None) == (not self.architecture):
            raise InputError(
                f"one of top and architecture must be given; got top {self.top}, architecture {self.architecture}"
            )


@dataclass(frozen=True, kw_only=True)
class RetrainedRow:
    """Test accuracy of an architecture trained alone, and its place in the search."""

    alone: AccuracyRow[Candidate]
    searched: RankedArchitecture | None  # None: a path outside the space
    is_default: bool

    def as_dict(self) -> dict[str, str | int]:
        """Cells of the CSV file by column."""
        accuracy = None if self.searched is None else self.searched.accuracy
        return self.alone.as_dict() | {
            "search_rank": "" if self.searched is None else self.searched.rank,
            "search_accuracy": "" if accuracy is None else f"{100 * accuracy:.3f}",
            "is_default": int(self.is_default),
        }


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What the networks reached: rows in the order of the search's ranking, paths behind; `failed` as `GroundTruth`."""

    rows: tuple[RetrainedRow, ...]
    failed: dict[str, str]


def run_retraining(
    config: RetrainConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[TaskProgress], None] = lambda progress: None,
) -> Retraining:
    """Trains architectures of a finished search from scratch and writes `run`/retrain.csv.

    Both halves of the training images are trained on: nothing is selected by them any more. The test accuracy is that
    of the last epoch. Killed at any moment, the same call goes on; results and weights of each network are in
    `run`/retrain (`bmsn.run_export` makes files of them that need no bmsn).

        >>> retraining = bmsn.run_retraining(
        ...     bmsn.RetrainConfig(
        ...         run=Path("runs/a"), architecture=("2,3,2",), seeds=1,
        ...         training=bmsn.TrainingSettings(epochs=1, batch_size=16),
        ...     )
        ... )
        >>> sorted((str(row.alone.architecture), row.is_default) for row in retraining.rows)
        [('[2,3,2]', False), ('[3,2,2]', True)]

    Args:
        config: settings.
        should_stop: asked about once a second; True raises Interrupted.
        progress: called about once a second.
    Raises:
        InputError: a run that is unfinished, of another schema or whose images have changed; settings that cannot be.
        RunStopped, Interrupted, OSError: see `run_local`.
    """
    result = read_result(config.run)
    space = SearchSpace.named(result.config["space"], pool=result.config["pool"])
    chosen = _chosen(config, result, space)
    images = Images(spec=result.config["data"], generator_seed=None, fingerprint=result.data["fingerprint"])
    data = images.open(space)
    check_training(space, data, config.training)
    seeds = range(config.seeds)
    folder = config.run / RETRAIN_FOLDER
    tasks = [
        replace(make_task(space, a, images, seed, config.training), weights_folder=folder)
        for seed in seeds
        for a in chosen
    ]
    outcome = run_tasks(tasks, TaskStore(folder), config.resources, should_stop, progress)
    searched: dict[Candidate, RankedArchitecture] = {row.architecture: row for row in result.ranking}
    rows = [
        RetrainedRow(alone=row, searched=searched.get(row.architecture), is_default=row.architecture == space.default)
        for row in accuracy_rows(space, chosen, data, tasks, outcome)
    ]
    title = f"{space.name} trained alone on both halves of {images.spec}: " + describe(
        space, seeds, config.training, outcome.results
    )
    columns = (*CSV_COLUMNS, "search_rank", "search_accuracy", "is_default", "pareto")
    write_csv(config.run / "retrain.csv", title, columns, [row.as_dict() for row in rows])
    return Retraining(rows=tuple(rows), failed=failures(tasks, outcome))


def read_result(run: Path) -> SearchResult:
    """The result of a finished search. Raises InputError for a folder that holds none, or one of another schema."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: holds no run of bmsn.search (it has no config.yaml)")
    path = run / "result.json"
    if not path.is_file():
        raise InputError(
            f"{run}: the search is not finished (it has no result.json): "
            f"python -m bmsn.search --resume --out {run} goes on"
        )
    try:
        return SearchResult.from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _chosen(config: RetrainConfig, result: SearchResult, space: SearchSpace) -> list[Candidate]:
    """What is trained, in the order of the ranking, paths outside the space last; always with the default one."""
    ranked = [row.architecture for row in result.ranking]
    if config.top is not None and not 1 <= config.top <= len(ranked):
        raise InputError(f"top must be in [1, {len(ranked)}], the architectures of {space.name}; got {config.top}")
    named: list[Candidate]
    if config.top is not None:
        found = [result.method["resolution_path"]] if "resolution_path" in result.method else []
        named = [*ranked[: config.top], *(find_candidate(space, text) for text in found)]
    else:
        named = [find_candidate(space, text) for text in config.architecture]
    wanted = (*named, space.default)
    # Not ranked: paths, and architectures above the search's max_macs.
    others = dict.fromkeys(each for each in wanted if each not in ranked)
    return [*(architecture for architecture in ranked if architecture in wanted), *others]
