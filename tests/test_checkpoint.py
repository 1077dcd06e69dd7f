"""Checkpoints under kills, damage and full disks; the environment that a bit-exact resume depends on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bmsn.checkpoint
from bmsn.checkpoint import (
    CheckpointStore,
    CheckpointWriteError,
    environment,
    environment_differences,
    write_atomically,
)
from bmsn.errors import InputError

SYSCALLS = ["open", "write", "fsync", "close", "replace", "unlink"]


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    """A state that its step determines."""
    values = torch.arange(size, dtype=torch.float64) * 1.5 + step
    return {"weights": values.float(), "nested": {"momentum": [values, values + 1], "step": step}}


def assert_is_state_of(step: int, state: dict[str, Any], size: int = 64) -> None:
    expected = make_state(step, size)
    assert torch.equal(state["weights"], expected["weights"])
    assert all(map(torch.equal, state["nested"]["momentum"], expected["nested"]["momentum"]))
    assert state["nested"]["step"] == step


def loaded_step(folder: Path) -> int | None:
    """The step that a new process would start from; its state is checked."""
    latest = CheckpointStore(folder).load_latest()
    if latest is None:
        return None
    assert_is_state_of(*latest)
    return latest[0]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves, and no power cut among them: a busy disk would make them take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_every_kind_of_value_comes_back_with_its_bits(tmp_path):
    generator = np.random.default_rng(0)
    arena = torch.randn(4, 1000)
    state = {
        "tensor": torch.randn(3, 5).bfloat16(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "row": arena[1],
        "array": generator.standard_normal((3, 4)),
        "fortran": np.asfortranarray(generator.standard_normal((3, 4))),
        "zero_dims": np.array(2.5),
        "uint8": np.arange(5, dtype=np.uint8),
        "scalar": np.float32(0.1),
        "count": np.int64(2**40),
        "float": 0.1 + 0.2,
        "int": 2**70,
        "flags": [True, None, "text", (1, 2.0)],
        "by_number": {7: torch.tensor(float("nan"))},
    }
    CheckpointStore(tmp_path).save(3, state)
    step, loaded = CheckpointStore(tmp_path).load_latest()

    assert step == 3
    assert list(loaded) == list(state)
    for name in ("tensor", "channels_last", "parameter", "row"):
        assert torch.equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype
    assert loaded["channels_last"].is_contiguous(memory_format=torch.channels_last)
    for name in ("array", "fortran", "zero_dims", "uint8"):
        assert loaded[name].numpy().dtype == state[name].dtype
        assert np.array_equal(loaded[name].numpy(), state[name])
        assert loaded[name].shape == state[name].shape
    assert loaded["scalar"] == float(np.float32(0.1))
    assert type(loaded["count"]) is int
    assert (loaded["count"], loaded["float"], loaded["int"]) == (2**40, 0.1 + 0.2, 2**70)
    assert loaded["flags"] == [True, None, "text", (1, 2.0)]
    assert loaded["by_number"][7].isnan()


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    path = CheckpointStore(tmp_path).save(0, {"row": torch.zeros(1000, 1000)[3]})
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [object()]}, r"state\['a'\]\[0\]"),
        ({"a": {(1, 2): 0}}, r"state\['a'\]"),
        ({"a": np.array(["text"])}, r"state\['a'\]"),
        ({"a": signal.SIGTERM}, r"state\['a'\]"),  # an IntEnum: torch.save takes it, a safe torch.load does not
    ],
    ids=["object", "key", "array of text", "enum"],
)
def test_a_value_that_could_not_be_loaded_again_is_refused_when_saving(value, place, tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=place):
        store.save(1, value)
    assert names(tmp_path) == []


def test_the_last_two_are_kept_and_the_manifest_describes_them(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.load_latest() is None
    paths = [store.save(step, make_state(step)) for step in (0, 10, 20)]
    assert paths[-1].name == "checkpoint-000000020.pt"
    assert names(tmp_path) == ["checkpoint-000000010.pt", "checkpoint-000000020.pt", "manifest.json"]
    entries = json.loads((tmp_path / "manifest.json").read_text())["checkpoints"]
    for entry, path in zip(entries, paths[1:], strict=True):
        content = path.read_bytes()
        assert entry == {
            "file": path.name,
            "step": int(path.name[11:20]),
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert loaded_step(tmp_path) == 20


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 1, not 0"):
        CheckpointStore(tmp_path, keep=0)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit_of_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(make_state(20)["weights"].numpy().tobytes()) + 5] ^= 1  # torch.load would not notice
    path.write_bytes(content)


def overwrite_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "bit flipped": (flip_a_bit_of_a_tensor, "sha256"),
    "emptied": (lambda path: os.truncate(path, 0), "0 bytes instead of"),
    "zeros": (overwrite_with_zeros, "sha256"),
    "missing": (os.unlink, "missing"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(damage, reason, tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        path = store.save(step, make_state(step))
    damage(path)
    resumed = CheckpointStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        step, state = resumed.load_latest()
    assert step == 10
    assert_is_state_of(10, state)
    (message,) = caplog.messages
    assert str(path) in message
    assert reason in message

    resumed.save(25, make_state(25))  # the run goes on: the damaged one must not push out the good one
    assert names(tmp_path) == ["checkpoint-000000010.pt", "checkpoint-000000025.pt", "manifest.json"]
    assert loaded_step(tmp_path) == 25


def test_a_file_with_the_right_sha256_that_runs_code_when_loaded_is_not_loaded(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        path = store.save(step, make_state(step))
    torch.save({"step": 20, "state": {"weights": subprocess.Popen}}, path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["checkpoints"][1] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert loaded_step(tmp_path) == 10
    assert "Popen" in caplog.text


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        os.truncate(store.save(step, make_state(step)), 7)
    with pytest.raises(InputError, match=r"000000020\.pt: 7 bytes.*000000010\.pt: 7 bytes"):
        CheckpointStore(tmp_path).load_latest()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"checkpoints": [{"file": "../x", "step": 1, "size": 1, "sha256": ""}]}', '{"checkpoints": [{}]}'],
    ids=["empty", "torn", "list", "path outside", "no fields"],
)
def test_a_damaged_manifest_is_an_error(content, tmp_path):
    CheckpointStore(tmp_path).save(10, make_state(10))
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        CheckpointStore(tmp_path)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder for checkpoints"):
        CheckpointStore(tmp_path / "file")


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


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow past the limit: as on a full disk, a write is cut short and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_environment_is_plain_and_names_what_bit_exactness_depends_on():
    now = environment()
    assert json.loads(json.dumps(now)) == now
    assert now["torch"] == torch.__version__
    assert now["threads"] == torch.get_num_threads()
    assert now["instruction_set"].split()[0] == torch.backends.cpu.get_cpu_capability() == now["cpu_capability"]
    assert now["cuda_device"] is None or torch.cuda.is_initialized()
    assert environment_differences(now, now) == []


def test_environment_names_the_commit_of_a_checkout_and_no_other(tmp_path, monkeypatch):
    def run(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "bmsn").mkdir()
    source = tmp_path / "bmsn" / "checkpoint.py"
    source.write_text("")
    monkeypatch.setattr(bmsn.checkpoint, "__file__", str(source))
    assert environment()["git_commit"] is None
    run("init", "-q")
    run("add", ".")
    run("commit", "-q", "-m", "all")
    commit = run("rev-parse", "HEAD")
    assert environment()["git_commit"] == commit
    source.write_text("changed")
    assert environment()["git_commit"] == f"{commit}-dirty"


def test_environment_differences_are_the_three_that_matter():
    now = environment()
    other = now | {"threads": 64, "instruction_set": "AVX2", "torch": "2.0", "numpy": "1.0", "cpu_model": "another"}
    other.pop("git_commit")
    assert environment_differences(other, now) == [
        f"threads: 64 when it was saved, {now['threads']} now",
        f"instruction set: AVX2 when it was saved, {now['instruction_set']} now",
        f"torch version: 2.0 when it was saved, {now['torch']} now",
    ]
