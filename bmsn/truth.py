"""`run_ground_truth`: every architecture of a space trained alone, and the table that a search is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bmsn.accuracy_table import CSV_COLUMNS, AccuracyRow, accuracy_rows, describe, write_csv
from bmsn.config import SearchConfig
from bmsn.data import ImageDataset
from bmsn.data.readers import split_spec
from bmsn.errors import InputError
from bmsn.executors import run_tasks
from bmsn.field_types import check_types
from bmsn.paths import Candidate, ResolutionPath, as_path, parse_path, path_architecture, path_macs
from bmsn.scheduler import Outcome, Resources, TaskProgress
from bmsn.space import Architecture, PoolKind, SearchSpace
from bmsn.standalone import TrainingSettings, check_data
from bmsn.tasks import Images, Task, TaskResult, TaskStore, open_images


@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig:
    """Settings of a ground truth.

    Attributes:
        space: name of a search space; None: resnet14-cifar10 on synthetic data, else required.
        data: images as scheme:path. Of synthetic data each seed has images of its own: the truth is about the kind of
            images, not about one draw of them.
        pool: how a layer downsamples; None: as the space says.
        seeds: networks of each architecture, with seeds of their own. The table is over these seeds, whatever others
            the folder holds.
        first_seed: the smallest of the seeds.
        paths: to train besides, with rows of their own in the table: paths of resolutions outside the space, one a
            layer, as 0-0-1-2-1, which darts, gaea and spos-unshared-all find.
        out: folder; other processes and machines may work in the same one, and files of its folder tasks may be copied
            here from another.
        training: how each network is trained, on all training images.
        resources: what they are trained on.
    """

    space: str | None = None
    data: str = "synthetic"
    pool: PoolKind | None = None
    seeds: int = 3
    first_seed: int = 0
    paths: tuple[str, ...] = ()
    out: Path
    training: TrainingSettings = field(default_factory=TrainingSettings)
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        check_types(self)
        check_seeds(self.seeds, self.first_seed)


def check_seeds(seeds: int, first_seed: int) -> None:
    """Raise InputError unless there are such seeds."""
    if not 1 <= seeds <= 10_000:
        raise InputError(f"seeds must be in [1, 10000]; got {seeds}")
    if not 0 <= first_seed <= 2**62:
        raise InputError(f"first_seed must be in [0, 2^62]; got {first_seed}")


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """What the networks reached.

    Attributes:
        rows: one an architecture, in the space's order; those of which no network could be trained have none.
        paths: of the paths besides, likewise.
        failed: for each network that could not be trained, as "[4,3,3] seed 0", the reason.
    """

    rows: tuple[AccuracyRow[Architecture], ...]
    paths: tuple[AccuracyRow[ResolutionPath], ...]
    failed: dict[str, str]


def run_ground_truth(
    config: GroundTruthConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[TaskProgress], None] = lambda progress: None,
) -> GroundTruth:
    """Trains every architecture alone and writes `out`/ground_truth.csv, which a search reads with `truth`.

    Killed at any moment, the same call goes on; several processes and machines may make the same call with the same
    folder. The results of each network are in `out`/tasks; the table is over the seeds of the call alone, also where
    the folder holds others, or had a table of them.

    Source: Javan et al. 2023, section 3.1 and table 6.

        >>> truth = bmsn.run_ground_truth(
        ...     bmsn.GroundTruthConfig(
        ...         space="resnet14-cifar10", data="npz:images.npz", seeds=1, out=Path("runs/truth"),
        ...         training=bmsn.TrainingSettings(epochs=1, batch_size=16),
        ...     )
        ... )
        >>> len(truth.rows), truth.failed
        (15, {})
        >>> print(truth.rows[0].architecture, 0 <= truth.rows[0].accuracy_mean <= 100)
        [1,1,5] True
        >>> Path("runs/truth/ground_truth.csv").is_file()
        True

    Args:
        config: settings.
        should_stop: asked about once a second; True raises Interrupted.
        progress: called about once a second.
    Raises:
        InputError: settings, data or folder that cannot be used.
        RunStopped, Interrupted, OSError: see `run_local`.
    """
    space = SearchSpace.named(SearchConfig(space=config.space, data=config.data).filled().space, pool=config.pool)
    paths = _outside(space, config.paths)
    tasks: list[Task] = []
    synthetic = split_spec(config.data)[0] == "synthetic"
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    data: ImageDataset | None = None
    for seed in seeds:
        if data is None or synthetic:
            generator_seed = seed if synthetic else None
            data = open_images(config.data, generator_seed, space)
            check_training(space, data, config.training)
            images = Images(spec=config.data, generator_seed=generator_seed, fingerprint=data.fingerprint)
        # The dearest first: the last to finish are then cheap ones, and no worker waits long for another.
        for candidate in sorted([*space, *paths], key=lambda c: path_macs(space, as_path(space, c)), reverse=True):
            tasks.append(make_task(space, candidate, images, seed, config.training))
    assert data is not None
    outcome = run_tasks(tasks, TaskStore(config.out / "tasks"), config.resources, should_stop, progress)
    truth = GroundTruth(
        rows=tuple(row for row in accuracy_rows(space, space, data, tasks, outcome) if row.n),
        paths=tuple(row for row in accuracy_rows(space, paths, data, tasks, outcome) if row.n),
        failed=failures(tasks, outcome),
    )
    trained = describe(space, seeds, config.training, outcome.results)
    title = f"{space.spec} trained alone on {config.data}: {trained}"
    columns = (*CSV_COLUMNS, "pareto")
    cells = [row.as_dict() for row in truth.rows] + [row.as_dict() for row in truth.paths]
    write_csv(config.out / "ground_truth.csv", title, columns, cells)
    return truth


def _outside(space: SearchSpace, texts: Sequence[str]) -> list[ResolutionPath]:
    """The paths, each once; InputError for what is an architecture of the space."""
    paths = [parse_path(space, text) for text in texts]
    for path in paths:
        inside = path_architecture(space, path)
        if inside is not None:
            raise InputError(f"paths must lie outside {space.name}; {path} is its {inside}")
    return list(dict.fromkeys(paths))


# What retraining has in common with it. -------------------------------------------------------------------------------


def check_training(space: SearchSpace, data: ImageDataset, training: TrainingSettings) -> None:
    """Raise InputError for what every network would stop at: found before the first one is begun."""
    check_data(space, data)
    if training.batch_size > len(data.train_labels):
        raise InputError(
            f"batch_size must be in 2..{len(data.train_labels)}, the number of training images; "
            f"got {training.batch_size}"
        )


def make_task(
    space: SearchSpace, architecture: Candidate, images: Images, seed: int, training: TrainingSettings
) -> Task:
    return Task(
        space=space.spec, pool=space.pool, architecture=architecture.slug, images=images, seed=seed, settings=training
    )


def failures(tasks: Sequence[Task], outcome: Outcome[TaskResult]) -> dict[str, str]:
    """Reasons by the tasks' labels, in the tasks' order."""
    return {task.label: outcome.failed[task.name] for task in tasks if task.name in outcome.failed}
