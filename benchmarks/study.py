"""What helps a search to rank: settings side by side at equal budgets, each with every rule of `--rank-by`.

    PYTHONPATH=. python benchmarks/study.py --truth benchmarks/results/synthetic_default.csv \\
        --budgets 6,12,24 --seeds 5 --workers 2 --out runs/study

Each setting is a method as `bmsn.compare` takes it, and is searched with each seed at each budget (epochs of the
training half; several of them tell whether to stop earlier). One search scores all (architecture, supernet) pairs and
is ranked by every rule, so rules cost nothing. The table, OUT/study.csv and in Markdown on stdout, has for each budget,
setting and rule, as means over seeds with 95 % bootstrap intervals: tau-b with the truth, tau-b with MACs partialled
out, regret of the best of the top 1 and of the top 3 in points, and tau-b less that of the baseline, seed by seed. The
ranking by MACs stands beside them. Budgets count epochs alone; the last column has all images trained on, those of
`adapt` included, which is to be compared with others at a budget that is larger by as much. OUT/comparison.* is
`bmsn.compare`'s own output over the same searches.

Killed at any moment, the same command goes on: finished searches are kept in OUT/runs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from bmsn import methods
from bmsn.accuracy_table import write_csv
from bmsn.command import ProgressLines, parse_flags, run_command, until_signalled
from bmsn.comparison import Comparison, ComparisonConfig, run_comparison
from bmsn.comparison_figures import Summary
from bmsn.method_spec import MethodSpec, parse_methods
from bmsn.rank_rules import RANK_RULES
from bmsn.scheduler import Resources

# For the built-in set, of 7 classes and 78 steps an epoch: one change at a time, then those that go together. The
# supernets of `mixture` and `few-shot` begin as copies of one.
METHODS = ",".join((
    "mixture", "spos", "few-shot", "mixture:split_after=0,label=own weights",
    "mixture:supernets=4,label=4 supernets", "mixture:supernets=4,split_after=0,label=4 supernets own weights",
    "few-shot:split_after=0,label=few-shot own weights", "mixture:refresh_every=78,label=refreshed every epoch",
    "mixture:schedule=temperature,label=tau linear", "mixture:start_accuracy=0.14,label=a from chance",
    "mixture:average_last=0.2,label=averaged", "mixture:adapt=5,label=adapted",
    "mixture:refresh_every=78,average_last=0.2,label=refreshed averaged",
    "mixture:refresh_every=78,average_last=0.2,adapt=5,label=refreshed averaged adapted",
    "spos:average_last=0.2,label=spos averaged", "spos:adapt=5,label=spos adapted",
    "mixture:draw=architectures,label=architectures equally often", "spos:draw=architectures,label=spos architectures",
))  # fmt: skip
PROGRAM = "benchmarks/study.py"
FIGURES = {  # name in `bmsn.comparison_figures.FIGURES`: heading, digits
    "kendall_tau_b": ("tau-b", 3),
    "partial_kendall": ("tau-b given MACs", 3),
    "regret_top1": ("regret top 1", 2),
    "regret_top3": ("regret top 3", 2),
}
_PARTS = ("", "_low", "_high", "_n")
_BETWEEN = " | "  # setting and rule in the labels of the comparison


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings and rules of `--rank-by` against the truth, at equal budgets.

    Attributes:
        methods: the settings, as `bmsn.compare --methods`.
        space: name of a search space; None: resnet14-cifar10 on synthetic data, else required.
        data: images as scheme:path.
        baseline: setting that the others are compared with, ranked as assigned; None: the first.
        budgets: epochs of the training half, as 6,12,24.
        seeds: searches of each setting at each budget.
        first_seed: the smallest of the seeds.
        truth: stand-alone accuracies: "paper" or a CSV file.
        settings: of all methods that take them, as batch_size=64.
        out: folder of searches and tables.
        resources: what the searches run on.
    """

    methods: str = METHODS
    baseline: str | None = None
    space: str | None = None
    data: str = "synthetic"
    budgets: str
    seeds: int = 5
    first_seed: int = 0
    truth: str
    settings: str = ""
    out: Path
    resources: Resources = field(default_factory=Resources)

    def comparison(self) -> ComparisonConfig:
        """All settings with all rules, as methods of one comparison."""
        specs = parse_methods(self.methods)
        return ComparisonConfig(
            methods=",".join(_as_text(spec, rule) for spec in specs for rule in _rules(spec)),
            baseline=_label(_plain(self.baseline or specs[0].label), "assigned"),
            space=self.space, data=self.data, budgets=self.budgets, seeds=self.seeds, first_seed=self.first_seed,
            truth=self.truth, settings=self.settings, out=self.out, resources=self.resources,
        )  # fmt: skip


