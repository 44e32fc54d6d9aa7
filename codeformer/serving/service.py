"""Many requests at a time: fetched and decoded in threads, restored in turns, written for Cog to read.

Everything that waits, waits in the event loop; nothing that takes long runs in it.
"""

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from codeformer.engine.devices import describe_device
from codeformer.engine.memory import clear_frames_of
from codeformer.engine.picture import RestoredImage
from codeformer.engine.pipeline import Pipeline, recipe_for, recipe_of
from codeformer.engine.plan import plan_for
from codeformer.engine.precision import half_dtype_of
from codeformer.errors import CancelledError, CodeFormerError, DeviceError, InferenceError
from codeformer.imaging.files import check_size, decode_image, decode_photo, encode_result, size_of
from codeformer.limits import Deadline, Limits
from codeformer.options import DEFAULT_FIDELITY, Options, Output
from codeformer.serving.fetching import FetchPolicy
from codeformer.serving.outputs import OutputFolder
from codeformer.serving.request import (
    MAX_IMAGES,
    SAMPLES,
    Metrics,
    check_count,
    log_outcome,
    metrics_of,
    read_source,
)
from codeformer.serving.scheduler import Scheduler, Ticket
from codeformer.serving.shutdown import Keeper

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

# As many as Cog lets in at a time; predict.py has to repeat the number as a literal.
MAX_REQUESTS: Final = 8
# Decoders and encoders leave Python's lock to others while they work.
_FILE_THREADS: Final = 2 * (os.cpu_count() or 1)
_OUTPUT: Final = Output()
# How often a request that waits for others looks whether it is still wanted, in seconds.
_LOOK_S: Final = 0.25
# 1:1, 4:3, 3:2 and 16:9, both ways, as large as the detector sees them.
_COMMON_SIZES_WH: Final = (
    (640, 640),
    (853, 640),
    (640, 853),
    (960, 640),
    (640, 960),
    (1137, 640),
    (640, 1137),
)


