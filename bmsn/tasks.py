"""Tasks, such as a network to train alone, and the folder in which any number of machines share them out.

A task's result is one file, named by the hash of what determines it, that appears whole or not at all: what is there is
done, whoever did it. A claim keeps two processes from the same task. It is a file too, for `flock` does not reach
across every network file system, and it is touched while its owner lives. Should two train the same task after all
(an owner that was stopped for minutes), the result is the same and one replaces the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from bmsn.checkpoint import write_atomically
from bmsn.data import ImageDataset, open_dataset
from bmsn.data.readers import split_spec
from bmsn.data.synthetic import generate_synthetic
from bmsn.errors import InputError
from bmsn.paths import Candidate, as_path, find_candidate, path_macs
from bmsn.space import PoolKind, SearchSpace
from bmsn.standalone import TrainingSettings, train_alone
from bmsn.weights import write_weights

_LOG = logging.getLogger("bmsn.tasks")

FORMAT = 2  # counts up whenever the same task would come to another result
TOUCH_SECONDS, STALE_SECONDS = 15, 120  # how often a claim is touched, and when it counts as abandoned


@dataclass(frozen=True, kw_only=True)
class Images:
    """Where a task's images come from; may differ from machine to machine as long as the content does not.

    Attributes:
        spec: scheme:path, see `open_dataset`.
        generator_seed: of the built-in set; None: its usual images, or another set.
        fingerprint: sha256 of the content, see `ImageDataset.fingerprint`.
    """

    spec: str
    generator_seed: int | None
    fingerprint: str

    def open(self, space: SearchSpace) -> ImageDataset:
        """The images. Raises InputError where the content is another one."""
        data = open_images(self.spec, self.generator_seed, space)
        if data.fingerprint != self.fingerprint:
            raise InputError(
                f"data {self.spec}: sha256 of its content must be {self.fingerprint[:12]}...; got "
                f"{data.fingerprint[:12]}...: it is not the set that was asked for"
            )
        return data


def open_images(spec: str, generator_seed: int | None, space: SearchSpace) -> ImageDataset:
    """`open_dataset` at the size that the space wants where the images can be resized; see `Images`."""
    scheme, variant = split_spec(spec)
    if generator_seed is not None:
        return generate_synthetic(variant or "default", seed=generator_seed)
    return open_dataset(spec, image_size=space.image_size if scheme in ("parquet", "folder") else None)


class Place:
    """Where a process does its tasks. It keeps the images that it opened last: tasks come in an order that needs them.

    Args:
        device: where to compute.
        machine: what results say about it: `device` and `torch`.
    """

    def __init__(self, device: torch.device, machine: dict[str, str]) -> None:
        self.device, self.machine = device, machine
        self._images: Images | None = None
        self._data: ImageDataset | None = None

    def open(self, images: Images, space: SearchSpace) -> ImageDataset:
        if self._images != images:
            self._data = self._images = None  # before the next ones are read
            self._data, self._images = images.open(space), images
        assert self._data is not None
        return self._data


class Result(Protocol):
    """What any finished task left behind."""

    @property
    def seconds(self) -> float:
        """That it took."""

    @property
    def summary(self) -> str:
        """For a line of progress."""


class Work(Protocol):
    """A task of any kind."""

    @property
    def name(self) -> str:
        """Of its files: equal for those that come to the same result, and for no others."""

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def macs(self) -> int:
        """What its time is about proportional to."""

    @property
    def kind(self) -> str:
        """Tasks of one kind take equally long on one device, give or take a factor of 7."""

    def perform(self, place: Place, progress: Callable[[float], None]) -> Any:
        """Does it and returns its result; `progress` takes the share that is done."""


W = TypeVar("W", bound=Work)
R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One network to train.

    Attributes:
        space, pool: name of the space and how its layers downsample.
        architecture: stage depths, as 4-3-3, or a path of resolutions, as 0-0-1-2-1.
        images: what it is trained and tested on.
        seed: of weights and batches.
        settings: how it is trained.
        weights_folder: where the trained weights are kept, as `name`.npz, before the result is; None: nowhere.
    """

    space: str
    pool: PoolKind
    architecture: str
    images: Images
    seed: int
    settings: TrainingSettings
    weights_folder: Path | None = None

    @property
    def key(self) -> dict[str, Any]:
        """All that determines the result, as plain values; where images and weights lie does not."""
        return {
            "format": FORMAT, "space": self.space, "pool": self.pool, "architecture": self.architecture,
            "data": self.images.fingerprint, "seed": self.seed, "settings": asdict(self.settings),
        }  # fmt: skip

    @cached_property
    def name(self) -> str:
        """Of its files: readable in front, then the hash of `key`."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return f"{self.architecture}-seed{self.seed}-{digest[:20]}"

    @property
    def label(self) -> str:
        return f"{self.opened_space()[1]} seed {self.seed}"

    def opened_space(self) -> tuple[SearchSpace, Candidate]:
        space = SearchSpace.named(self.space, pool=self.pool)
        return space, find_candidate(space, self.architecture)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image: what its training time is about proportional to."""
        space, architecture = self.opened_space()
        return path_macs(space, as_path(space, architecture))

    @property
    def kind(self) -> str:
        return "network"

    def perform(self, place: Place, progress: Callable[[float], None]) -> TaskResult:
        space, architecture = self.opened_space()
        trained = train_alone(
            space, architecture, place.open(self.images, space), self.settings, seed=self.seed, device=place.device,
            progress=progress,
        )  # fmt: skip
        if self.weights_folder is not None:
            write_weights(self.weights_folder / f"{self.name}.npz", trained.network)
        return TaskResult(
            correct=trained.correct, total=trained.total, loss=trained.loss, seconds=trained.seconds, **place.machine
        )


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a finished task left behind.

    Attributes:
        correct, total: test images classified correctly after the last epoch, and all of them.
        loss: mean cross-entropy of the last training batch.
        seconds: of training and testing.
        device, torch: what it was trained on.
    """

    correct: int
    total: int
    loss: float
    seconds: float
    device: str
    torch: str

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent."""
        return 100 * self.correct / self.total

    @property
    def summary(self) -> str:
        return f"{self.accuracy:.2f} %, {self.seconds:.0f} s"


