"""`run_search`: a whole search, with its run folder, checkpoints and result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bmsn.checkpoint import CheckpointStore, environment, environment_differences, write_atomically
from bmsn.config import FilledConfig, SearchConfig
from bmsn.data import ImageDataset, open_dataset
from bmsn.data.readers import GIVEN
from bmsn.errors import InputError
from bmsn.evaluator import Scores
from bmsn.latency import Latency, measure_latency
from bmsn.loop import SearchLoop
from bmsn.racing import Race
from bmsn.result import SearchResult
from bmsn.runfolder import MetricsFile, RunFolder
from bmsn.space import SearchSpace
from bmsn.trainer import out_of_memory_said, resolve_device

_log = logging.getLogger("bmsn.search")

# How a run is stored and shown, not what it computes.
_NOT_COMPARED = ("checkpoint_every", "tensorboard", "latency", "engine")


class Interrupted(Exception):
    """The caller asked the search to stop; where there is a run folder, its state is saved.

    Attributes:
        exit_code: for a command that stops with it.
    """

    exit_code = 130


def run_search(
    config: SearchConfig,
    data: ImageDataset | None = None,
    *,
    space: SearchSpace | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> SearchResult:
    """Searches by `config.method` (the balanced mixture of supernets) and ranks all architectures of the space.

    Source: Javan et al. 2023, section 2.

        >>> config = bmsn.SearchConfig(
        ...     space="resnet14-cifar10", data="npz:images.npz", epochs=2, batch_size=16, out=Path("runs/b")
        ... )
        >>> result = bmsn.run_search(config)
        >>> len(result.ranking), result.best.rank
        (15, 1)
        >>> sorted(file.name for file in Path("runs/b").glob("r*"))
        ['ranking.csv', 'result.json']

    Args:
        config: settings; with `out`, the run is kept in that folder and can be resumed.
        data: the images; None: what `config.data` names. Where it names none, the run stores given:NAME, the name of
            these images, and is resumed by passing them again.
        space: one's own search space; None: what `config.space` names. The run stores its arguments.
        should_stop: asked after every step, after every batch of a scoring and before every timing of `latency`; True
            saves the state and raises Interrupted.
        progress: called as often with what is known without waiting: `step`, `num_steps`, `accuracy` (mean over the
            validation batches since the last training record of metrics.jsonl; None: there was none),
            `images_per_second`, `seconds_left` and the other fields of that record; while scoring also `pairs_scored`
            and `num_pairs`.
    Returns:
        The result; with `resume` on a finished run, the stored one. Where its files cannot be written (disk full, ...)
        a warning is logged, the run stays unfinished, and `resume` writes them.
    Raises:
        InputError: settings, data or run folder that cannot be used; found before the first step where it can be.
        RunStopped: 20 losses in a row that are not finite, a balance that cannot be solved, or no memory left; the last
            checkpoint is kept.
        Interrupted: `should_stop` said so.
    """
    started = time.perf_counter()
    if data is not None and config.data is None:
        config = replace(config, data=f"{GIVEN}:{data.name}")
    if space is not None:
        if config.space not in (None, space.spec):
            raise InputError(f"space is given twice: {config.space} in config, and {space.name}")
        config = replace(config, space=space.spec, pool=config.pool or space.pool)
    settings = config.filled()
    if settings.tensorboard and settings.out is None:
        raise InputError("tensorboard needs out: the folder to write its events to")
    folder = None
    try:
        if settings.resume and settings.out is not None:
            folder = RunFolder.resume(settings.out, settings.as_dict(), ignore=_NOT_COMPARED)
            if folder.is_finished:
                return SearchResult.from_json(folder.result_path.read_text(), str(folder.result_path))
        board = _tensorboard_writer() if settings.tensorboard else None
        images = _open(settings) if data is None else data
        with out_of_memory_said(lambda: "before the first step", resolve_device(settings.device)):
            loop = SearchLoop(settings, images)
        if settings.out is not None and folder is None:  # only now: bad input leaves no folder behind
            folder = RunFolder.create(settings.out, settings.as_dict())
        with out_of_memory_said(lambda: _place(loop), loop.device):
            return _search(loop, folder, board, should_stop, progress, started)
    finally:
        if folder is not None:
            folder.close()


def _open(config: FilledConfig) -> ImageDataset:
    resizes = config.data.split(":")[0] in ("parquet", "folder")
    return open_dataset(config.data, image_size=SearchSpace.named(config.space).image_size if resizes else None)


def describe_data(data: ImageDataset) -> dict[str, Any]:
    """What result.json and the first line of metrics.jsonl say of the images."""
    return {
        "name": data.name, "fingerprint": data.fingerprint,
        "num_classes": data.num_classes, "image_size": data.image_size, "in_channels": data.in_channels,
    }  # fmt: skip


def _search(
    loop: SearchLoop,
    folder: RunFolder | None,
    board_writer: type[Any] | None,
    should_stop: Callable[[], bool],
    progress: Callable[[dict[str, Any]], None],
    started: float,
) -> SearchResult:
    """Trains from the last checkpoint on, scores, and writes the result."""
    config, data = loop.config, loop.data
    here = environment(loop.device.type) | {"compute_dtype": str(loop.dtype).removeprefix("torch.")}
    store = metrics = None
    earlier = 0.0  # seconds of the processes that this one goes on for
    if folder is not None:
        store, metrics = CheckpointStore(folder.checkpoint_folder), MetricsFile(folder.metrics_path)
        saved = store.load_latest() if config.resume else None
        if saved is not None:
            loop.load_state_dict(saved[1]["loop"])
            earlier = saved[1]["seconds"]
            for difference in environment_differences(saved[1]["environment"], here):
                _log.warning("resumed elsewhere, so not bit-exact: %s", difference)
        metrics.cut_back(loop.step or -1)
        if loop.step == 0:  # what a report of a run without a result must know
            metrics.write({"kind": "data", "step": 0} | describe_data(data))
        _log.info(
            "%s %s at step %d of %d",
            "resuming" if config.resume else "starting",
            folder.path,
            loop.step,
            loop.num_steps,
        )

    def save() -> None:
        if store is not None:
            assert metrics is not None
            state = {"loop": loop.state_dict(), "environment": here, "seconds": earlier + time.perf_counter() - started}
            try:
                metrics.sync()
                store.save(loop.step, state)
            except OSError as error:  # a full disk: the checkpoint before stays
                _log.warning("the checkpoint of step %d could not be written, training goes on: %s", loop.step, error)

    first, train_before = loop.step, loop.train_seconds
    board = None if board_writer is None else board_writer(str(config.out))
    last_record: dict[str, Any] = {"kind": "step", "accuracy": None}

    def write(record: dict[str, Any]) -> None:
        nonlocal last_record, board
        if metrics is not None:
            metrics.write(record)
        if record["kind"] == "step":
            last_record = record
        if record["kind"] == "step" and board is not None:
            try:
                for name, value in record.items():
                    if isinstance(value, float) and name != "train_seconds":
                        board.add_scalar(name, value, record["step"])
            except OSError as error:  # a full disk: metrics.jsonl has it all
                _log.warning("step %d: TensorBoard gets no more, training goes on: %s", loop.step, error)
                board = None

    def stop_if_asked(place: str = "") -> None:
        if should_stop():
            raise Interrupted(f"interrupted {place}at step {loop.step} of {loop.num_steps}" + _how_to_go_on(config))

    def show(**scored: int) -> None:
        """Of what the host knows already, so that no device is waited for."""
        per_step = (loop.train_seconds - train_before) / max(1, loop.step - first)
        recent = loop.recent_accuracy
        progress(last_record | {
            "step": loop.step, "num_steps": loop.num_steps, "seconds_left": per_step * (loop.num_steps - loop.step),
            "images_per_second": config.batch_size / per_step if per_step else 0.0,
            "accuracy": last_record["accuracy"] if recent is None else recent,
        } | scored)  # fmt: skip

    def after_batch(pairs_scored: int, num_pairs: int) -> None:
        show(pairs_scored=pairs_scored, num_pairs=num_pairs)
        stop_if_asked("while scoring ")

    loop.write, loop.scored = write, after_batch
    try:
        while loop.step < loop.num_steps:
            stop_if_asked()
            loop.advance()
            show()
            if loop.step % config.checkpoint_every == 0 or loop.step == loop.num_steps:
                save()
    except Interrupted:
        save()
        raise
    stop_if_asked("before the final scoring ")
    score_started = time.perf_counter()
    scores = loop.score()
    ranked = loop.rank(scores)
    finished = time.perf_counter()
    latency = _latency(loop, lambda: stop_if_asked("while measuring latency ")) if config.latency else None
    result = SearchResult(
        ranking=ranked,
        config=config.as_dict(),
        environment=here,
        data=describe_data(data)
        | {
            "num_train": len(loop.train_stream.indices),
            "num_validation": len(loop.validation),
            "num_test": len(data.test_labels),
        },
        timings={
            "train_images_per_second": loop.num_steps * config.batch_size / max(loop.train_seconds, 1e-9),
            "train_seconds": loop.train_seconds,
            "score_seconds": finished - score_started,
            "total_seconds": earlier + finished - started,
        },
        scores=loop.record(scores),
        cost=loop.method.cost.as_dict(),
        method={"ranked_by": loop.ranked_by, "estimate": loop.method.estimate} | loop.method.findings(),
        truth=loop.against_truth(ranked, scores),
        latency={} if latency is None else latency.as_dict(),
        notes=_notes(loop, scores),
    )
    if folder is not None:
        _write(result, folder)
    return result


def _write(result: SearchResult, folder: RunFolder) -> None:
    """Keeps the result; result.json comes last, for it says that the run is finished."""
    for path, text in ((folder.path / "ranking.csv", result.to_csv()), (folder.result_path, result.to_json())):
        try:
            write_atomically(path, text.encode())
        except OSError as error:  # a full disk must not cost what was computed: it is returned
            _log.warning("%s: the result could not be written: %s", path, error.strerror)
            return


def _notes(loop: SearchLoop, scores: Scores | Race) -> tuple[str, ...]:
    notes = [f"{loop.nan_steps} updates were skipped: their loss was not finite."] if loop.nan_steps else []
    if isinstance(scores, Race):
        notes.append(
            f"Race for the top {len(scores.top)} at confidence {loop.config.confidence:g}: settled after "
            f"{scores.decided_after} of {scores.total} images, {100 * scores.share_seen:.0f}% of the scoring done. "
            "An accuracy on fewer images ranks below those on all of them; only the latter are compared with a truth."
        )
    return (*notes, *loop.method.notes())


def _latency(loop: SearchLoop, before_each: Callable[[], None]) -> Latency:
    data = loop.data
    return measure_latency(
        loop.space, loop.searched, num_classes=data.num_classes, in_channels=data.in_channels,
        image_size=data.image_size, device=loop.config.device, before_each=before_each,
    )  # fmt: skip


def _place(loop: SearchLoop) -> str:
    """Where a search is, and what is left of it if it ends there."""
    last = loop.step == loop.num_steps
    step = "after the last step" if last else f"step {loop.step} of {loop.num_steps} or soon after"
    kept = "nothing is kept without --out" if loop.config.out is None else "the last checkpoint is intact"
    return f"{step} ({kept})"


def _how_to_go_on(config: SearchConfig) -> str:
    return "; nothing is kept without --out" if config.out is None else f"; go on with --resume --out {config.out}"


def _tensorboard_writer() -> type[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard needs the tensorboard package: pip install 'bmsn[tensorboard]'") from error
    return SummaryWriter
