"""Who is served next: one thread owns the device and takes the faces of all waiting requests.

Requests take turns. A request's first turn finds its faces; each later one takes one of its faces to the
networks, together with as many faces of other requests as may share the pass (`BatchKey`) and fit into it. So
a request with 200 faces delays the others by no more than its share, and the device does not wait for a batch
to fill up, unless it is told to. Requests of `baseline` never share a pass.
"""

import contextlib
import contextvars
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType

from codeformer.engine.engine import FaceJob, FaceResult
from codeformer.engine.memory import clear_frames_of
from codeformer.engine.picture import Picture, RestoredImage
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.stream import Progress, Work, find_faces, take_result
from codeformer.errors import CodeFormerError, DeviceError
from codeformer.imaging.files import ImageU8
from codeformer.log import operator_logger

logger = logging.getLogger(__name__)

OnResult = Callable[[int, RestoredImage], None]


class Ticket:
    """A request in the scheduler's hands.

    Args:
        images: (H, W, 3) uint8 BGR pictures, upright; not altered.
        work: what is to be done to them.
        on_result: called in the scheduler's thread with a picture's index and result, as soon as it is there.

    Attributes:
        done: the seconds that the request has waited for its first turn, once all of its results are there;
            or what it failed with.
        progress: how many faces it has, and how many are restored.
        ready_at: when its faces were found, or the search for them began; None before its first turn.
    """

    def __init__(self, images: Sequence[ImageU8], work: Work, on_result: OnResult) -> None:
        self.work = work
        self.done: Future[float] = Future()
        self.pictures = [work.picture(image, number) for number, image in enumerate(images, start=1)]
        self.faces: deque[tuple[Picture, FaceJob]] = deque()
        self.ready_at: float | None = None
        self._on_result = on_result
        self.progress = Progress()
        # Where log lines go may depend on the caller's context.
        self._context = contextvars.copy_context()
        self._submitted = time.monotonic()
        self._waited_s = 0.0

    def fail(self, failure: BaseException) -> None:
        """Ends the request, if it has not ended yet."""
        self.faces.clear()
        self.pictures.clear()
        if not self.done.done():
            self.done.set_exception(failure)

    def is_to_go_on(self) -> bool:
        """Whether there is still somebody to work for; ends it if it was cancelled or is too late."""
        with _Blame([self]):
            where = f"restore of {self.faces[0][1].where}" if self.faces else "detect of its pictures"
            self.work.deadline.check(where)
        return not self.done.done()

    def run(self, step: Callable[[], None]) -> None:
        """Runs a step of this request in its own context; what it raises ends the request."""
        with _Blame([self]):
            self._context.run(step)

    def prepare(self, pipeline: Pipeline) -> None:
        """Finds the faces of all pictures."""
        self._waited_s = time.monotonic() - self._submitted
        self.ready_at = time.monotonic()
        self.run(partial(self._prepare, pipeline))

    def _prepare(self, pipeline: Pipeline) -> None:
        pipeline.store.initialise(self.work.key.plan)
        for picture, jobs in find_faces(self.pictures, pipeline.store, self.work):
            self.faces.extend((picture, job) for job in jobs)
            self.progress.found += len(jobs)
        self.ready_at = time.monotonic()
        self._deliver(pipeline)

    def finish(
        self, pipeline: Pipeline, taken: Sequence[tuple[Picture, FaceJob]], results: Sequence[FaceResult]
    ) -> None:
        """Takes the results of its faces in."""
        self.run(partial(self._finish, pipeline, taken, results))

    def _finish(
        self,
        pipeline: Pipeline,
        taken: Sequence[tuple[Picture, FaceJob]],
        results: Sequence[FaceResult],
    ) -> None:
        for (picture, job), result in zip(taken, results, strict=True):
            if picture.error is None:
                picture.finish(job, result)
        self.progress.add(len(taken))
        self._deliver(pipeline)

    def _deliver(self, pipeline: Pipeline) -> None:
        """Hands out the pictures that are complete; the first that has failed fails the request."""
        for picture in [picture for picture in self.pictures if picture.is_complete]:
            self.pictures.remove(picture)
            result = take_result(picture, pipeline.store, self.work)
            if isinstance(result, CodeFormerError):
                raise result
            self._on_result(picture.number - 1, result)
        if not self.pictures:
            self.done.set_result(self._waited_s)


