"""Runs shards: the same code in this process, in a job of a batch system, and in an actor of Ray."""

import errno
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from codeformer.bulk.job import Counts, Job, Outcome
from codeformer.bulk.ledger import FAILED, RESTORED, Row
from codeformer.bulk.shards import Shard
from codeformer.bulk.sources import Entry
from codeformer.bulk.stores import Reader, open_store
from codeformer.engine.devices import available_device
from codeformer.engine.pipeline import Pipeline, RestoredImage, recipe_for
from codeformer.engine.plan import plan_for
from codeformer.engine.stages import STAGES
from codeformer.errors import (
    BulkError,
    CodeFormerError,
    DeviceError,
    ImageError,
    InferenceError,
    SourceError,
    TargetError,
)
from codeformer.imaging.encoding import check_format
from codeformer.imaging.files import DecodedPhoto, ImageU8, decode_photo, encode_result
from codeformer.process import tune_process
from codeformer.weights.manifest import load_weight_set

# Reading, decoding, encoding and writing, besides the thread that computes.
_FILE_THREADS: Final = 4
# A picture that was in so many dying workers' hands is not tried again.
MAX_STRIKES: Final = 3
# Pictures in a group, by the number of strikes: a worker's death is narrowed down to one picture in three
# steps.
_GROUP_SIZES: Final = (None, 16, 1)
# Failures of writing that are the fault of one picture's name; all others would befall every picture.
_NAME_ERRORS: Final = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EINVAL,
        errno.EILSEQ,
        errno.EEXIST,
        errno.ENOTEMPTY,
    }
)
WRITTEN: Final = "write"


def make_worker(job: Job) -> "Worker":
    """Loads the networks, in a process that is tuned for them.

    Raises:
        CodeFormerError: the device or the weights cannot be used.
    """
    torch.set_num_threads(job.threads)
    return Worker(job, job.loader(job) if job.loader else _load_pipeline(job))


def _load_pipeline(job: Job) -> Pipeline:
    device = available_device(job.device)
    tune_process(device)
    return Pipeline.load(
        load_weight_set(job.weights),
        device,
        restorers=job.restorers,
        progress=False,
        second_look=job.second_look,
    )


@dataclass
class _Task:
    """A picture on its way through a worker.

    Attributes:
        entry: where it is.
        row: what is known of it from the beginning.
        output: the name of its output; "" if it can have none.
        photo: once it is decoded, until it is written.
        pixels: how many.
        elapsed_ms: milliseconds by stage.
    """

    entry: Entry
    row: Row
    output: str
    photo: DecodedPhoto | None = None
    pixels: int = 0
    elapsed_ms: dict[str, float] = field(default_factory=dict)


class _FileError(Exception):
    """A picture's failure outside the engine, with its stage."""

    def __init__(self, stage: str, kind: str, text: str) -> None:
        self.stage, self.kind, self.text = stage, kind, text
        super().__init__(text)


