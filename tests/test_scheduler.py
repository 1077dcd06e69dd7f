"""What counts as hanging: a task, by the time that others took or by its own pace, and the start of a process."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
import types
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import bmsn
import bmsn.comparison
import bmsn.scheduler
import bmsn.worker
from bmsn.scheduler import Outcome, Resources, run_local
from bmsn.tasks import Images, Place, Task, TaskResult, TaskStore
from bmsn.worker import _perform
from searching import write_tiny_images, write_truth

TASKS = [
    Task(
        space="resnet14-cifar10", pool="max", architecture=slug, seed=0,
        images=Images(spec="npz:a.npz", generator_seed=None, fingerprint="ab" * 32), settings=bmsn.TrainingSettings(),
    )
    for slug in ("3-2-2", "4-1-2", "1-1-5")
]  # fmt: skip
RESULT = TaskResult(correct=30, total=40, loss=0.5, seconds=0.01, device="a CPU", torch="2.13")
LAST = TASKS[2].name


class SlowTask(Task):
    kind = "slow"


class FullTask(Task):
    def perform(self, place: Place, progress: Callable[[float], None]) -> TaskResult:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise bmsn.InputError("runs/a: cannot be written to: No space left on device") from error


Life = Callable[[Connection, int], None]  # of the n-th process of a test


@pytest.fixture
def processes(monkeypatch) -> Callable[[Life], None]:
    """Makes processes into threads that live by a script, and limits short: 0.5 s, or twice what a task should take."""
    monkeypatch.setattr(bmsn.scheduler, "HANG_FACTOR", 2)
    monkeypatch.setattr(bmsn.scheduler, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(bmsn.scheduler, "START_SECONDS", 1)
    monkeypatch.setattr(bmsn.scheduler, "_POLL_SECONDS", 0.02)

    def script(life: Life) -> None:
        begun: list[object] = []

        class Process:
            exitcode = None

            def __init__(self, *, target: object, args: tuple[Connection, str, int], daemon: bool) -> None:
                # A copy: the parent closes its own once the process runs.
                connection = Connection(os.dup(args[0].fileno()))
                begun.append(self)
                self.thread = threading.Thread(target=_live, args=(life, connection, len(begun)), daemon=True)

            def start(self) -> None:
                self.thread.start()

            def kill(self) -> None:
                """Its end of the pipe is closed by the caller, so it ends by itself."""

            join = kill

        context = types.SimpleNamespace(Pipe=Pipe, Process=Process)
        monkeypatch.setattr(bmsn.worker.multiprocessing, "get_context", lambda method: context)

    return script


def _live(life: Life, connection: Connection, number: int) -> None:
    try:
        life(connection, number)
    except (EOFError, OSError):
        pass  # stopped
    finally:
        connection.close()


def run(tmp_path: Path, tasks: list[Task] = TASKS) -> Outcome[TaskResult]:
    """With a limit of its own, for what is never found to hang."""
    end = time.monotonic() + 20
    return run_local(tasks, TaskStore(tmp_path), Resources(device="cpu"), should_stop=lambda: time.monotonic() > end)


def test_the_last_task_of_a_resumed_run_hangs(processes, tmp_path, caplog):
    """In the process that resumes, none has finished: the limit is by the results in the folder."""
    for task in TASKS[:2]:
        TaskStore(tmp_path).write(task, RESULT)

    def life(connection: Connection, number: int) -> None:
        connection.send(("ready", None))
        assert connection.recv() == TASKS[2]
        connection.recv()

    processes(life)
    outcome = run(tmp_path)
    assert set(outcome.results) == {task.name for task in TASKS[:2]}
    assert outcome.failed == {LAST: "hung: no result after 0 s"}
    assert [f"attempt {n} of 3 failed" in line for n, line in enumerate(caplog.messages, 1)] == [True] * 3
    assert not list(tmp_path.glob("*.claim"))


def test_a_disk_that_takes_no_more_ends_it_at_once(processes, tmp_path):
    """The others would be trained for nothing. What is bad input elsewhere is no fault of the input then."""
    begun = []

    def life(connection: Connection, number: int) -> None:
        begun.append(number)
        connection.send(("ready", None))
        connection.send(_perform(connection.recv(), Place(torch.device("cpu"), {}), connection))

    processes(life)
    tasks = [FullTask(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)}) for task in TASKS]
    with pytest.raises(OSError, match="runs/a: cannot be written to") as stopped:
        run(tmp_path, tasks)
    assert stopped.value.errno == errno.ENOSPC
    assert begun == [1]
    assert not list(tmp_path.glob("*.claim"))


def test_the_first_task_of_all_hangs_in_its_training(processes, tmp_path):
    """By its own pace, 0.1 s for a fifth of it, it would take 0.5 s; the second attempt does not hang."""

    def life(connection: Connection, number: int) -> None:
        connection.send(("ready", None))
        connection.recv()
        for share in (0.1, 0.3):
            connection.send(("share", share))
            time.sleep(0.1)
        if number == 1:
            connection.recv()
        connection.send(("done", RESULT))

    processes(life)
    outcome = run(tmp_path, TASKS[:1])
    assert outcome.results == {TASKS[0].name: RESULT}
    assert not outcome.failed


def test_the_first_task_of_all_hangs_before_it_says_anything(processes, monkeypatch, tmp_path, caplog):
    """Nothing tells then how long it takes: in the first process it opens its images for ever."""
    monkeypatch.setattr(bmsn.scheduler, "SILENT_SECONDS", 0.3)

    def life(connection: Connection, number: int) -> None:
        connection.send(("ready", None))
        connection.recv()
        if number == 1:
            connection.recv()
        connection.send(("done", RESULT))

    processes(life)
    assert run(tmp_path, TASKS[:1]).results == {TASKS[0].name: RESULT}
    assert "hung: no result after 0 s" in caplog.text


@pytest.mark.parametrize("known", [True, False], ids=["slower than others", "its end unknown"])
def test_a_task_that_is_slow_does_not_hang(known, processes, tmp_path, caplog):
    """Known: others took 0.01 s, this one 0.8 s, as it says. Not known: it is trained at once and tested for long."""
    if known:
        TaskStore(tmp_path).write(TASKS[0], RESULT)

    def life(connection: Connection, number: int) -> None:
        connection.send(("ready", None))
        connection.recv()
        for share in range(1, 9):
            connection.send(("share", share / 8))
            time.sleep(0.1 if known else 0.01)
        time.sleep(0.0 if known else 0.8)
        connection.send(("done", RESULT))
        connection.recv()

    processes(life)
    outcome = run(tmp_path, TASKS[:2] if known else TASKS[1:2])
    assert TASKS[1].name in outcome.results
    assert "failed" not in caplog.text


def test_tasks_of_another_kind_say_nothing(processes, tmp_path, caplog):
    """One that takes no time, as a ranking by MACs, and one that takes longer than any limit by it."""

    TaskStore(tmp_path).write(TASKS[0], RESULT)
    slow = SlowTask(**{field.name: getattr(TASKS[1], field.name) for field in dataclasses.fields(Task)})

    def life(connection: Connection, number: int) -> None:
        connection.send(("ready", None))
        connection.recv()
        time.sleep(0.8)
        connection.send(("done", RESULT))
        connection.recv()

    processes(life)
    assert set(run(tmp_path, [TASKS[0], slow]).results) == {TASKS[0].name, slow.name}
    assert "failed" not in caplog.text


def test_a_process_that_hangs_at_its_start_takes_one_task_with_it(processes, tmp_path):
    """The first process raises in its second task; those that are to take it up again never say that they are ready."""

    def life(connection: Connection, number: int) -> None:
        if number == 1:
            connection.send(("ready", None))
            connection.recv()
            connection.send(("done", RESULT))
            connection.recv()
            connection.send(("error", "out of luck"))
        connection.recv()  # a task
        connection.recv()

    processes(life)
    outcome = run(tmp_path, TASKS[:2])
    assert outcome.results == {TASKS[0].name: RESULT}
    assert outcome.failed == {TASKS[1].name: "hung: its process did not start within 1 s"}


def test_processes_of_which_none_starts_end_the_run(tmp_path, monkeypatch, caplog):
    """Real ones: no process imports torch in a hundredth of a second."""
    monkeypatch.setattr(bmsn.scheduler, "START_SECONDS", 0.01)
    monkeypatch.setattr(bmsn.scheduler, "_POLL_SECONDS", 0.02)
    with pytest.raises(bmsn.RunStopped, match=r"^hung: its process did not start within 0 s, nor did any other$"):
        run(tmp_path)
    assert sum("failed: hung" in line for line in caplog.messages) >= 3
    assert not list(tmp_path.glob("*.claim"))


def test_searches_of_one_kind_differ_in_the_seed_alone(tmp_path, monkeypatch):
    given: list[bmsn.comparison.SearchTask] = []

    def run_tasks(tasks, store, resources, *arguments):
        given.extend(tasks)
        assert resources.timeout is None
        return Outcome(results={}, failed={})

    monkeypatch.setattr(bmsn.comparison, "run_tasks", run_tasks)
    write_truth(tmp_path / "truth.csv", bmsn.SearchSpace.named("resnet14-cifar10"), missing="2-1-4")
    bmsn.run_comparison(bmsn.ComparisonConfig(
        methods="spos,macs", space="resnet14-cifar10", data=write_tiny_images(tmp_path / "tiny.npz"), budgets="1,2",
        seeds=3, truth=str(tmp_path / "truth.csv"), settings="batch_size=16", out=tmp_path / "compare",
        resources=Resources(device="cpu"),
    ))  # fmt: skip
    kinds = {(task.config.method, task.config.epochs): task.kind for task in given}
    assert len(given) == 12
    assert len(set(kinds.values())) == 4
    assert all(task.kind == kinds[task.config.method, task.config.epochs] for task in given)
