"""Runs tasks where `Resources` says: processes of this machine, or jobs of a Slurm cluster that share the folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from bmsn.errors import InputError
from bmsn.run import Interrupted
from bmsn.scheduler import Outcome, Resources, Tally, TaskProgress, run_local
from bmsn.tasks import R, Store, W

_POLL_SECONDS = 5  # between looks at jobs and at the folder


def run_tasks(
    tasks: Sequence[W],
    store: Store[W, R],
    resources: Resources,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[TaskProgress], None] = lambda progress: None,
) -> Outcome[R]:
    """Does what is not done yet; arguments and errors are those of `run_local`.

    With `executor="submitit"`, each of `workers` jobs takes one task after the other from the folder, which all
    machines of the cluster must see.

    Raises:
        InputError: also for submitit where it is not installed, and for settings that it does not know.
    """
    run = _run_on_cluster if resources.executor == "submitit" else run_local
    return run(tasks, store, resources, should_stop, progress)


def _run_on_cluster(
    tasks: Sequence[W],
    store: Store[W, R],
    resources: Resources,
    should_stop: Callable[[], bool],
    progress: Callable[[TaskProgress], None],
) -> Outcome[R]:
    try:
        import submitit
    except ImportError as error:
        raise InputError("executor submitit needs the submitit package: pip install 'bmsn[submitit]'") from error
    tally = Tally(tasks, store)
    executor = submitit.AutoExecutor(folder=str(store.folder / "jobs"))
    try:
        executor.update_parameters(name="bmsn", **slurm_parameters(resources.slurm))
    except (NameError, TypeError, ValueError) as error:
        raise InputError(f"slurm: {error}") from error
    here = replace(resources, executor="local", workers=1, slurm="")
    num_jobs = min(resources.workers, len(tally.missing))
    jobs = [executor.submit(run_local, tasks, store, here) for _ in range(num_jobs)]
    while not all(job.done() for job in jobs):
        if should_stop():
            for job in jobs:
                job.cancel()
            raise Interrupted(f"interrupted: {num_jobs} jobs are cancelled; the same command goes on")
        _look(tally, store)
        progress(tally.progress())
        time.sleep(_POLL_SECONDS)
    _look(tally, store)
    progress(tally.progress())
    reasons: dict[str, str] = {}
    ended = []
    for job in jobs:
        if (failure := job.exception()) is not None:
            ended.append(f"job {job.job_id}: {failure}")
        else:
            reasons |= job.result().failed
    without = "; ".join(ended) or "no job did it"
    return Outcome(results=tally.results, failed={task.name: reasons.get(task.name, without) for task in tally.missing})


def _look(tally: Tally[W, R], store: Store[W, R]) -> None:
    for task in tally.missing:
        if (result := store.result(task)) is not None:
            tally.add(task, result)


def slurm_parameters(text: str) -> dict[str, int | str]:
    """`timeout_min=600,slurm_partition=long` as the keyword arguments of submitit's `update_parameters`."""
    parameters: dict[str, int | str] = {}
    for setting in filter(None, text.split(",")):
        name, equals, value = setting.partition("=")
        if not (name.strip().isidentifier() and equals and value.strip()):
            raise InputError(f"slurm must be name=value,name=value; got {setting!r}")
        parameters[name.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    return parameters
