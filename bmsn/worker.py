"""A process that does one task after the other, so that one that crashes or hangs takes nothing with it.

It is spawned, never forked (OpenMP), has a device and its share of the cores, and keeps the images that it has opened.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic

import torch

from bmsn.checkpoint import environment
from bmsn.errors import InputError, RunStopped, is_disk_error
from bmsn.memory import keep_freed_memory
from bmsn.tasks import Place, W, Work

_SHARE_SECONDS = 1  # between two messages that say how much of a task is done


class Worker(Generic[W]):
    """One process as its parent sees it. It is started with its first task, and anew with the next one after `stop`.

    Attributes:
        connection: where its messages come from; None: it does not run.
        task: what it does; None: nothing.
        share: of the task that is done, in [0, 1].
        pace: seconds that the whole task takes at the speed between its first report and its last; None: unknown.
        since: `time.monotonic()` when it began the task, or to start where it has not.
        is_ready: whether it has started.

    Args:
        device: as torch names it, "cuda:1".
        threads: of torch's operations.
    """

    def __init__(self, device: str, threads: int) -> None:
        self._device, self._threads = device, threads
        self._process: BaseProcess | None = None
        self.connection: Connection | None = None
        self.task: W | None = None
        self.share, self.since, self.is_ready = 0.0, 0.0, False
        self.pace: float | None = None
        self._first_report: tuple[float, float] | None = None  # time and share: a search may go on where another was

    def begin(self, task: W) -> None:
        if self.connection is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            arguments = (theirs, self._device, self._threads)
            self._process = context.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()  # so that reading ends when the process does
            self.is_ready = False
        self.task, self.since = task, time.monotonic()
        self.share, self.pace, self._first_report = 0.0, None, None
        with contextlib.suppress(OSError):  # it has just ended: `receive` says so
            self.connection.send(task)

    def report(self, share: float) -> None:
        """Notes the share of the task that is done, and the pace that it tells."""
        now = time.monotonic()
        if self._first_report is None:
            self._first_report = now, share
        elif share > self._first_report[1]:
            self.pace = (now - self._first_report[0]) / (share - self._first_report[1])
        self.share = share

    def receive(self) -> tuple[str, Any]:
        """The next message: its kind and content.

        ready: None. share: of the task. done: its result. disk: an OSError. input, stopped, error: a text; see
        `_perform`.

        Raises:
            EOFError: the process has ended; the message says how.
        """
        assert self.connection is not None
        assert self._process is not None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise EOFError(f"the process ended with exit code {self._process.exitcode}") from None

    def stop(self) -> None:
        """Ends the process at once; the task stays noted."""
        if self.connection is not None and self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
        self.connection = self._process = None


def _serve(connection: Connection, device_name: str, threads: int) -> None:
    """The life of a worker: reads tasks until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends it
    # A parent that is killed cannot end it: by itself it would go on to the end of the task, in a folder that the next
    # process wants.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a search names no other than the current one
    here = environment(device_name)
    machine = {"device": here["cuda_device"] or f"{here['cpu_model']}, threads: {threads}", "torch": here["torch"]}
    place = Place(device, machine)
    try:
        connection.send(("ready", None))
        while True:
            connection.send(_perform(connection.recv(), place, connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform(task: Work, place: Place, connection: Connection) -> tuple[str, Any]:
    """The message that answers a task: done, input (bad input), disk (takes no more), stopped (would
    stop there again) or error."""
    sent = -math.inf

    def tell(share: float) -> None:
        nonlocal sent
        if time.monotonic() - sent >= _SHARE_SECONDS:  # a search reports every step
            sent = time.monotonic()
            connection.send(("share", share))

    try:
        return "done", task.perform(place, tell)
    except InputError as error:
        cause = error.__cause__
        return ("disk", OSError(cause.errno, str(error))) if is_disk_error(cause) else ("input", str(error))
    except RunStopped as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):  # others on the GPU may end
            return "error", str(error)
        return "stopped", str(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        return ("disk", error) if is_disk_error(error) else ("error", traceback.format_exc())
