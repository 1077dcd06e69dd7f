"""The folder of one run: who may write to it, its configuration, its metrics, and how it is asked to stop.

It holds .lock, config.yaml, metrics.jsonl, checkpoints/ and, once the run is finished, result.json.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import signal
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePath
from types import FrameType
from typing import Any, ClassVar, Self

import yaml

from bmsn.checkpoint import remove_stray_files, sync_folder, write_atomically
from bmsn.errors import InputError

_LOG = logging.getLogger(__name__)
_ABSENT = object()


class _ConfigDumper(yaml.SafeDumper):
    """Plain YAML; a path is written as a string."""


_ConfigDumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


class _FolderLock:
    """An exclusive flock on `<folder>/.lock`: the kernel drops it when this process ends, however it ends."""

    _held: ClassVar[weakref.WeakSet[_FolderLock]] = weakref.WeakSet()
    _closes_after_fork: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        try:
            # closed by exec, as all that Python opens: a child process does not hold the lock
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(f"{folder}: in use by a living process (pid {holder})") from None
            raise InputError(f"{path}: cannot be locked: {error.strerror}") from error
        if not _FolderLock._closes_after_fork:
            # A forked child has the same open file: without this, one that outlives its parent would hold the lock.
            os.register_at_fork(after_in_child=_FolderLock._release_all)
            _FolderLock._closes_after_fork = True
        _FolderLock._held.add(self)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @classmethod
    def _release_all(cls) -> None:
        for lock in list(cls._held):
            lock.release()


class RunFolder:
    """A run's folder, held for this process alone until it ends or `close` is called. Made by `create` or `resume`."""

    def __init__(self, path: Path, lock: _FolderLock, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config  # as stored: plain YAML values
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> Self:
        """Starts a run in a folder without one, made with its parents where it is missing.

        Args:
            path: the folder.
            config: what config.yaml will hold, in this order: dicts, lists, tuples, numbers, strings, paths, None.
        Raises:
            InputError: the folder holds a run, is in use, or cannot be written to.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # the folder above need not be ours to open
                sync_folder(path.parent)
        except OSError as error:
            raise InputError(f"{path}: no folder can be made: {error.strerror}") from error
        lock = _FolderLock(path)
        try:
            # not config.yaml alone: what a partly deleted run left behind must not become part of a new one
            for name in ("config.yaml", "result.json", "metrics.jsonl", "checkpoints"):
                if (path / name).exists():
                    raise InputError(f"{path}: holds a run already ({name}): use --resume or another folder")
            remove_stray_files(path)
            text = yaml.dump(dict(config), Dumper=_ConfigDumper, sort_keys=False)
            try:
                write_atomically(path / "config.yaml", text.encode())
            except OSError as error:
                raise InputError(f"{path}: cannot be written to: {error.strerror}") from error
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, yaml.safe_load(text))

    @classmethod
    def resume(
        cls, path: str | Path, config: Mapping[str, Any] | None = None, ignore: Collection[str] = frozenset()
    ) -> Self:
        """Goes on with the run in a folder, finished or not.

        Args:
            path: the folder.
            config: what the stored configuration must equal; None accepts it as it is.
            ignore: fields that may differ; "a.b" is field b of the section a.
        Raises:
            InputError: no run there, in use, config.yaml damaged, or fields that differ (all are listed).
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path}: holds no run to resume (it has no config.yaml)")
        lock = _FolderLock(path)
        try:
            remove_stray_files(path)
            stored = _read_config(path / "config.yaml")
            if config is not None:
                given = yaml.safe_load(yaml.dump(dict(config), Dumper=_ConfigDumper))  # tuples as lists, as stored
                differences = _differences(stored, given, ignore)
                if differences:
                    raise InputError(f"{path}: is a run with another configuration: " + "; ".join(differences))
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, stored)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def is_finished(self) -> bool:
        """The result is the last file that a run writes."""
        return self.result_path.is_file()

    def close(self) -> None:
        """Lets another process use the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold fields and values, not {config!r}")
    return config


def _differences(
    stored: Mapping[str, Any], given: Mapping[str, Any], ignore: Collection[str], section: str = ""
) -> list[str]:
    found = []
    for key in dict.fromkeys([*stored, *given]):
        field = f"{section}{key}"
        if field in ignore:
            continue
        old, new = stored.get(key, _ABSENT), given.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, ignore, f"{field}.")
        elif old != new:
            old, new = ("absent" if value is _ABSENT else repr(value) for value in (old, new))
            found.append(f"{field}: {old} stored, {new} given")
    return found


class MetricsFile:
    """The metrics of a run, one JSON object a line, each whole in the file when `write` returns.

    A disk that is full stops nothing: lines are held back, in order, until there is space. `sync` before a checkpoint
    tells whether all of them are on the disk.

    Args:
        path: the file; made where it is missing, and cut after its last whole line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held_back = b""
        self._descriptor = self._open()
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)
        sync_folder(self.path.parent)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line. NaN and infinities become null; arrays, tensors and their scalars become lists and numbers.

        Args:
            record: has an integer "step".
        """
        plain = _json_value(dict(record))
        if type(plain.get("step")) is not int:
            raise TypeError(f'a metrics record needs an integer "step", not {plain.get("step")!r}')
        said_before = bool(self._held_back)
        self._held_back += json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            self._write_out()
        except OSError as error:
            if not said_before:
                _LOG.warning("%s: %s: lines are held back from step %d on", self.path, error.strerror, plain["step"])

    def sync(self) -> None:
        """Returns once every line would survive a power cut; OSError where that cannot be (disk full, ...)."""
        self._write_out()
        os.fsync(self._descriptor)

    def cut_back(self, step: int) -> None:
        """Drops, atomically, the lines of later steps: those that a resume at this step writes again."""
        kept, dropped = [], 0
        for line, record in _whole_lines(self.path):
            if record["step"] <= step:
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            write_atomically(self.path, b"".join(kept))
            os.close(self._descriptor)  # that of the file replaced
            self._descriptor = self._open()

    def close(self) -> None:
        """Closes the file; OSError where lines held back can still not be written."""
        if self._descriptor < 0:
            return
        try:
            self._write_out()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def _write_out(self) -> None:
        """One write for everything that waits. A part of it (disk full) is taken back, so that lines stay whole."""
        if not self._held_back:
            return
        size = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, self._held_back)
        if written < len(self._held_back):
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._held_back = b""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, also while it is being written: a last line without its end is left out.

    Raises:
        InputError: no such file, or a line that is no record; the message has its number.
    """
    return [record for _, record in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # after the last newline: nothing, or torn
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is no JSON: {error}") from error
        if not (isinstance(record, dict) and type(record.get("step")) is int):
            raise InputError(f'{path}: line {number} has no integer "step"')
        found.append((line + b"\n", record))
    return found


def _json_value(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a numpy array or scalar, a tensor
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value


class SignalFlag:
    """While it is entered, SIGTERM and SIGINT only leave a note, so that a run can save and end between two steps.

    A SIGINT after the note raises KeyboardInterrupt: the second Ctrl-C does not wait. A signal that was ignored stays
    ignored (`nohup`). Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    @property
    def exit_code(self) -> int:
        """What a shell expects: 143 after SIGTERM, 130 after SIGINT, 0 where neither came."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: a handler that was not set from Python, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_number is None:
            self.signal_number = number
