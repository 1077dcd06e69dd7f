"""Saving that ends half-way: kills at every system call and at random, full disks, interrupts; order of the writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bmsn.checkpoint import (
    CheckpointStore,
    CheckpointWriteError,
    write_atomically,
)
from checkpoints import assert_is_state_of, file_size_limit, loaded_step, make_state, names

SYSCALLS = ["open", "write", "fsync", "close", "replace", "unlink"]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves, and no power cut among them: a busy disk would make them take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Stands for the end of the process: once raised, no later system call has an effect."""


@contextlib.contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException, forever: bool) -> Iterator[list[str]]:
    """Lets the system call of that number raise instead of acting, and with `forever` every later one as well."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == call or (forever and len(calls) > call):
                raise error
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for name in SYSCALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield calls


@pytest.mark.parametrize("step", [20, 30], ids=["same step again", "next step"])
def test_killed_at_any_system_call_the_state_is_that_before_or_after(step, no_sync, tmp_path, monkeypatch):
    reached = set()
    for call in range(1000):
        folder = tmp_path / str(call)
        store = CheckpointStore(folder)
        for earlier in (10, 20):
            store.save(earlier, make_state(earlier))
        with failing_at(monkeypatch, call, Killed(), forever=True) as calls, contextlib.suppress(Killed):
            store.save(step, make_state(step) | {"last": True})  # other bytes than those of the same step before
        assert loaded_step(folder) in {20, step}, f"after {calls}"
        if len(calls) <= call:
            break  # it came to its end
        reached.add(loaded_step(folder))
        assert not list(folder.glob(".bmsn-*")), "a leftover was not removed on opening"

        resumed = CheckpointStore(folder)  # and the run goes on from there as if nothing had been
        resumed.load_latest()
        resumed.save(40, make_state(40))
        assert loaded_step(folder) == 40
        assert len(names(folder)) == 3
    assert call > 20, "the system calls were not counted"
    assert reached == {20, step}


def test_killed_in_the_first_save_there_is_no_checkpoint_or_a_whole_one(no_sync, tmp_path, monkeypatch, caplog):
    reached = []
    for call in range(1000):
        folder = tmp_path / str(call)
        store = CheckpointStore(folder)
        with failing_at(monkeypatch, call, Killed(), forever=True) as calls, contextlib.suppress(Killed):
            store.save(10, make_state(10))
        reached.append(loaded_step(folder))
        if len(calls) <= call:
            break
    first = reached.index(10)
    assert reached == [None] * first + [10] * (len(reached) - first)
    assert "no manifest.json: not used: checkpoint-000000010.pt" in caplog.text


def test_with_a_full_disk_at_any_system_call_the_older_ones_stay_and_saving_works_later(no_sync, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failures = 0
    for call in range(1000):
        folder = tmp_path / str(call)
        store = CheckpointStore(folder)
        for step in (10, 20):
            store.save(step, make_state(step))
        with failing_at(monkeypatch, call, full, forever=False) as calls:
            error = None
            try:
                store.save(30, make_state(30))
            except CheckpointWriteError as raised:
                error = raised
        step = loaded_step(folder)
        if error is not None:
            failures += 1
            assert error.errno == errno.ENOSPC
            assert "step 30" in str(error)
            # what was written is given back, unless only the sync after the new manifest failed
            older = ["checkpoint-000000010.pt", "checkpoint-000000020.pt", "manifest.json"]
            assert step == 30 or (step == 20 and names(folder) == older)
            listed = json.loads((folder / "manifest.json").read_text())["checkpoints"]
            assert {entry["file"] for entry in listed} < set(names(folder))
        else:
            assert step == 30
            assert call >= len(calls) or calls[call] == "unlink", "an error was swallowed"
        store.save(30, make_state(30))
        assert loaded_step(folder) == 30
        if len(calls) <= call:
            break
    assert failures > 20


def test_with_a_file_that_the_system_refuses_to_grow_the_older_one_stays(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(10, make_state(10))
    before = names(tmp_path)
    with file_size_limit(100_000), pytest.raises(CheckpointWriteError, match="File too large"):
        store.save(20, make_state(20, size=100_000))
    assert names(tmp_path) == before
    assert loaded_step(tmp_path) == 10


def test_an_interrupt_while_torch_is_writing_passes_through_and_leaves_nothing(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    with failing_at(monkeypatch, 3, KeyboardInterrupt(), forever=False) as calls, pytest.raises(KeyboardInterrupt):
        store.save(10, make_state(10))
    assert calls[3] == "write"
    assert names(tmp_path) == []


# Forks savers, each of which saves as fast as it can, so that killing one costs no start of Python and torch.
SAVERS = """
import os, sys
from pathlib import Path
import torch
from bmsn.checkpoint import CheckpointStore
sys.path.insert(0, sys.argv[1])
from test_checkpoint import make_state

torch.set_num_threads(1)
folder, size = Path(sys.argv[2]), int(sys.argv[3])
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        store = CheckpointStore(folder / "checkpoints")
        latest = store.load_latest()
        step = 0 if latest is None else latest[0]
        log = os.open(folder / "saved", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        while True:
            step += 1
            store.save(step, make_state(step, size))
            os.write(log, b"%d\\n" % step)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def test_killed_with_signal_9_at_random_moments_no_completed_save_is_lost(tmp_path):
    size = 20_000
    moments = random.Random(0)
    command = [sys.executable, "-c", SAVERS, str(Path(__file__).parent), str(tmp_path), str(size)]
    leftovers = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as savers:
        for round_number in range(10):
            savers.stdin.write("go\n")
            savers.stdin.flush()
            pid = int(savers.stdout.readline())
            log = tmp_path / "saved"
            before = log.stat().st_size if log.exists() else 0
            deadline = time.monotonic() + 60
            while not log.exists() or log.stat().st_size == before:  # it has begun
                assert time.monotonic() < deadline, "nothing was saved"
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert savers.stdout.readline() == "gone\n"

            leftovers += bool(list((tmp_path / "checkpoints").glob(".bmsn-*")))
            saved = int(log.read_text().split()[-1])
            step, state = CheckpointStore(tmp_path / "checkpoints").load_latest()
            assert step in {saved, saved + 1}, f"round {round_number}"
            assert_is_state_of(step, state, size)
        savers.stdin.close()
    assert leftovers > 0, "no kill came while a file was being written"


def test_writing_atomically_replaces_the_content_and_keeps_it_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()

    def fail(file):
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_file_is_on_the_disk_before_its_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    with failing_at(monkeypatch, 1000, Killed(), forever=False) as calls:
        write_atomically(tmp_path / "file", b"content")
    order = [name for name in calls if name in ("write", "fsync", "replace")]
    assert order == ["write", "fsync", "replace", "fsync"]
