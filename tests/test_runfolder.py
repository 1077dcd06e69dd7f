"""The run folder: one living process at a time, its configuration, metrics that a kill cannot spoil, signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bmsn.errors import InputError
from bmsn.runfolder import MetricsFile, RunFolder, SignalFlag, read_metrics
from checkpoints import file_size_limit

CONFIG = {"space": "resnet14-cifar10", "supernets": 2, "lr": 1e-5, "seed": None, "optimiser": {"momentum": 0.9}}


def write_lines(path: Path, steps: list[int]) -> None:
    with MetricsFile(path) as metrics:
        for step in steps:
            metrics.write({"step": step})


def test_a_new_run_stores_its_configuration_in_order_below_new_parents(tmp_path):
    with RunFolder.create(tmp_path / "a" / "b", CONFIG) as folder:
        assert list(yaml.safe_load(folder.config_path.read_text()).items()) == list(CONFIG.items())
        assert folder.config == CONFIG
        assert folder.path == tmp_path / "a" / "b"
        assert {folder.metrics_path, folder.checkpoint_folder, folder.result_path} == {
            folder.path / name for name in ("metrics.jsonl", "checkpoints", "result.json")
        }
        assert not folder.is_finished
        folder.result_path.write_text("{}")
        assert folder.is_finished


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "metrics.jsonl", "checkpoints"])
def test_a_new_run_is_refused_where_something_of_a_run_is(name, tmp_path):
    (tmp_path / name).touch()
    for _ in range(2):  # and the refusal lets go of the lock
        with pytest.raises(InputError, match="use --resume or another folder"):
            RunFolder.create(tmp_path, CONFIG)
    assert (tmp_path / name).read_bytes() == b""


def test_a_new_run_where_a_file_or_a_folder_that_cannot_be_used_is(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder can be made"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"\.lock: cannot be opened"):
        RunFolder.create(tmp_path / "run", CONFIG)


def test_a_new_run_that_the_disk_has_no_room_for_leaves_nothing_to_resume(tmp_path):
    with file_size_limit(100), pytest.raises(InputError, match="cannot be written to: File too large"):
        RunFolder.create(tmp_path, CONFIG | {"text": "a" * 200})
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    RunFolder.create(tmp_path, CONFIG).close()


def test_resume_takes_the_same_configuration_however_it_is_written(tmp_path):
    RunFolder.create(tmp_path, CONFIG | {"paths": (tmp_path, "b")}).close()
    (tmp_path / ".bmsn-config.yaml.1.tmp").touch()  # what a kill left behind
    with RunFolder.resume(tmp_path, CONFIG | {"paths": [str(tmp_path), "b"]}) as folder:
        assert folder.config == CONFIG | {"paths": [str(tmp_path), "b"]}
    with RunFolder.resume(tmp_path) as folder:
        assert folder.config["lr"] == 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]


def test_resume_with_another_configuration_lists_the_fields_that_differ(tmp_path):
    RunFolder.create(tmp_path, CONFIG | {"out": "here", "old": 1}).close()
    given = CONFIG | {"supernets": 4, "seed": 3, "optimiser": {"momentum": 0.5}, "out": "there", "new": "x"}
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            RunFolder.resume(tmp_path, given, ignore={"out"})
        assert str(caught.value).split("configuration: ")[1].split("; ") == [
            "supernets: 2 stored, 4 given",
            "seed: None stored, 3 given",
            "optimiser.momentum: 0.9 stored, 0.5 given",
            "old: 1 stored, absent given",
            "new: absent stored, 'x' given",
        ]
    ignored = {"out", "old", "new", "optimiser.momentum", "supernets", "seed"}
    RunFolder.resume(tmp_path, given, ignore=ignored).close()


def test_resume_where_no_run_is(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="holds no run to resume"):
            RunFolder.resume(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "a: [", "- 1"], ids=["empty", "torn", "list"])
def test_resume_with_a_damaged_configuration(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml: "):
        RunFolder.resume(tmp_path, CONFIG)


def test_a_folder_in_use_by_this_process_is_refused_until_it_is_closed(tmp_path):
    with RunFolder.create(tmp_path, CONFIG):
        for method in (RunFolder.create, RunFolder.resume):
            with pytest.raises(InputError, match=rf"in use by a living process \(pid {os.getpid()}\)"):
                method(tmp_path, CONFIG)
    RunFolder.resume(tmp_path, CONFIG).close()


# Holds a run folder, starts one child by exec and one by fork that outlive it, and waits to be killed.
HOLDER = """
import os, subprocess, sys, time
from bmsn.runfolder import RunFolder

folder = RunFolder.create(sys.argv[1], {"supernets": 2})
by_exec = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
by_fork = os.fork()
if by_fork:
    print(os.getpid(), by_exec.pid, by_fork, flush=True)