class _Blame:
    """Ends requests with whatever is raised inside, so that it reaches whoever waits for them."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, failure: BaseException | None, _where: TracebackType | None
    ) -> bool:
        if failure is not None:
            if not isinstance(failure, CodeFormerError):
                operator_logger.error("a request met a bug", exc_info=failure)
            # Whoever keeps the failure keeps no pictures with it.
            clear_frames_of(failure)
            for number, ticket in enumerate(self._tickets):
                ticket.fail(_copy_of(failure) if number else failure)
        return True


def _copy_of(failure: BaseException) -> BaseException:
    """The same failure for somebody else: whoever raises one changes its traceback and context."""
    # Without __init__, whose arguments are not known.
    copied = type(failure).__new__(type(failure), *failure.args)
    copied.__dict__.update(failure.__dict__)
    copied.__cause__, copied.__suppress_context__ = failure.__cause__, failure.__suppress_context__
    return copied


def _over() -> DeviceError:
    return DeviceError("the device", "nothing works with it any more; the server ends.")


class Scheduler:
    """Serves requests in turns, in a thread of its own.

    Args:
        pipeline: whose device and networks nobody else uses from now on.
        wait_s: how long a pass that is not full waits for other requests.
        give_up: called with the reason when neither this request nor any other can be served any more.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        wait_s: float = 0.0,
        give_up: Callable[[str], None] = logger.critical,
    ) -> None:
        self._pipeline = pipeline
        self._wait_s = wait_s
        self._give_up = give_up
        self._new: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._turns: deque[Ticket] = deque()
        self._is_over = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="codeformer-device", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread is there to work."""
        return self._thread.is_alive()

    def submit(self, ticket: Ticket) -> None:
        """Hands a request over; from any thread. To cancel it, set the stop of its deadline."""
        if self._is_over:
            ticket.fail(_over())
        self._new.put(ticket)

    def close(self) -> None:
        """Lets the thread end when it has served everybody; for a program that goes on without it."""
        self._new.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._turns or not self._is_closed:
                if not self._turns:
                    self._receive()
                    continue
                self._take_a_turn(self._turns[0])
                # Whoever has come meanwhile is served before the one that has just been.
                self._admit()
                self._turns.rotate(-1)
                self._drop_finished()
        finally:
            self._is_over = True
            if not self._is_closed:
                self._give_up("the thread that works with the device has ended")
            self._admit()
            for ticket in self._turns:
                ticket.fail(_over())

    def _receive(self, timeout: float | None = None) -> None:
        """Takes the next new request in.

        Raises:
            queue.Empty: there is none in this time.
        """
        ticket = self._new.get(timeout=timeout)
        if ticket is None:
            self._is_closed = True
        else:
            self._turns.append(ticket)

    def _admit(self) -> None:
        """Takes all new requests in, without waiting for any."""
        while not self._new.empty():
            self._receive()

    def _take_a_turn(self, ticket: Ticket) -> None:
        if not ticket.is_to_go_on():
            return
        if ticket.ready_at is None:
            ticket.prepare(self._pipeline)
            return
        self._wait_for_others(ticket)
        self._bring_along(ticket)
        self._restore(self._choose(ticket))

    def _bring_along(self, ticket: Ticket) -> None:
        """Finds the faces of requests that may share the pass, until it is full."""
        for other in self._turns:
            if other.ready_at is None and other.work.key == ticket.work.key and self._has_room(ticket):
                other.prepare(self._pipeline)

    def _wait_for_others(self, ticket: Ticket) -> None:
        """Waits for new requests while the pass is not full, as long as it may."""
        until = (ticket.ready_at or 0.0) + self._wait_s
        while self._has_room(ticket) and (left_s := until - time.monotonic()) > 0:
            self._bring_along(ticket)
            if self._has_room(ticket):
                with contextlib.suppress(queue.Empty):
                    self._receive(left_s)

    def _has_room(self, ticket: Ticket) -> bool:
        return self._waiting_faces(ticket) < ticket.work.key.plan.micro_batch

    def _sharing(self, ticket: Ticket) -> list[Ticket]:
        """The request, and those that may share a pass with it, in the order of their turns."""
        if ticket.work.key.plan.micro_batch == 1:
            return [ticket]
        return [other for other in self._turns if other.faces and other.work.key == ticket.work.key]

    def _waiting_faces(self, ticket: Ticket) -> int:
        return sum(len(other.faces) for other in self._sharing(ticket))

    def _choose(self, ticket: Ticket) -> dict[Ticket, list[tuple[Picture, FaceJob]]]:
        """The faces of the next pass: one of each request in turn, the leading one first, until full."""
        size = self._pipeline.engine.batch_size(ticket.work.key, self._waiting_faces(ticket))
        chosen: dict[Ticket, list[tuple[Picture, FaceJob]]] = {}
        sharing = deque(self._sharing(ticket))
        while size and sharing:
            other = sharing.popleft()
            if not other.is_to_go_on():
                continue
            chosen.setdefault(other, []).append(other.faces.popleft())
            size -= 1
            if other.faces:
                sharing.append(other)
        return chosen

    def _restore(self, chosen: dict[Ticket, list[tuple[Picture, FaceJob]]]) -> None:
        jobs = [job for taken in chosen.values() for _, job in taken]
        if not jobs:
            return
        results: list[FaceResult] = []

        def run() -> None:
            results.extend(self._pipeline.engine.run(jobs))

        if len(chosen) == 1:
            [ticket] = chosen
            ticket.run(run)
        else:
            # What is logged of several requests at once belongs to none of them.
            with _Blame(list(chosen)):
                run()
        if len(results) < len(jobs):
            return
        remaining = deque(results)
        for ticket, taken in chosen.items():
            own = [remaining.popleft() for _ in taken]
            if not ticket.done.done():
                ticket.finish(self._pipeline, taken, own)

    def _drop_finished(self) -> None:
        finished = [ticket for ticket in self._turns if ticket.done.done()]
        for ticket in finished:
            self._turns.remove(ticket)
            failure = None if ticket.done.cancelled() else ticket.done.exception()
            if isinstance(failure, RuntimeError) and not self._pipeline.is_alive():
                self._give_up(str(failure))
        if not any(ticket.work.key.plan.optimized for ticket in self._turns):
            self._pipeline.store.drop_unproven()