class Store(ABC, Generic[W, R]):
    """Results and claims of tasks in a folder that processes and machines may share.

    Args:
        folder: made, with its parents, where it is missing.
    Raises:
        InputError: the folder cannot be made or written to.
    """

    noun: ClassVar[str]  # what its tasks are, when they are done

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._claimed: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._now()
        except OSError as error:
            raise InputError(f"{folder}: cannot be written to: {error.strerror}") from error

    @abstractmethod
    def result(self, task: W) -> R | None:
        """The result; None where there is none yet."""

    @abstractmethod
    def write(self, task: W, result: R) -> None:
        """Keeps a result, whole or not at all."""

    def claim(self, task: Work) -> bool:
        """Takes a task for this process, unless another one that lives has it."""
        path = self._claim_path(task)
        for _ in range(2):  # the second time after an abandoned claim was put away
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not self._abandoned(path):
                    return False
                # Renamed, not removed: of two that find it abandoned one alone succeeds.
                away = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
                with contextlib.suppress(FileNotFoundError):
                    path.rename(away)
                    away.unlink()
                continue
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(_OWNER | {"pid": os.getpid()}, file)
            except OSError as error:  # a full disk; an empty claim would keep everyone waiting until it is stale
                path.unlink(missing_ok=True)
                raise OSError(error.errno, error.strerror, str(path)) from error
            self._claimed.add(task.name)
            return True
        return False

    def touch(self, tasks: Iterable[Work]) -> None:
        """Says that this process lives; due every `TOUCH_SECONDS` for the tasks it has claimed."""
        for task in tasks:
            with contextlib.suppress(OSError):
                os.utime(self._claim_path(task))

    def release(self, task: Work) -> None:
        """Gives a claim up, whether the task is done or not. Another's is left alone."""
        if task.name in self._claimed:
            self._claimed.discard(task.name)
            path = self._claim_path(task)
            if _read_owner(path).get("token") == _OWNER["token"]:
                path.unlink(missing_ok=True)

    def remove_claims_of_the_dead(self, tasks: Iterable[Work]) -> None:
        """Removes what a process left that was killed after it had written a result and before its claim was gone."""
        left = {path.stem for path in self.folder.glob("*.claim")}
        for task in tasks:
            if task.name in left and self.claim(task):
                self.release(task)

    def _abandoned(self, path: Path) -> bool:
        try:
            age = self._now() - path.stat().st_mtime
        except FileNotFoundError:
            return False  # just given up: the caller comes again
        if age > STALE_SECONDS:
            return True
        owner = _read_owner(path)
        if owner.get("machine") != _OWNER["machine"] or owner.get("token") == _OWNER["token"]:
            return False
        pid = owner.get("pid")
        return isinstance(pid, int) and (pid == os.getpid() or not _is_alive(pid))

    def _now(self) -> float:
        """The time by the clock that stamps the claims: the file server's, where the folder is on one."""
        probe = self.folder / f".now-{_OWNER['token']}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _claim_path(self, task: Work) -> Path:
        return self.folder / f"{task.name}.claim"


class TaskStore(Store[Task, TaskResult]):
    """The store of networks trained alone: one file a network."""

    noun = "networks trained"

    def result(self, task: Task) -> TaskResult | None:
        """The result; None where there is none yet, or a file that is damaged, which is said and then replaced."""
        path = self._result_path(task)
        try:
            content = json.loads(path.read_bytes())
            if content["key"] != json.loads(json.dumps(task.key)):  # tuples are lists in the file
                raise ValueError("it is of another task")
            return TaskResult(**content["result"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            _LOG.warning("%s: damaged, so the task is done again: %s", path, error)
            return None

    def write(self, task: Task, result: TaskResult) -> None:
        content = {"key": task.key, "result": asdict(result)}
        write_atomically(self._result_path(task), (json.dumps(content, indent=1) + "\n").encode())

    def _result_path(self, task: Task) -> Path:
        return self.folder / f"{task.name}.json"


def _machine() -> str:
    """Where a process id means something: the host, and the container on it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


# A token of this process: a process id comes back, in containers always the same one.
_OWNER = {"machine": _machine(), "token": secrets.token_hex(8)}


def _read_owner(path: Path) -> dict[str, Any]:
    """Empty where the claim is gone, or not yet or only half written."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