time.sleep(60)
"""


def test_the_lock_dies_with_its_holder_and_not_with_its_children(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        pid, *children = map(int, holder.stdout.readline().split())
        try:
            with pytest.raises(InputError, match=rf"in use by a living process \(pid {pid}\)"):
                RunFolder.resume(tmp_path)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            for child in children:
                os.kill(child, 0)  # alive
            RunFolder.resume(tmp_path, {"supernets": 2}).close()
        finally:
            holder.kill()
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_metrics_come_back_as_plain_values(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(
            {
                "step": np.int64(3),
                "loss": float("nan"),
                "accuracy": np.float64(0.25),
                "table": np.array([[1.5, math.inf], [-math.inf, 0.1]]),
                "visits": torch.tensor([1, 2]),
                "nested": {"pair": (1, math.nan), "text": "a\nb", "none": None},
            }
        )
        assert read_metrics(path)[0]["step"] == 3, "not in the file when write returns"
        metrics.write({"step": 4})
    assert path.read_bytes().count(b"\n") == 2
    assert b"NaN" not in path.read_bytes()
    assert read_metrics(path) == [
        {
            "step": 3,
            "loss": None,
            "accuracy": 0.25,
            "table": [[1.5, None], [None, 0.1]],
            "visits": [1, 2],
            "nested": {"pair": [1, None], "text": "a\nb", "none": None},
        },
        {"step": 4},
    ]


@pytest.mark.parametrize("record", [{}, {"step": 1.0}, {"step": True}, {"step": math.nan}], ids=str)
def test_a_record_without_an_integer_step_is_refused(record, tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics, pytest.raises(TypeError, match='integer "step"'):
        metrics.write(record)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("step", [-1, 0, 5, 20, 100])
def test_cut_back_drops_the_lines_of_later_steps_and_writing_goes_on(step, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [0, 10, 10, 20, 30])
    kept = [{"step": s} for s in (0, 10, 10, 20, 30) if s <= step]
    with MetricsFile(path) as metrics:
        metrics.cut_back(step)
        assert read_metrics(path) == kept
        metrics.write({"step": 101})
    assert read_metrics(path) == [*kept, {"step": 101}]
    assert [path.name] == os.listdir(tmp_path)


def test_a_last_line_torn_anywhere_is_left_out_by_readers_and_cut_off_by_the_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2])
    content = path.read_bytes()
    start_of_last = content.index(b"\n") + 1
    for length in range(start_of_last, len(content)):
        path.write_bytes(content[:length])
        assert read_metrics(path) == [{"step": 1}]
        write_lines(path, [7])
        assert read_metrics(path) == [{"step": 1}, {"step": 7}]
    path.write_bytes(content[: start_of_last - 1])  # nothing but a torn line
    write_lines(path, [7])
    assert read_metrics(path) == [{"step": 7}]


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"step": 1}\r{"step": 2}'], ids=str)
def test_a_damaged_line_inside_is_an_error_and_not_the_end(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    content = path.read_bytes()
    with pytest.raises(InputError, match="line 2 "):
        read_metrics(path)
    with MetricsFile(path) as metrics, pytest.raises(InputError, match="line 2 "):
        metrics.cut_back(1)
    assert path.read_bytes() == content


def test_reading_metrics_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_with_a_full_disk_lines_wait_whole_and_in_order(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"step": 1})
        size = path.stat().st_size
        with file_size_limit(size + 5):  # a part of a line fits
            for step in (2, 3):
                metrics.write({"step": step})
                assert path.stat().st_size == size
            with pytest.raises(OSError):
                metrics.sync()
        (message,) = caplog.messages
        assert "held back from step 2 on" in message
        metrics.write({"step": 4})
        metrics.sync()
        assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_closing_with_lines_that_never_found_room_says_so(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with file_size_limit(5):
        metrics.write({"step": 1})
        with pytest.raises(OSError):
            metrics.close()
    metrics.close()  # once is enough


def test_each_record_is_one_write(tmp_path, monkeypatch):
    real, written = os.write, []
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or real(fd, data))
        metrics.write({"step": 1, "text": "a" * 100_000})
        metrics.write({"step": 2})
    assert [json.loads(line)["step"] for line in written] == [1, 2]
    assert all(line.endswith(b"\n") for line in written)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_only_leaves_a_note_and_the_handlers_come_back(number, code):
    def previous(number, frame):
        raise AssertionError("the handler of before")

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for s in before:
            signal.signal(s, previous)
        with SignalFlag() as flag:
            assert (flag.signal_number, flag.exit_code) == (None, 0)
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # a later one does not change what the first one asked for
            assert (flag.signal_number, flag.exit_code) == (number, code)
        assert all(signal.getsignal(s) is previous for s in before)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_the_second_interrupt_does_not_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    try:
        with SignalFlag() as flag:
            signal.raise_signal(signal.SIGINT)
            assert flag.signal_number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with SignalFlag() as flag:
            signal.raise_signal(signal.SIGTERM)
            assert flag.signal_number is None
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_the_flag_does_nothing():
    handlers = []

    def run() -> None:
        with SignalFlag() as flag:
            handlers.append((signal.getsignal(signal.SIGTERM), flag.exit_code))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [(before, 0)]


def test_a_sleeping_process_that_is_told_to_end_notices_between_two_steps():
    script = """
import sys, time
from bmsn.runfolder import SignalFlag
with SignalFlag() as flag:
    print("ready", flush=True)
    for step in range(600):
        time.sleep(0.05)
        if flag.signal_number is not None:
            print("saved", flush=True)
            sys.exit(flag.exit_code)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.01)
        process.terminate()
        assert process.stdout.readline() == "saved\n"
        assert process.wait() == 143