def _rules(spec: MethodSpec) -> Sequence[str]:
    """Those that make a difference at the same cost: none does where an architecture has one supernet alone, and where
    it is adapted each of its supernets would have to be.
    """
    one = spec.method == "spos" or spec.settings.get("supernets") == 1 or spec.settings.get("adapt")
    return RANK_RULES if "rank_by" in methods.get(spec.method).settings and not one else ("assigned",)


def _as_text(spec: MethodSpec, rule: str) -> str:
    given = spec.settings | {"rank_by": rule}  # so that the label holds, whatever `settings` say
    if len(_rules(spec)) > 1:
        given["score"] = "pairs"
    elif spec.settings.get("adapt"):
        given["score"] = "best"  # else each architecture is adapted in all supernets, and one of them counts
    given["label"] = _label(_plain(spec.label), rule)
    return f"{spec.method}:" + ",".join(f"{name}={value}" for name, value in given.items())


def _plain(label: str) -> str:
    """A label that can stand in a list of methods."""
    return label.replace(",", " ")


def _label(setting: str, rule: str) -> str:
    return f"{setting}{_BETWEEN}{rule}"


def table(comparison: Comparison) -> list[dict[str, str]]:
    """One row for each budget, setting and rule; cells by column of study.csv."""
    differences = {(pair.budget, pair.label): pair.figures["kendall_tau_b"] for pair in comparison.paired}
    rows = []
    for row in comparison.rows:
        setting, _, rule = row.label.partition(_BETWEEN)
        cells = {"budget": str(row.budget), "setting": setting, "rule": rule or "-", "seeds": str(row.num_runs)}
        for name, (_, digits) in FIGURES.items():
            cells |= _cells(name, row.figures[name], digits)
        cells |= _cells("tau_b_difference", differences.get((row.budget, row.label)), 3)
        rows.append(cells | {"training_images": f"{row.costs['training_images']:.0f}"})
    return rows


def _cells(name: str, summary: Summary | None, digits: int) -> dict[str, str]:
    """Mean, interval and number of seeds; empty where there are none."""
    low, high = (summary and summary.bootstrap) or (None, None)
    values = (summary.mean if summary else None, low, high)
    texts = ["" if value is None else f"{value:z.{digits}f}" for value in values]
    return dict(zip((name + part for part in _PARTS), [*texts, str(summary.n if summary else 0)], strict=True))


def to_markdown(rows: Sequence[Mapping[str, str]], baseline: str) -> str:
    """The table for people."""
    names = {name: heading for name, (heading, _) in FIGURES.items()}
    names["tau_b_difference"] = f"tau-b less {baseline}"
    head = ["budget", "setting", "rule", "seeds", *names.values(), "images trained"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        figures = [
            (row[name] or "-") + (f" [{row[name + '_low']}, {row[name + '_high']}]" if row[name + "_low"] else "")
            for name in names
        ]
        lines.append([row["budget"], row["setting"], row["rule"], row["seeds"], *figures, row["training_images"]])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def run(study: Study) -> tuple[str, Mapping[str, str]]:
    """Searches what is not finished yet and writes the table; returns it, and the searches that failed."""
    config = study.comparison()
    comparison = until_signalled(
        lambda stop: run_comparison(config, should_stop=stop, progress=ProgressLines("searches"))
    )
    rows = table(comparison)
    title = (
        f"{study.space or 'the default space'} on {study.data}, truth {study.truth}, seeds {study.first_seed} to "
        f"{study.first_seed + study.seeds - 1}, settings {study.settings or 'none'}; baseline {config.baseline}; 95 %"
    )
    if rows:
        write_csv(study.out / "study.csv", title, list(rows[0]), rows)
    return to_markdown(rows, str(config.baseline)), comparison.failed


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(
        PROGRAM,
        lambda: run(
            parse_flags(tyro.conf.OmitArgPrefixes[Study], PROGRAM, arguments, description=str(__doc__).split("\n")[0])
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