class Worker:
    """Runs one shard after another.

    Args:
        job: the run.
        pipeline: its networks; used by the thread that calls `run`.

    Raises:
        CodeFormerError: the options do not suit the pipeline.
    """

    def __init__(self, job: Job, pipeline: Pipeline) -> None:
        self._job = job
        self._pipeline = pipeline
        self._plan = plan_for(job.options, pipeline.device)
        self._recipe = recipe_for(job.options)
        pipeline.check(self._plan, self._recipe)
        self._reader = Reader(job.source_query)
        self._target = open_store(job.target)
        self._ledger = job.open_ledger()
        self._digests = job.options_digest(), job.weights_digest()
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, shard: Shard, stop: threading.Event, finished: Callable[[Row], None]) -> Outcome:
        """Restores a shard's pictures, and records each.

        Args:
            shard: of which nothing is done that an earlier attempt has recorded.
            stop: to be set to end early: pictures that have been begun are finished and recorded.
            finished: called with each picture's row, a little before it is in the ledger.

        Raises:
            DeviceError: the device has failed, so that no picture is to blame.
        """
        counts = Counts()
        try:
            for number, group in enumerate(self._groups(shard)):
                if stop.is_set():
                    break
                self._run_group(shard, number, group, counts, stop, finished)
        except BulkError as failure:
            return Outcome(counts, str(failure))
        return Outcome(counts)

    def _groups(self, shard: Shard) -> Iterator[list[_Task]]:
        """What is left of a shard, cut into groups of which each gets a mark and a part."""
        tasks = [self._task(shard, at) for at in range(len(shard.entries))]
        if shard.attempt > 1:
            done, strikes = self._ledger.shard_so_far(shard)
            tasks = [
                replace(task, row=replace(task.row, attempt=task.row.attempt + strikes[task.row.key]))
                for task in tasks
                if task.row.key not in done
            ]
        for attempt, most in enumerate(_GROUP_SIZES, start=1):
            struck = [task for task in tasks if task.row.attempt == attempt]
            if struck:
                size = most or len(struck)
                yield from (struck[at : at + size] for at in range(0, len(struck), size))
        if lost := [task for task in tasks if task.row.attempt > MAX_STRIKES]:
            yield lost

    def _task(self, shard: Shard, at: int) -> _Task:
        entry = shard.entries[at]
        options, weights = self._digests
        row = Row(
            address=entry.address,
            place=shard.places[at],
            key=shard.keys[at],
            size=entry.size,
            etag=entry.etag,
            options=options,
            weights=weights,
            status=FAILED,
            attempt=shard.strikes[at] + 1,
            worker=self._name,
        )
        name = self._job.output_name(entry.name, shard.places[at])
        return _Task(entry, row, name or "")

    def _run_group(
        self,
        shard: Shard,
        number: int,
        tasks: Sequence[_Task],
        counts: Counts,
        stop: threading.Event,
        finished: Callable[[Row], None],
    ) -> None:
        """Marks, restores and records a group; counts what is in the ledger."""
        rows: list[Row] = []

        def keep(row: Row) -> None:
            rows.append(row)
            finished(row)

        def record() -> None:
            self._ledger.write_part(shard, number, rows)
            for row in rows:
                counts.add_row(row)

        if tasks[0].row.attempt > MAX_STRIKES:
            for task in tasks:
                row = _failed(task, "worker", "WorkerDied", _killed(shard))
                keep(replace(row, attempt=MAX_STRIKES))
            record()
            return
        mark = self._ledger.begin(shard, number, [task.row.key for task in tasks])
        try:
            self._restore(tasks, stop, keep)
        except BulkError:
            # Nothing has killed the worker, and what is finished need not be done again.
            record()
            self._ledger.end(mark)
            raise
        record()
        self._ledger.end(mark)

    def _restore(self, tasks: Sequence[_Task], stop: threading.Event, keep: Callable[[Row], None]) -> None:
        """Reads and decodes ahead, encodes and writes behind; every picture that is begun is kept."""
        selection, limits = self._job.options.selection, self._job.limits
        flight = _Flight(limits.max_megapixels_in_work * 1e6)
        with ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="codeformer-files") as files:
            try:
                for task, result in self._pipeline.stream(
                    self._decoded(tasks, files, flight, stop), self._recipe, selection, self._plan, limits
                ):
                    if isinstance(result, CodeFormerError):
                        self._check_device(result)
                        flight.pixels -= task.pixels
                        keep(_failed_in_engine(task, result))
                    else:
                        flight.writing[files.submit(self._finish, task, result)] = task
                    while len(flight.writing) > (0 if flight.is_full else 2 * _FILE_THREADS):
                        flight.land(keep)
                while flight.writing:
                    flight.land(keep)
            finally:
                # Left after a failure or Ctrl-C: what is being written is recorded, what waits is not begun.
                files.shutdown(wait=True, cancel_futures=True)
                for future in flight.writing:
                    if not future.cancelled() and future.exception() is None:
                        keep(future.result())

    def _decoded(
        self, tasks: Sequence[_Task], files: ThreadPoolExecutor, flight: "_Flight", stop: threading.Event
    ) -> Iterator[tuple[_Task, ImageU8 | CodeFormerError]]:
        """Decoded pictures in order; a few are decoded ahead, one if large ones are in memory."""
        ahead: deque[tuple[_Task, Future[DecodedPhoto]]] = deque()
        waiting = deque(tasks)
        while ahead or (waiting and not stop.is_set()):
            while waiting and not stop.is_set() and len(ahead) < (1 if flight.is_full else _FILE_THREADS):
                task = waiting.popleft()
                ahead.append((task, files.submit(self._load, task)))
            if not ahead:
                return
            task, future = ahead.popleft()
            try:
                photo = task.photo = future.result()
            except _FileError as failure:
                yield task, _PassedError(failure)
            else:
                image = photo.image_bgr
                task.pixels = image.shape[0] * image.shape[1]
                flight.pixels += task.pixels
                yield task, image

    def _load(self, task: _Task) -> DecodedPhoto:
        """Reads and decodes a picture.

        Raises:
            _FileError: the picture cannot be read or decoded.
            SourceError: the whole source is gone.
        """
        entry, limits = task.entry, self._job.limits
        if not task.output:
            raise _FileError(
                "read", "Name", "its name has empty parts, '.' or '..', so its output would have none."
            )
        if self._job.source_root is None and self._is_in_target(entry.address):
            raise _FileError("read", "InTarget", "it lies in the target, where an output could replace it.")
        started = time.perf_counter()
        try:
            size, data = self._reader.read(entry.address, limits.max_bytes)
        except OSError as cause:
            self._check_source(cause)
            reason = cause.strerror or str(cause).splitlines()[0][:300]
            raise _FileError("read", type(cause).__name__, f"the file cannot be read ({reason}).") from cause
        except BulkError as cause:
            raise _FileError("read", type(cause).__name__, str(cause)) from cause
        read = time.perf_counter()
        task.elapsed_ms["read"] = (read - started) * 1e3
        try:
            limits.check_bytes(size, 1)
            photo = decode_photo(data, None, limits, self._job.output.metadata)
            check_format(photo.image_bgr, self._job.output)
        except ImageError as cause:
            raise _FileError("decode", type(cause).__name__, cause.reason) from cause
        else:
            return photo
        finally:
            task.elapsed_ms["decode"] = (time.perf_counter() - read) * 1e3

    def _finish(self, task: _Task, result: RestoredImage) -> Row:
        """Encodes and writes a picture.

        Raises:
            TargetError: the target takes no more.
        """
        photo, task.photo = task.photo, None
        if photo is None:
            raise AssertionError(f"{task.entry.address}: restored, but not decoded")
        started = time.perf_counter()
        try:
            data = encode_result(photo, result.image_bgr, self._job.output)
        except ImageError as cause:
            return _failed(task, "encode", type(cause).__name__, cause.reason)
        encoded = time.perf_counter()
        try:
            self._target.write(task.output, data)
        except OSError as cause:
            if cause.errno in _NAME_ERRORS:
                return _failed(task, WRITTEN, type(cause).__name__, str(cause.strerror))
            raise TargetError(
                f"{self._target.address(task.output)}: expected to write an output, got: {cause}. Make "
                "room there or make it writable, and start the run again; it goes on where it stopped."
            ) from cause
        task.elapsed_ms |= {stage: result.elapsed_ms.get(stage, 0.0) for stage in STAGES}
        task.elapsed_ms |= {
            "encode": (encoded - started) * 1e3,
            WRITTEN: (time.perf_counter() - encoded) * 1e3,
        }
        return _timed(
            replace(
                task.row,
                status=RESTORED,
                output=task.output,
                faces_found=len(result.faces) + len(result.skipped_faces),
                faces_restored=len(result.faces),
                faces_skipped=len(result.skipped_faces),
                skip_reasons=tuple(face.reason for face in result.skipped_faces),
            ),
            task,
        )

    def _is_in_target(self, address: str) -> bool:
        root = self._target.root
        if "://" not in root and "://" not in address:
            return os.path.realpath(address).startswith(os.path.realpath(root) + os.sep)
        return address.startswith(f"{root}/")

    def _check_device(self, failure: CodeFormerError) -> None:
        """Raises DeviceError where a picture has failed because the device computes no more."""
        if isinstance(failure, InferenceError) and not self._pipeline.is_alive():
            raise DeviceError(str(self._pipeline.device), str(failure))

    def _check_source(self, cause: OSError) -> None:
        """Raises SourceError where a picture cannot be read because the whole source is gone."""
        root = self._job.source_root
        if root is None:
            return
        try:
            if open_store(root + (f"?{query}" if (query := self._job.source_query) else "")).exists():
                return
        except OSError as failure:
            cause = failure
        raise SourceError(
            f"{root}: the source is gone or cannot be reached ({cause}). Bring it back and start the run "
            "again; it goes on where it stopped."
        ) from cause


