"""A run in this process: lists in a thread of its own, restores in the thread that calls."""

import queue
import threading
from collections.abc import Iterator
from typing import Final

from codeformer.bulk.job import Counts, Job
from codeformer.bulk.ledger import Row
from codeformer.bulk.report import Report
from codeformer.bulk.shards import Shard
from codeformer.errors import BulkError

# Shards that wait for a worker.
_WAITING: Final = 4
_LOOK_S: Final = 0.2


class Feed:
    """Makes shards in a thread of its own, so that listing and restoring overlap; to be closed.

    Args:
        shards: made lazily, in that thread.
        waiting: so many wait for a worker at most.
    """

    def __init__(self, shards: Iterator[Shard], waiting: int = _WAITING) -> None:
        self._shards = shards
        self._queue: queue.Queue[Shard | BaseException | None] = queue.Queue(waiting)
        self._is_closed = threading.Event()
        self.is_exhausted = False
        self._thread = threading.Thread(target=self._fill, name="codeformer-listing", daemon=True)
        self._thread.start()

    def next(self, timeout_s: float) -> Shard | None:
        """The next shard; None if there is none within some time, or none any more (see `is_exhausted`).

        Raises:
            SourceError: the source cannot be listed.
        """
        if self.is_exhausted:
            return None
        try:
            made = self._queue.get(timeout=timeout_s) if timeout_s else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(made, Shard):
            return made
        self.is_exhausted = True
        if made is not None:
            raise made
        return None

    def close(self) -> None:
        """Ends the thread, at the latest when the listing's next answer has come."""
        self._is_closed.set()
        self._thread.join(_LOOK_S)

    def _fill(self) -> None:
        end: BaseException | None = None
        try:
            for shard in self._shards:
                if not self._put(shard):
                    return
        except Exception as failure:  # noqa: BLE001 - raised again in the thread that asks
            end = failure
        self._put(end)

    def _put(self, made: Shard | BaseException | None) -> bool:
        while not self._is_closed.is_set():
            try:
                self._queue.put(made, timeout=_LOOK_S)
            except queue.Full:
                continue
            return True
        return False


def run_here(job: Job, feed: Feed, report: Report, stop: threading.Event) -> None:
    """Runs all shards in this process.

    Args:
        job: the run.
        feed: its shards.
        report: is kept up to date.
        stop: ends the run early when it is set.

    Raises:
        BulkError: the run cannot go on.
        CodeFormerError: it cannot start.
    """
    worker = None
    while not stop.is_set():
        shard = feed.next(_LOOK_S)
        report.is_listed = feed.is_exhausted
        report.show()
        if shard is None:
            if feed.is_exhausted:
                return
            continue
        if worker is None:
            from codeformer.bulk.worker import make_worker  # noqa: PLC0415 - torch is for work alone

            report.note = "loading the networks"
            worker = make_worker(job)
            report.note = ""

        def finished(row: Row) -> None:
            report.live.add_row(row)
            report.show()
            if report.has_too_many_errors:
                stop.set()

        try:
            outcome = worker.run(shard, stop, finished)
        finally:
            report.live = Counts()
        report.recorded.add(outcome.counts)
        if outcome.fatal:
            raise BulkError(outcome.fatal)
