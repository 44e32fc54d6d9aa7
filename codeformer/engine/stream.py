"""Pictures in, results out: a bounded window of pictures, whose faces share passes of the networks."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

import numpy as np

from codeformer.engine.engine import BatchKey, Engine, FaceJob
from codeformer.engine.finder import FaceFinder, FoundFaces
from codeformer.engine.memory import release_failed_attempt
from codeformer.engine.models import ModelStore
from codeformer.engine.picture import Picture, RestoredImage
from codeformer.engine.plan import torch_switches
from codeformer.engine.stages import run_stage
from codeformer.errors import CodeFormerError, DeviceMemoryError, ImageError, InferenceError
from codeformer.imaging.files import ImageU8, check_size
from codeformer.imaging.geometry import FACE_SIZE
from codeformer.limits import Deadline, Limits
from codeformer.options import Recipe, Selection

logger = logging.getLogger(__name__)

KeyT = TypeVar("KeyT")

DEFAULT_WINDOW: Final = 8
# Pictures of one pass of the detector, where pictures may share one.
_DETECTED_TOGETHER: Final = 4
_SECONDS_BETWEEN_LINES: Final = 1.0


@dataclass(frozen=True)
class Work:
    """What is to be done to all pictures of a stream.

    Attributes:
        key: how it runs.
        recipe: what is done to a face.
        selection: which faces.
        limits: of pixels and faces in a picture.
        deadline: of all together.
        second_look: see `codeformer.engine.finder`.
        window: so many pictures are held in memory at most.
        aligned: each picture is the aligned crop of one face.
        keep_crops: fill `RestoredImage.crops`.
    """

    key: BatchKey
    recipe: Recipe
    selection: Selection
    limits: Limits
    deadline: Deadline
    second_look: bool
    window: int
    aligned: bool = False
    keep_crops: bool = False

    def picture(self, image_bgr: ImageU8, number: int) -> Picture:
        """A picture to which this is done.

        Args:
            image_bgr: (H, W, 3) uint8 BGR, upright; not altered.
            number: its place among the others, from 1.
        """
        return Picture(image_bgr, number, self.key, self.recipe, self.selection, keep_crops=self.keep_crops)


def stream(
    engine: Engine,
    store: ModelStore,
    pictures: Iterable[tuple[KeyT, ImageU8 | CodeFormerError]],
    work: Work,
) -> Iterator[tuple[KeyT, RestoredImage | CodeFormerError]]:
    """Restores pictures as they come; gives each as soon as its last face is in.

    Args:
        engine: does the work.
        store: has the detector.
        pictures: with keys of the caller's own; an error in the place of a picture is passed on.
        work: what is to be done.

    Yields:
        Each key once, with the picture's result or the error that it ended in.

    Raises:
        TimeLimitError: the deadline is over.
        CancelledError: it was cancelled.
    """
    source = enumerate(pictures, start=1)
    keys: dict[int, KeyT] = {}
    in_work: deque[Picture] = deque()
    waiting: deque[tuple[Picture, FaceJob]] = deque()
    progress = Progress()
    is_drained = False

    while True:
        while not is_drained and len(in_work) < work.window and len(waiting) < work.key.plan.micro_batch:
            together = _DETECTED_TOGETHER if work.key.plan.batch_detection else 1
            drawn = list(islice(source, min(together, work.window - len(in_work))))
            is_drained = not drawn
            usable = []
            for number, (key, image) in drawn:
                if isinstance(image, CodeFormerError):
                    yield key, image
                elif (problem := _problem_of(image, number, work)) is not None:
                    yield key, problem
                else:
                    keys[number] = key
                    usable.append(work.picture(image, number))
            for picture, jobs in find_faces(usable, store, work):
                waiting.extend((picture, job) for job in jobs)
                progress.found += len(jobs)
                in_work.append(picture)
            yield from _completed(in_work, keys, store, work)
        if not waiting:
            if is_drained:
                return
            continue
        batch = [waiting.popleft() for _ in range(engine.batch_size(work.key, len(waiting)))]
        jobs = [job for _, job in batch]
        work.deadline.check(f"restore of {', '.join(job.where for job in jobs)}")
        for (picture, job), result in zip(batch, engine.run(jobs), strict=True):
            if picture.error is None:
                picture.finish(job, result)
        waiting = deque((picture, job) for picture, job in waiting if picture.error is None)
        progress.add(len(batch))
        yield from _completed(in_work, keys, store, work)


def _completed(
    in_work: deque[Picture], keys: dict[int, KeyT], store: ModelStore, work: Work
) -> Iterator[tuple[KeyT, RestoredImage | CodeFormerError]]:
    """Takes the pictures out that are done, in their order."""
    for picture in [picture for picture in in_work if picture.is_complete]:
        in_work.remove(picture)
        yield keys.pop(picture.number), take_result(picture, store, work)


def take_result(picture: Picture, store: ModelStore, work: Work) -> RestoredImage | CodeFormerError:
    """What has become of a picture that is complete."""
    if picture.error is not None:
        return picture.error
    try:
        result = picture.result()
    except InferenceError as failure:
        return failure
    store.prove(work.key.plan, with_a_face=bool(result.faces))
    return result


def find_faces(
    pictures: Sequence[Picture], store: ModelStore, work: Work
) -> Iterator[tuple[Picture, list[FaceJob]]]:
    """The jobs of each picture; none for one that has failed or has no face.

    Raises:
        TimeLimitError: the deadline is over.
        CancelledError: it was cancelled.
    """
    all_found = [None] * len(pictures) if work.aligned else _detect(pictures, store, work)
    for picture, found in zip(pictures, all_found, strict=True):
        jobs: list[FaceJob] = []
        if isinstance(found, CodeFormerError):
            picture.fail(found)
        else:
            try:
                if found is None:
                    jobs = picture.prepare_aligned()
                else:
                    jobs = picture.prepare(found, work.limits.max_faces)
            except CodeFormerError as failure:
                picture.fail(failure)
        yield picture, jobs


def _detect(
    pictures: Sequence[Picture], store: ModelStore, work: Work, *, is_second_try: bool = False
) -> list[FoundFaces | InferenceError]:
    """What is in each picture, or why that cannot be told.

    Pictures that together do not fit into memory, or of which one fails, are looked at one by one.
    """
    if not pictures:
        return []
    device = work.key.plan.device
    where = ", ".join(picture.name for picture in pictures)
    work.deadline.check(f"detect of {where}")
    try:
        # Pictures differ in size, and each new size would cost the detector cuDNN's trials.
        with torch_switches(cudnn_benchmark=False), run_stage("detect", where, device) as span:
            found = _look(pictures, store, work)
    except InferenceError as failure:
        lacks_memory = isinstance(failure, DeviceMemoryError)
        if lacks_memory:
            release_failed_attempt(failure, device)
        if len(pictures) == 1 and (is_second_try or not lacks_memory):
            return [failure]
        logger.warning("%s Trying again, one picture at a time.", failure)
        answers: list[FoundFaces | InferenceError] = []
        for picture in pictures:
            if lacks_memory:
                picture.add_shortage()
            answers += _detect([picture], store, work, is_second_try=True)
        return answers
    for picture in pictures:
        picture.add_time("detect", span, 1 / len(pictures))
    return list(found)


def _look(pictures: Sequence[Picture], store: ModelStore, work: Work) -> list[FoundFaces]:
    plan = work.key.plan
    detector = store.models_for(plan).detector
    working = [picture.working for picture in pictures]
    if work.second_look:
        return FaceFinder(detector).find(
            working,
            batched=plan.batch_detection,
            at_most=work.limits.max_faces + 1,
            before_look=lambda: work.deadline.check("detection"),
        )
    found = detector.detect([copy.image_bgr for copy in working], batched=plan.batch_detection)
    return [FoundFaces(faces, [], 0) for faces in found]


def _problem_of(image: object, number: int, work: Work) -> ImageError | None:
    """Why an array cannot be restored; None if it can."""
    try:
        check_array(image, number, work.limits, aligned=work.aligned)
    except ImageError as problem:
        return problem
    return None


def check_array(image: object, number: int, limits: Limits, *, aligned: bool = False) -> None:
    """Raises ImageError when something is no picture (H, W, 3) uint8, or one over a limit.

    Args:
        image: what came.
        number: its place, from 1, for the message.
        limits: of pixels.
        aligned: it has to be a crop of 512 x 512 px.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"expected a uint8 array, got a {kind}.", number)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"expected the shape (H, W, 3) in BGR, got {image.shape}.", number)
    check_size(image.shape[1], image.shape[0], number, limits)
    if aligned and image.shape[:2] != (FACE_SIZE, FACE_SIZE):
        raise ImageError(
            f"expected an aligned face of {FACE_SIZE} x {FACE_SIZE} px, got {image.shape[1]} x "
            f"{image.shape[0]} px; restore it as a whole photo, without aligned, or cut aligned faces out "
            "with `codeformer faces`.",
            number,
        )


class Progress:
    """Says in the log how far it is, once a second at most.

    Attributes:
        found: faces that are to be restored, of the pictures that have been searched.
        restored: how many of them are.
    """

    def __init__(self) -> None:
        self.found = 0
        self.restored = 0
        self._last = time.monotonic()

    def add(self, faces: int) -> None:
        """Counts faces that are restored."""
        self.restored += faces
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            logger.info("%d of %d faces are restored", self.restored, self.found)