class Service:
    """Serves requests until the process ends.

    Args:
        pipeline: loaded; nobody else may use it.
        limits: of each request, and of the pictures in memory.
        fetch_policy: from where addresses may be fetched.
        outputs: where results go.
        keeper: keeps the server from ending while there is work.
        batch_wait_s: as for `Scheduler`.
        give_up: likewise.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        fetch_policy: FetchPolicy,
        outputs: OutputFolder,
        keeper: Keeper,
        batch_wait_s: float = 0.0,
        give_up: Callable[[str], None] = logger.critical,
    ) -> None:
        self._pipeline = pipeline
        self._limits = limits
        self._fetch_policy = fetch_policy
        self._outputs = outputs
        self._keeper = keeper
        # Threads that fetch may wait for slow hosts, and must not keep the others from decoding.
        self._readers = ThreadPoolExecutor(MAX_REQUESTS * MAX_IMAGES, thread_name_prefix="codeformer-read")
        self._files = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="codeformer-files")
        self._scheduler = Scheduler(pipeline, batch_wait_s, give_up)
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._pixels = PixelBudget(int(limits.max_megapixels_in_work * 1e6))

    def is_alive(self) -> bool:
        """Whether the device and the thread that works with it are there."""
        return self._scheduler.is_alive() and self._pipeline.is_alive()

    async def serve(self, sources: Sequence[object], options: Options) -> tuple[list[Path], Metrics]:
        """Restores 1 to 4 pictures.

        When this call is cancelled, its work goes on to its next step and ends there; it counts as work until
        then.

        Args:
            sources: as for `read_source`.
            options: what is to be done.

        Returns:
            The files of the results, in order, and the metrics.

        Raises:
            CodeFormerError: as `serving.request.serve`.
            OutputError: the results cannot be written.
        """
        stop = threading.Event()
        work = asyncio.create_task(self._serve(sources, options, stop))

        def forget(done: asyncio.Task[tuple[list[Path], Metrics]]) -> None:
            failure = None if done.cancelled() else done.exception()
            if isinstance(failure, CodeFormerError):
                # Whoever keeps the failure keeps no pictures with it.
                clear_frames_of(failure)
            elif failure is None and stop.is_set() and not done.cancelled():
                # Whoever has cancelled this call takes no answer.
                self._outputs.discard(done.result()[0])

        work.add_done_callback(forget)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def _serve(
        self, sources: Sequence[object], options: Options, stop: threading.Event
    ) -> tuple[list[Path], Metrics]:
        with self._keeper.working():
            deadline = Deadline(self._limits.max_seconds, stop)
            async with self._slots:
                deadline.check("reading the pictures")
                return await self._restore(sources, options, deadline)

    async def _restore(
        self, sources: Sequence[object], options: Options, deadline: Deadline
    ) -> tuple[list[Path], Metrics]:
        started = time.perf_counter()
        plan = plan_for(options, self._pipeline.device)
        recipe = recipe_for(options)
        work = self._pipeline.work_for(recipe, options.selection, plan, self._limits, deadline)
        check_count(sources)
        failed = threading.Event()
        files = await self._all(
            [
                partial(self._read, source, number, deadline.or_when(failed))
                for number, source in enumerate(sources, start=1)
            ],
            self._readers,
            failed,
        )
        read = time.perf_counter()
        pixels = sum(pixels for _, pixels in files)
        async with self._pixels.taken(pixels, partial(deadline.check, "decoding")):
            let_in = time.perf_counter()
            photos = await self._all(
                [
                    partial(decode_photo, data, number, self._limits, _OUTPUT.metadata)
                    for number, (data, _) in enumerate(files, start=1)
                ],
                self._files,
                failed,
            )
            del files
            decoded = time.perf_counter()
            results: dict[int, RestoredImage] = {}
            jpegs: dict[int, Future[bytes]] = {}

            def take(index: int, result: RestoredImage) -> None:
                results[index] = result
                # At the same time as the device's work on other pictures.
                jpegs[index] = self._files.submit(
                    encode_result, photos[index], result.image_bgr, _OUTPUT, index + 1
                )

            ticket = Ticket([photo.image_bgr for photo in photos], work, take)
            self._scheduler.submit(ticket)
            waited_s = await asyncio.wrap_future(ticket.done)
            restored = time.perf_counter()
            ordered = [results[index] for index in range(len(photos))]
            encoded = [await asyncio.wrap_future(jpegs[index]) for index in range(len(photos))]
            paths = await self._in_thread(self._files, lambda: self._outputs.write(encoded))
            metrics = metrics_of(
                ordered,
                [self._pipeline.models.restorers[step.restorer] for step in recipe.steps],
                decode_s=decoded - let_in + read - started,
                wait_s=waited_s + let_in - read,
                encode_s=time.perf_counter() - restored,
                total_s=time.perf_counter() - started,
                degraded=self._pipeline.degraded,
            )
        log_outcome(ordered, metrics)
        return paths, metrics

    def _read(self, source: object, number: int, deadline: Deadline) -> tuple[bytes, int]:
        """A picture file, and its pixels by its header; 0 if that tells none, which decoding will say."""
        data = read_source(source, number, self._limits, self._fetch_policy, deadline)
        width, height = size_of(data)
        if width and height:
            check_size(width, height, number, self._limits)
        return data, width * height

    async def _all(
        self, calls: Sequence[Callable[[], ResultT]], pool: ThreadPoolExecutor, failed: threading.Event
    ) -> list[ResultT]:
        """The results of calls that run at the same time; or their first error, once all have ended."""
        tasks = [asyncio.create_task(self._in_thread(pool, call)) for call in calls]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        # Those that are still being fetched are given up, and what has failed by itself is told first.
        failed.set()
        await asyncio.wait(tasks)
        for task in sorted(tasks, key=lambda task: isinstance(task.exception(), CancelledError)):
            task.result()
        return [task.result() for task in tasks]

    async def _in_thread(self, pool: ThreadPoolExecutor, call: Callable[[], ResultT]) -> ResultT:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(pool, context.run, call)

    def warm_up(self) -> None:
        """As the function `warm_up`."""
        warm_up(self._pipeline, self._scheduler)


def warm_up(pipeline: Pipeline, scheduler: Scheduler) -> None:
    """Restores the sample portrait; before the first request and before there is an event loop.

    That request then finds everything loaded, and a broken device is noticed before it comes. The
    precision of the faster profiles is settled as well, which may take half a second of a CPU that
    nothing else should keep busy meanwhile.

    Raises:
        DeviceError: the device cannot run the networks.
    """
    started = time.perf_counter()
    device = pipeline.device
    results: dict[int, RestoredImage] = {}
    images = [decode_image((SAMPLES / "1.jpg").read_bytes())]
    if device.type == "cuda":
        # cuDNN's plans of the detector, for the shapes of picture that cameras take.
        images += [np.full((height, width, 3), 127, np.uint8) for width, height in _COMMON_SIZES_WH]
    # All restorers that are loaded, one after another.
    recipe = recipe_of("+".join(pipeline.models.restorers), DEFAULT_FIDELITY)

    def take(index: int, result: RestoredImage) -> None:
        results[index] = result
        # In the thread that will compute: with a second thread that has used OpenMP, its threads would
        # outnumber the cores, no longer wait actively for each other, and take a tenth more time.
        half_dtype_of(device)

    ticket = Ticket(images, pipeline.work_for(recipe), take)
    scheduler.submit(ticket)
    try:
        ticket.done.result()
    except InferenceError as cause:
        raise DeviceError(str(device), str(cause)) from cause
    if not results[0].faces:
        logger.warning("no face was found in the sample portrait: are these the right weights?")
    logger.info("fast and max_speed compute in %s", half_dtype_of(device) or "float32")
    logger.info(
        "ready on %s after a warm-up of %.1f s", describe_device(device), time.perf_counter() - started
    )


class PixelBudget:
    """Lets requests in as long as their pictures fit into memory together; first come, first served.

    Args:
        most: pixels. A request with more is let in alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._waiting: deque[object] = deque()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def taken(self, pixels: int, check: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
        """Holds a number of pixels; waits until they are free.

        Args:
            pixels: how many.
            check: called now and then while it waits; what it raises ends the waiting.
        """
        place = object()
        self._waiting.append(place)
        try:
            while self._waiting[0] is not place or (self._taken and self._taken + pixels > self._most):
                check()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._changed.wait()
            self._taken += pixels
        finally:
            self._waiting.remove(place)
            self._notify()
        try:
            yield
        finally:
            self._taken -= pixels
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
