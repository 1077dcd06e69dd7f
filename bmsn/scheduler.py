"""Shares tasks out among processes of this machine, and does again what crashes or hangs."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Generic, Literal

import torch

from bmsn.errors import InputError, RunStopped
from bmsn.field_types import check_types
from bmsn.run import Interrupted
from bmsn.tasks import TOUCH_SECONDS, R, Store, W
from bmsn.trainer import resolve_device
from bmsn.worker import Worker

_LOG = logging.getLogger("bmsn.tasks")

ATTEMPTS = 3
# A task without `timeout` hangs after this many times what it should take: the dearest architecture of a space costs
# about 7 times the cheapest. Before it is trained, images are opened, which on a slow shared disk takes minutes.
HANG_FACTOR, HANG_SECONDS = 15, 600
SILENT_SECONDS = 6 * 3600  # where nothing says yet what it should take: longer than images take to open
START_SECONDS = 600  # for a process to start: it imports torch, perhaps from such a disk
_POLL_SECONDS = 1  # between looks at the clock, and at what other machines have finished


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What tasks are trained on; changes no result, but for rounding.

    Attributes:
        workers: processes; GPUs are given to them in turn, CPU cores are divided among them. With submitit: jobs.
        device: where to compute; auto: CUDA where there is a GPU.
        timeout: seconds that one network or search may take before it counts as hanging; None: 15 times the median of
            those finished so far, also before a restart or by others in the folder (of searches: those that differ in
            the seed alone), or 15 times what it takes at its own speed where that is more; at least ten minutes. Until
            one is finished its own speed alone tells: it has then six hours until its second report of progress, and
            six at least where its training is done. In any case a process has ten minutes to start.
        executor: processes on this machine, or jobs of a Slurm cluster.
        slurm: what submitit is told about the jobs, as timeout_min=600,gpus_per_node=1,slurm_partition=long.
    """

    workers: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: float | None = None
    executor: Literal["local", "submitit"] = "local"
    slurm: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.workers <= 4096:
            raise InputError(f"workers must be in [1, 4096]; got {self.workers}")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout must be above 0 seconds; got {self.timeout}")
        if self.slurm and self.executor != "submitit":
            raise InputError(f"slurm is for executor submitit; the executor is {self.executor}")


@dataclass(frozen=True, kw_only=True)
class TaskProgress:
    """How far all tasks are, those of other machines included.

    Attributes:
        finished, failed, total: numbers of tasks.
        seconds_left: at the speed so far; None: nothing to tell from yet.
    """

    finished: int
    failed: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[R]):
    """Results by task name, and for each task without one the reason."""

    results: dict[str, R]
    failed: dict[str, str]


class Tally(Generic[W, R]):
    """What is finished, and how long the rest takes at the speed so far; networks cost in proportion to their MACs.

    Attributes:
        seconds: that finished tasks took, by kind.
    """

    def __init__(self, tasks: Sequence[W], store: Store[W, R]) -> None:
        self.tasks, self.results = tasks, {t.name: r for t in tasks if (r := store.result(t)) is not None}
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        for task in tasks:
            if task.name in self.results:
                self.seconds[task.kind].append(self.results[task.name].seconds)
        self._macs = sum(task.macs for task in tasks)
        self._done = self._done_before = sum(task.macs for task in tasks if task.name in self.results)
        self._started = time.monotonic()

    @property
    def missing(self) -> list[W]:
        return [task for task in self.tasks if task.name not in self.results]

    def add(self, task: W, result: R) -> None:
        self.results[task.name] = result
        self.seconds[task.kind].append(result.seconds)
        self._done += task.macs
        _LOG.info("%d of %d: %s: %s", len(self.results), len(self.tasks), task.label, result.summary)

    def progress(self, failed: int = 0, macs_under_way: float = 0.0) -> TaskProgress:
        here = self._done - self._done_before + macs_under_way
        left = self._macs - self._done - macs_under_way
        seconds_left = left * (time.monotonic() - self._started) / here if here else None
        return TaskProgress(finished=len(self.results), failed=failed, total=len(self.tasks), seconds_left=seconds_left)


def run_local(
    tasks: Sequence[W],
    store: Store[W, R],
    resources: Resources,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[TaskProgress], None] = lambda progress: None,
) -> Outcome[R]:
    """Does what is not done yet in processes of this machine, and waits for what other machines have under way.

    A task whose process crashes, raises or hangs is tried twice more. A script that calls this needs the usual
    `if __name__ == "__main__":`, as its processes import it.

    Args:
        tasks: in the order in which they are begun.
        store: where their results are kept.
        resources: processes, device, time limit.
        should_stop: asked about once a second; True ends the processes and raises Interrupted.
        progress: called about once a second.
    Raises:
        InputError: the device, or images that a process finds to be others.
        RunStopped: processes cannot be started.
        OSError: the disk takes no more; what was finished before is kept.
        Interrupted: `should_stop` said so; what is finished is kept.
    """
    device = resolve_device(resources.device).type
    scheduler = _Scheduler(tasks, store, resources, device)
    try:
        while not scheduler.is_done:
            if should_stop():
                raise Interrupted(
                    f"interrupted with {len(scheduler.tally.results)} of {len(tasks)} {scheduler.store.noun}; "
                    "the same command goes on"
                )
            scheduler.advance()
            progress(scheduler.progress())
    finally:
        scheduler.close()
    return scheduler.outcome()


