"""Tasks and their folder: what a name depends on, who may claim what, damaged results, time limit and time left."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import bmsn
import bmsn.tasks
from bmsn.scheduler import Tally, time_limit
from bmsn.tasks import Images, Task, TaskResult, TaskStore
from searching import write_tiny_images

TASK = Task(
    space="resnet14-cifar10", pool="max", architecture="3-2-2", seed=0,
    images=Images(spec="npz:a.npz", generator_seed=None, fingerprint="ab" * 32),
    settings=bmsn.TrainingSettings(milestones=(0.5, 0.75)),
)  # fmt: skip
RESULT = TaskResult(correct=30, total=40, loss=0.5, seconds=2.0, device="a CPU", torch="2.13")


def test_a_name_depends_on_all_that_determines_the_result_and_on_nothing_else():
    others = [
        dataclasses.replace(TASK, space="resnet20-cifar10"),
        dataclasses.replace(TASK, pool="avg"),
        dataclasses.replace(TASK, architecture="2-2-3"),
        dataclasses.replace(TASK, seed=1),
        dataclasses.replace(TASK, images=dataclasses.replace(TASK.images, fingerprint="cd" * 32)),
        *(
            dataclasses.replace(TASK, settings=dataclasses.replace(TASK.settings, **change))
            for change in (
                dict(epochs=1), dict(batch_size=2), dict(lr=0.2), dict(min_lr=0.01), dict(momentum=0.5),
                dict(weight_decay=0.0), dict(milestones=(0.5,)), dict(factor=0.5),
            )
        ),
    ]  # fmt: skip
    assert len({TASK.name, *(task.name for task in others)}) == 14
    assert TASK.name.startswith("3-2-2-seed0-")
    moved = dataclasses.replace(TASK, images=dataclasses.replace(TASK.images, spec="npz:/elsewhere/a.npz"))
    assert moved.name == TASK.name


def owner_of_another_process(store: TaskStore, pid: int, machine: str | None = None) -> None:
    """The claim of a process with this id, as that process would have left it."""
    own = json.loads((store.folder / f"{TASK.name}.claim").read_text())
    other = own | {"token": "another", "pid": pid, "machine": machine or own["machine"]}
    (store.folder / f"{TASK.name}.claim").write_text(json.dumps(other))


def test_a_claim_holds_while_its_owner_lives(tmp_path):
    store = TaskStore(tmp_path)
    assert store.claim(TASK)
    assert not store.claim(TASK)
    assert not TaskStore(tmp_path).claim(TASK)
    store.release(TASK)
    assert store.claim(TASK)
    owner_of_another_process(store, pid=1)  # lives as long as the machine is up
    assert not store.claim(TASK)
    store.release(TASK)  # not ours any more
    assert (tmp_path / f"{TASK.name}.claim").exists()


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store = TaskStore(tmp_path)
    assert store.claim(TASK)
    owner_of_another_process(store, ended.pid)
    assert store.claim(TASK)
    owner_of_another_process(store, os.getpid())  # in a restarted container the same id comes back
    assert store.claim(TASK)
    assert [path.name for path in tmp_path.iterdir()] == [f"{TASK.name}.claim"]


@pytest.mark.parametrize("content", ["another machine", "half written"])
def test_a_claim_that_nobody_touches_is_taken_over_in_time(tmp_path, content):
    store = TaskStore(tmp_path)
    assert store.claim(TASK)
    path = tmp_path / f"{TASK.name}.claim"
    if content == "another machine":
        owner_of_another_process(store, 2**22 + 1, machine="elsewhere")
    else:
        path.write_text('{"machine": "el')
    assert not store.claim(TASK)
    stamp = path.stat().st_mtime
    os.utime(path, (stamp - bmsn.tasks.STALE_SECONDS - 5,) * 2)
    store.touch([TASK])
    assert not store.claim(TASK)
    os.utime(path, (stamp - bmsn.tasks.STALE_SECONDS - 5,) * 2)
    assert store.claim(TASK)


@pytest.mark.parametrize(
    "content",
    [b'{"key": ', b"[]", b"\xff\xfe", json.dumps({"key": {}, "result": dataclasses.asdict(RESULT)}).encode()],
    ids=["cut", "list", "bytes", "another task's"],
)
def test_a_damaged_result_is_said_and_done_again(tmp_path, caplog, content):
    store = TaskStore(tmp_path)
    assert store.result(TASK) is None
    store.write(TASK, RESULT)
    assert store.result(TASK) == RESULT
    assert RESULT.accuracy == 75
    (tmp_path / f"{TASK.name}.json").write_bytes(content)
    assert store.result(TASK) is None
    assert "damaged, so the task is done again" in caplog.text


def test_images_of_another_content_are_refused(tmp_path):
    spec = write_tiny_images(tmp_path / "tiny.npz")
    images = Images(spec=spec, generator_seed=None, fingerprint="0" * 64)
    with pytest.raises(bmsn.InputError, match=r"must be 000000000000\.\.\.; got [0-9a-f]{12}\.\.\.: it is not the set"):
        images.open(bmsn.SearchSpace.named("resnet14-cifar10"))


def test_a_task_hangs_after_15_times_what_it_should_take_and_ten_minutes():
    assert time_limit(7.5, [1000.0], 1000.0, 600) == 7.5
    assert time_limit(None, [], None, 600) == 6 * 3600
    assert time_limit(None, [], 200.0, 5000) == 5000
    assert time_limit(None, [0.5, 1.0, 9.0], 30.0, 600) == 600
    assert time_limit(None, [100.0, 10000.0, 200.0], None, 600) == 3000
    assert time_limit(None, [100.0], 200.0, 600) == time_limit(None, [], 200.0, 600) == 3000
    assert time_limit(None, [200.0], 100.0, 600) == 3000


def test_time_left_is_in_proportion_to_macs(tmp_path, monkeypatch):
    """Before: [1,1,5], 12.4 MMACs. In 10 s: [5,1,1], 62.8 MMACs, and a quarter of [3,2,2], 26.7 MMACs."""
    store = TaskStore(tmp_path)
    tasks = [dataclasses.replace(TASK, architecture=slug) for slug in ("1-1-5", "5-1-1", "3-2-2", "2-2-3")]
    macs = [
        bmsn.SearchSpace.named(task.space).macs(bmsn.SearchSpace.named(task.space).find(task.architecture))
        for task in tasks
    ]
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    store.write(tasks[0], RESULT)
    tally = Tally(tasks, store)
    assert tally.progress().seconds_left is None
    assert tally.missing == tasks[1:]
    now += 10
    tally.add(tasks[1], RESULT)
    progress = tally.progress(failed=1, macs_under_way=macs[2] / 4)
    assert (progress.finished, progress.failed, progress.total) == (2, 1, 4)
    assert progress.seconds_left == pytest.approx(10 * (0.75 * macs[2] + macs[3]) / (macs[1] + 0.25 * macs[2]))