@dataclass
class _Flight:
    """What is in memory: pictures that are decoded and not yet written.

    Attributes:
        most_pixels: from which on no more pictures are decoded ahead.
        pixels: of all of them.
        writing: those that are being encoded and written.
    """

    most_pixels: float
    pixels: int = 0
    writing: dict[Future[Row], _Task] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.pixels >= self.most_pixels

    def land(self, keep: Callable[[Row], None]) -> None:
        """Waits for one picture at least to be written, and keeps those that are."""
        done, _ = wait(self.writing, return_when=FIRST_COMPLETED)
        for future in done:
            self.pixels -= self.writing.pop(future).pixels
            keep(future.result())


class _PassedError(CodeFormerError):
    """A failure on its way through the stream, in the place of a picture."""

    def __init__(self, failure: _FileError) -> None:
        self.failure = failure
        super().__init__(failure.text)


def _failed_in_engine(task: _Task, failure: CodeFormerError) -> Row:
    if isinstance(failure, _PassedError):
        inner = failure.failure
        return _failed(task, inner.stage, inner.kind, inner.text)
    stage = failure.stage if isinstance(failure, InferenceError) else "detect"
    return _failed(task, stage, type(failure).__name__, failure.local)


def _failed(task: _Task, stage: str, kind: str, text: str) -> Row:
    return _timed(replace(task.row, status=FAILED, error_stage=stage, error_kind=kind, error=text), task)


def _timed(row: Row, task: _Task) -> Row:
    times: dict[str, Any] = {f"{stage}_ms": elapsed for stage, elapsed in task.elapsed_ms.items()}
    return replace(row, finished=time.time_ns() // 1000, **times)


def _killed(shard: Shard) -> str:
    """Why a picture is set aside."""
    last = f"; the last one: {shard.last_words}" if shard.last_words else ""
    return (
        f"{MAX_STRIKES} workers died with this picture in their hands, the last one with nothing "
        f"else{last}. It is set aside; --retry-errors tries it again."
    )