class _Scheduler(Generic[W, R]):
    """Hands tasks to workers, listens to them, replaces those that fail."""

    def __init__(self, tasks: Sequence[W], store: Store[W, R], resources: Resources, device: str) -> None:
        self.store, self.timeout, self.tally = store, resources.timeout, Tally(tasks, store)
        self.queue = self.tally.missing
        self.failed: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()
        self.has_started = False  # any process
        self.touched = time.monotonic()
        places = min(resources.workers, len(self.queue))
        # By all tasks, not by those that are left: a run that was killed goes on with as many threads as before.
        threads = max(1, torch.get_num_threads() // max(1, min(resources.workers, len(tasks))))
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        self.workers: list[Worker[W]] = [Worker(f"cuda:{n % gpus}" if gpus else "cpu", threads) for n in range(places)]

    @property
    def is_done(self) -> bool:
        return not self.queue and all(worker.task is None for worker in self.workers)

    def progress(self) -> TaskProgress:
        under_way = sum(worker.share * worker.task.macs for worker in self.workers if worker.task is not None)
        return self.tally.progress(len(self.failed), under_way)

    def outcome(self) -> Outcome[R]:
        for task in self.tally.missing:
            if (result := self.store.result(task)) is not None:  # another machine had more luck
                self.tally.add(task, result)
                del self.failed[task.name]
        self.store.remove_claims_of_the_dead(self.tally.tasks)
        return Outcome(results=self.tally.results, failed=self.failed)

    def advance(self) -> None:
        """One round: hand out, wait for a message or a second, see to what came and to what did not."""
        for worker in self.workers:
            if worker.task is None and (task := self._claim_next()) is not None:
                worker.begin(task)
        ready = wait([worker.connection for worker in self.workers if worker.connection is not None], _POLL_SECONDS)
        for worker in self.workers:
            if worker.connection in ready:
                self._listen(worker)
        now = time.monotonic()
        for worker in self.workers:
            if worker.task is not None and now - worker.since > (limit := self._limit(worker, worker.task)):
                what = "no result after" if worker.is_ready else "its process did not start within"
                self._fail(worker, f"hung: {what} {limit:.0f} s")
        if now - self.touched > TOUCH_SECONDS:
            self.store.touch(worker.task for worker in self.workers if worker.task is not None)
            self.touched = now

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
            if worker.task is not None:
                self.store.release(worker.task)

    def _limit(self, worker: Worker[W], task: W) -> float:
        """Seconds that the worker may take for what it does: its start, or its task."""
        if not worker.is_ready:
            return START_SECONDS
        seconds = self.tally.seconds[task.kind]
        # A search whose training is done scores: the pace of its training does not say how long.
        at_least = SILENT_SECONDS if not seconds and worker.share == 1 else HANG_SECONDS
        return time_limit(self.timeout, seconds, worker.pace, at_least)

    def _claim_next(self) -> W | None:
        """The first task that nobody has; those found finished by others are entered on the way."""
        for task in list(self.queue):
            claimed = self.store.claim(task)
            result = self.store.result(task)
            if claimed and result is None:
                self.queue.remove(task)
                return task
            if claimed:
                self.store.release(task)
            if result is not None:
                self.queue.remove(task)
                self.tally.add(task, result)
        return None

    def _listen(self, worker: Worker[W]) -> None:
        task = worker.task
        try:
            kind, content = worker.receive()
        except EOFError as end:
            reason = str(end)
            if not worker.is_ready:
                raise RunStopped(
                    f"{reason} before it could begin; a script that trains networks needs "
                    "`if __name__ == '__main__':` around what it does"
                ) from None
            self._fail(worker, reason)
            return
        match kind:
            case "ready":
                worker.is_ready, worker.since = True, time.monotonic()
                self.has_started = True
            case "share":
                worker.report(content)
            case "done":
                assert task is not None
                self.store.write(task, content)
                self.store.release(task)
                self.tally.add(task, content)
                worker.task = None
            case "input":
                raise InputError(content)
            case "disk":  # whatever is done next could not be kept either
                raise content
            case "stopped":  # it would stop there again
                self._fail(worker, content, final=True)
            case "error":
                self._fail(worker, content)

    def _fail(self, worker: Worker[W], reason: str, *, final: bool = False) -> None:
        """Puts the task back, or gives it up, and ends the process: it may be in any state."""
        task, worker.task = worker.task, None
        worker.stop()
        if task is None:
            return
        self.store.release(task)
        self.attempts[task.name] += 1
        attempt = self.attempts[task.name]
        _LOG.warning("%s: attempt %d of %d failed: %s", task.label, attempt, ATTEMPTS, reason)
        if attempt == ATTEMPTS and not self.has_started:
            raise RunStopped(f"{reason}, nor did any other")
        if final or attempt == ATTEMPTS:
            self.failed[task.name] = reason
        else:
            self.queue.append(task)


def time_limit(timeout: float | None, seconds: Sequence[float], pace: float | None, at_least: float) -> float:
    """Seconds after which a task counts as hanging.

    Args:
        timeout: what was asked for; None: what the rest says.
        seconds: that finished ones of its kind took.
        pace: seconds that it takes as a whole at its own speed, as it may run on a slower machine than those; None: not
            known yet.
        at_least: what `seconds` and `pace` do not undercut.
    """
    if timeout is not None:
        return timeout
    expected = [statistics.median(seconds)] if seconds else []
    if pace is not None:
        expected.append(pace)
    return max(at_least, HANG_FACTOR * max(expected)) if expected else SILENT_SECONDS
