"""`run_comparison`: several search methods on the same images, budget and seeds, measured against the truth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bmsn import methods
from bmsn.command_line import command_line
from bmsn.comparison_figures import Paired, Row, Run, compare_pairs, describe_run, summarise_runs
from bmsn.comparison_files import check_drawing, draw_budgets, write_tables
from bmsn.config import FilledConfig, SearchConfig
from bmsn.correlation import load_truth, load_truth_of_paths
from bmsn.data import ImageDataset
from bmsn.errors import InputError
from bmsn.executors import run_tasks
from bmsn.field_types import check_types
from bmsn.loop import SearchLoop
from bmsn.method_spec import MethodSpec, parse_methods, parse_settings
from bmsn.methods.base import OPTIONAL_SETTINGS
from bmsn.rank_rules import RankRule
from bmsn.ranking import rerank
from bmsn.result import SearchResult
from bmsn.run import run_search
from bmsn.scheduler import Resources, TaskProgress
from bmsn.space import PoolKind, SearchSpace
from bmsn.tasks import Images, Place, Store, open_images
from bmsn.truth import check_seeds

_DEFAULT_BASELINES = ("spos", "macs")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Settings of a comparison.

    Attributes:
        methods: names separated by commas, each with settings of its own if wanted:
            mixture,spos,mixture:supernets=8,refresh_every=200,label=refreshed. The ranking by MACs alone is always
            among them.
        space: name of a search space; None: resnet14-cifar10 on synthetic data, else required.
        data: images as scheme:path.
        pool: how a layer downsamples; None: as the space says.
        budget: epochs of the training half, the same for every method.
        budgets: several of them, as 5,10,20: rank correlation and regret are drawn against them.
        seeds: searches of each method at each budget, with seeds of their own.
        first_seed: the smallest of the seeds.
        truth: stand-alone accuracies: "paper" or a CSV file, such as that of bmsn.ground_truth.
        baseline: labels separated by commas that all others are compared with seed by seed; None: those of spos and
            macs that are there.
        settings: of all methods that take them, as batch_size=64,weight_decay=5e-4; a method's own go before them.
            fast_eval is true unless it is given.
        out: folder of the searches and of the tables.
        resources: what the searches run on.
    """

    methods: str
    space: str | None = None
    data: str = "synthetic"
    pool: PoolKind | None = None
    budget: int | None = None
    budgets: str = ""
    seeds: int = 3
    first_seed: int = 0
    truth: str
    baseline: str | None = None
    settings: str = ""
    out: Path
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        check_types(self)
        check_seeds(self.seeds, self.first_seed)
        if not self.all_budgets:
            raise InputError("budget or budgets must be given: epochs of the training half")
        for label in self.baselines:
            if label not in self.labels:
                raise InputError(f"baseline must be among {', '.join(self.labels)}; got {label!r}")

    @cached_property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The methods; with that by MACs, which costs nothing, as the last where it was not named."""
        specs = parse_methods(self.methods)
        if any(spec.method == "macs" for spec in specs):
            return specs
        return (*specs, MethodSpec(label="macs", method="macs", settings={}))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(spec.label for spec in self.specs)

    @property
    def baselines(self) -> tuple[str, ...]:
        if self.baseline is None:
            return tuple(label for label in _DEFAULT_BASELINES if label in self.labels)
        return tuple(label.strip() for label in self.baseline.split(","))

    @cached_property
    def all_budgets(self) -> tuple[int, ...]:
        """In epochs, ascending."""
        given = [] if self.budget is None else [self.budget]
        for text in filter(None, self.budgets.split(",")):
            if not text.strip().isdecimal():
                raise InputError(f"budgets must be whole numbers of epochs, as 5,10,20; got {self.budgets!r}")
            given.append(int(text))
        if any(not 1 <= budget <= 10**6 for budget in given):
            raise InputError(f"budget must be in [1, {10**6}] epochs; got {', '.join(map(str, given))}")
        return tuple(sorted(set(given)))


@dataclass(frozen=True, kw_only=True)
class SearchTask:
    """One search, kept in a run folder of its own, where a process that takes it up again goes on.

    Attributes:
        spec_label: how the comparison calls its method, for messages; of several that share the search, the first.
        config: without its folder; `images` are those that it names.
        cost: what its time is about proportional to.
        folder: that the run folder is in.
    """

    spec_label: str
    config: FilledConfig
    images: Images
    cost: int
    folder: Path

    @cached_property
    def name(self) -> str:
        """Of the run folder: readable in front, then the hash of settings and images."""
        key = json.dumps([self.config.as_dict(), self.images.fingerprint], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return f"{self.config.method}-{self.config.epochs}epochs-seed{self.config.seed}-{digest}"

    @property
    def label(self) -> str:
        return f"{self.spec_label}, {self.config.epochs} epochs, seed {self.config.seed}"

    @property
    def macs(self) -> int:
        return self.cost

    @cached_property
    def kind(self) -> str:
        """Its settings: a ranking by MACs takes no time, and the methods that train differ by a factor of 20."""
        return json.dumps(self.config.as_dict() | {"seed": None}, sort_keys=True)

    def perform(self, place: Place, progress: Callable[[float], None]) -> FinishedSearch:
        run = self.folder / self.name
        config = replace(self.config, out=run, resume=(run / "config.yaml").is_file())
        space = SearchSpace.named(config.space, pool=config.pool)
        data = place.open(self.images, space)
        return FinishedSearch(
            result=run_search(config, data, progress=lambda record: progress(record["step"] / record["num_steps"]))
        )


@dataclass(frozen=True, kw_only=True)
class FinishedSearch:
    """The result of a `SearchTask`."""

    result: SearchResult

    @property
    def seconds(self) -> float:
        return self.result.timings["total_seconds"]

    @property
    def summary(self) -> str:
        return f"{self.result.best.architecture}, {self.seconds:.0f} s"


class RunStore(Store[SearchTask, FinishedSearch]):
    """Run folders of searches: what has a result.json is done."""

    noun = "searches finished"

    def result(self, task: SearchTask) -> FinishedSearch | None:
        """The result; None where there is none yet. Raises InputError for one of another schema, or damaged."""
        path = self.folder / task.name / "result.json"
        try:
            return FinishedSearch(result=SearchResult.from_json(path.read_text(), str(path)))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error

    def write(self, task: SearchTask, result: FinishedSearch) -> None:
        """Nothing: the search has written it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out.

    Attributes:
        rows: one for each method and budget of which a search finished, in the order of methods within each budget.
        paired: every row's method against each baseline.
        runs: all searches that finished.
        failed: for each search that could not be finished, the reason.
        missing: architectures of the space without a row in the truth.
        num_architectures: of the space.
    """

    rows: tuple[Row, ...]
    paired: tuple[Paired, ...]
    runs: tuple[Run, ...]
    failed: dict[str, str]
    missing: tuple[str, ...]
    num_architectures: int


def run_comparison(
    config: ComparisonConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[TaskProgress], None] = lambda progress: None,
) -> Comparison:
    """Runs every method at every budget with every seed; writes `out`/comparison.csv, paired.csv, comparison.json.

    With several budgets also budgets.svg and budgets.png. Each search has a folder in `out`/runs: killed at any moment,
    the same call goes on where it was, and several processes may make it with the same `out`. The tables come from the
    results in these folders alone. Methods that differ in `rank_by` alone, with all pairs scored, share their searches.

    Source: Javan et al. 2023, table 2.

        >>> comparison = bmsn.run_comparison(
        ...     bmsn.ComparisonConfig(
        ...         methods="spos,random", space="resnet14-cifar10", data="npz:images.npz", truth="truth.csv",
        ...         budget=1, seeds=1, settings="batch_size=16", out=Path("runs/compare"),
        ...     )
        ... )
        >>> [row.label for row in comparison.rows]
        ['spos', 'random', 'macs']
        >>> comparison.rows[0].figures["regret_top1"].mean >= 0  # percentage points
        True

    Args:
        config: settings.
        should_stop: asked about once a second; True raises Interrupted.
        progress: called about once a second.
    Raises:
        InputError: settings, data, truth or folder that cannot be used; found before the first search where it can be.
        RunStopped, Interrupted, OSError: see `run_local`.
    """
    if len(config.all_budgets) > 1:
        check_drawing()
    named = SearchConfig(space=config.space, data=config.data).filled().space
    space = SearchSpace.named(named, pool=config.pool)
    data = open_images(config.data, None, space)
    searches = _make_searches(config, space, data)
    trained = space.resized(data.image_size)
    truth, of_paths = load_truth(config.truth, trained), load_truth_of_paths(config.truth, trained)
    unique: dict[str, SearchTask] = {}
    for search in searches.values():  # two labels of the same settings are one search
        unique.setdefault(search.task.name, search.task)
    outcome = run_tasks(list(unique.values()), RunStore(config.out / "runs"), config.resources, should_stop, progress)
    runs = tuple(
        describe_run(
            label, budget, seed, search.ranked(outcome.results[search.task.name].result), space, truth, of_paths
        )
        for (budget, label, seed), search in searches.items()
        if search.task.name in outcome.results
    )
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.budget, run.label), []).append(run)
    comparison = Comparison(
        rows=tuple(summarise_runs(group) for group in groups.values()),
        paired=tuple(
            compare_pairs(group, groups[budget, baseline])
            for baseline in config.baselines
            for (budget, label), group in groups.items()
            if label != baseline and (budget, baseline) in groups
        ),
        runs=runs,
        failed={
            f"{label}, {budget} epochs, seed {seed}": outcome.failed[search.task.name]
            for (budget, label, seed), search in searches.items()
            if search.task.name in outcome.failed
        },
        missing=tuple(a.slug for a in space if a.index not in truth),
        num_architectures=len(space),
    )
    about = {
        "space": space.spec, "space_name": space.name, "pool": space.pool,
        "data": config.data, "data_fingerprint": data.fingerprint,
        "truth": config.truth, "seeds": list(range(config.first_seed, config.first_seed + config.seeds)),
        "budgets": list(config.all_budgets), "settings": parse_settings(config.settings),
        "methods": [{"label": s.label, "method": s.method, "settings": s.settings} for s in config.specs],
        "command": _command(config),
    }  # fmt: skip
    where = _environment([finished.result for finished in outcome.results.values()])
    write_tables(config.out, comparison.rows, comparison.paired, comparison.runs, about, where, comparison.missing)
    if len(config.all_budgets) > 1 and comparison.rows:
        draw_budgets(config.out, comparison.rows, f"{space.name} on {config.data}")
    return comparison


def _command(config: ComparisonConfig) -> str:
    """What makes the same searches, but for the folder and for the workers: they may differ before and after a kill.

    What the workers decide, the threads of a search, stands with its environment.
    """
    defaults = {field.name: field.default for field in fields(ComparisonConfig)} | {"device": Resources().device}
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    del settings["resources"], settings["out"]
    return command_line("bmsn.compare", settings | {"device": config.resources.device}, defaults)


def _environment(results: Sequence[SearchResult]) -> dict[str, list[Any]]:
    """Where the searches took place: of each field the values that occur, as they may stem from several machines."""
    names = dict.fromkeys(name for result in results for name in result.environment)
    return {name: list(dict.fromkeys(result.environment.get(name) for result in results)) for name in names}


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A search and what becomes of it.

    Attributes:
        task: the search; where all pairs are scored it is the same one whatever they are ranked by.
        rule: to rank its pairs by; None: not all are scored, and the ranking is the search's own.
    """

    task: SearchTask
    rule: RankRule | None

    def ranked(self, result: SearchResult) -> SearchResult:
        return result if self.rule is None else rerank(result, self.rule)


def _make_searches(
    config: ComparisonConfig, space: SearchSpace, data: ImageDataset
) -> dict[tuple[int, str, int], _Search]:
    """The searches by (budget, label, seed), in the order of the tables; each is checked before the first is begun."""
    images = Images(spec=config.data, generator_seed=None, fingerprint=data.fingerprint)
    common = {"fast_eval": True} | parse_settings(config.settings)
    per_image = sum(map(space.macs, space)) // len(space)
    searches: dict[tuple[int, str, int], _Search] = {}
    checked: list[FilledConfig] = []
    for budget in config.all_budgets:
        for spec in config.specs:
            taken = methods.get(spec.method).settings
            if "max_macs" in common and "max_macs" not in taken:  # it would be compared with others on other terms
                raise InputError(f"method {spec.label}: settings max_macs does not fit it; give it to single methods")
            unfit = set(OPTIONAL_SETTINGS) - taken
            if methods.get(spec.method).num_supernets(space) is not None:
                unfit.add("supernets")
            given = {k: v for k, v in common.items() if k not in unfit} | spec.settings
            for seed in range(config.first_seed, config.first_seed + config.seeds):
                try:
                    settings = SearchConfig(
                        space=space.spec, pool=config.pool, data=config.data, method=spec.method, epochs=budget,
                        seed=seed, device=config.resources.device, **given,
                    ).filled()  # fmt: skip
                    rule: RankRule | None = None
                    if settings.score == "pairs" and "rank_by" in taken:
                        rule, settings = settings.rank_by, replace(settings, rank_by="best")
                    first = seed == config.first_seed and budget == config.all_budgets[0]
                    if first and settings not in checked:
                        checked.append(settings)
                        SearchLoop(replace(settings, device="cpu"), data)
                except InputError as error:
                    raise InputError(f"method {spec.label}: {error}") from error
                task = SearchTask(
                    spec_label=spec.label, config=settings, images=images, cost=budget * per_image,
                    folder=config.out / "runs",
                )  # fmt: skip
                searches[budget, spec.label, seed] = _Search(task=task, rule=rule)
    return searches
