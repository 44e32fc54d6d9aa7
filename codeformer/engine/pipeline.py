"""The front door: pictures in, pictures with restored faces out.

Data flows one way: picture, working copy, detections, aligned crops, restored crops, masks, picture.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from codeformer.engine.canvas import Canvas, DeviceCanvas, HostCanvas
from codeformer.engine.clock import Stage, StageClock
from codeformer.engine.finder import FaceFinder, FoundFaces, is_second_look_on
from codeformer.engine.graphs import recording_lock
from codeformer.engine.memory import (
    batch_size_for,
    is_out_of_memory,
    release_cached_memory,
)
from codeformer.engine.models import Models, ModelStore, load_models
from codeformer.engine.plan import ExecutionPlan, as_device, available_device, resolve_plan, torch_switches
from codeformer.engine.restorer import match_gray
from codeformer.errors import (
    DeviceMemoryError,
    FaceLimitError,
    ImageError,
    InferenceError,
    NonFiniteOutputError,
    OptionError,
    in_words,
)
from codeformer.imaging.files import ImageU8, check_size
from codeformer.imaging.geometry import (
    FACE_SIZE,
    AlignedFace,
    Face,
    WorkingCopy,
    align_faces,
    from_far_to_near,
    make_working_copy,
)
from codeformer.imaging.traits import Area, gray_area, is_gray, loses_detail
from codeformer.limits import DEFAULT_LIMITS, Deadline, Limits
from codeformer.log import operator_logger
from codeformer.options import DEFAULT_FIDELITY, check_fidelity
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import WeightSet, load_weight_set

logger = logging.getLogger(__name__)

# Up to so many faces a request's progress is not worth a log line.
_QUIET_FACES: Final = 10
# How long a health check waits for a recording to end, in seconds.
_BUSY_S: Final = 1.0
# What torch, its compiler, OpenCV and our adapters raise; anything else is a bug and keeps its own name.
_STAGE_ERRORS: Final = (RuntimeError, MemoryError, cv2.error, FailOnRecompileLimitHit, NonFiniteOutputError)


@dataclass(frozen=True)
class RestoredImage:
    """What became of one picture.

    Attributes:
        image_bgr: (H, W, 3) uint8 BGR, the input's size; equal to the input outside the faces.
        faces: the restored faces, best score first, in coordinates of the picture.
        skipped_faces: for each detected face that was left as it is, the reason.
        faces_losing_detail: sharp restored faces that are larger than their 512 px crop: they may come back
            softer than they were.
        elapsed_ms: milliseconds by stage (detect, align, restore, parse, paste). A stage that worked
            on a batch counts in equal shares for its items, so that the sum over a request's pictures
            is the time that passed.
        float32_retries: batches with faces of this picture whose half-precision output, of the restorer or
            the parser, was not finite and that ran again in float32.
        memory_retries: batches with faces of this picture that did not fit into the device's memory and ran
            again in smaller ones.
    """

    image_bgr: ImageU8
    faces: tuple[Face, ...]
    skipped_faces: tuple[str, ...]
    faces_losing_detail: int
    elapsed_ms: Mapping[str, float]
    float32_retries: int
    memory_retries: int


@dataclass(frozen=True)
class _FaceJob:
    """An aligned face on its way through the networks; `gray_area` is None for one in colour."""

    picture: int
    number: int
    aligned: AlignedFace
    gray_area: Area | None


class Pipeline:
    """Restores the faces of pictures; loaded once, used for many requests, one at a time.

    Args:
        models: the networks behind their adapters, all on `device`.
        device: where they run.
        second_look: look again where a detection is in doubt, see `codeformer.engine.finder`; without it each
            detection is taken for an upright face, as upstream does.
    """

    def __init__(self, models: Models, device: torch.device, *, second_look: bool = True) -> None:
        self.device = as_device(device)
        self.second_look = second_look
        self._store = ModelStore(models)

    @property
    def models(self) -> Models:
        """The networks of safe mode."""
        return self._store.reference

    @classmethod
    def load(
        cls,
        weights: WeightSet | str | Path | None = None,
        device: torch.device | str | None = None,
        *,
        download: bool = True,
        progress: bool = True,
        second_look: bool | None = None,
    ) -> "Pipeline":
        """Loads the networks of a weight set.

        Args:
            weights: a set, its name or its folder; None for `CODEFORMER_WEIGHTS`, else "official".
            device: where to run; None for CUDA where there is one, else the CPU.
            download: fetch files that are missing.
            progress: show a progress bar while fetching.
            second_look: as for `Pipeline`; None for `CODEFORMER_SECOND_LOOK`, else on.

        Raises:
            OptionError: there is no such device, or CODEFORMER_SECOND_LOOK is neither on nor off.
            WeightsError: the set or one of its files cannot be used or fetched.
        """
        chosen = available_device(device)
        if second_look is None:
            second_look = is_second_look_on()
        weight_set = weights if isinstance(weights, WeightSet) else load_weight_set(weights)
        if download:
            fetch_set(weight_set, progress=progress)
        return cls(load_models(weight_set, chosen), chosen, second_look=second_look)

    def is_alive(self) -> bool:
        """Whether the device computes, by a sum of a few numbers.

        One that records a graph, or whose memory is full of work, does.
        """
        if not recording_lock.acquire(timeout=_BUSY_S):
            return True
        try:
            return float(torch.ones(8, device=self.device).sum()) == 8
        except RuntimeError as cause:
            if is_out_of_memory(cause):
                return True
            logger.warning("%s does not compute any more: %s", self.device, cause)
            return False
        finally:
            recording_lock.release()

    def check(self, plan: ExecutionPlan) -> None:
        """Raises what `restore` would raise for this plan, before any work.

        Raises:
            BackendConflictError: this process uses another compile backend in optimized mode.
            OptionError: the plan is for another device.
        """
        if plan.device != self.device:
            raise OptionError("plan.device", str(plan.device), f"{self.device}, where the networks are")
        self._store.check(plan)

    def restore(
        self,
        images: Sequence[ImageU8],
        fidelity: float = DEFAULT_FIDELITY,
        plan: ExecutionPlan | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> list[RestoredImage]:
        """Restores every face of every picture, or raises; there is no partial success.

        Args:
            images: (H, W, 3) uint8 BGR pictures, upright; not altered.
            fidelity: 0 (quality) to 1 (fidelity).
            plan: from `resolve_plan`; None for the baseline profile in safe mode.
            limits: pixels, faces and time of this call.

        Returns:
            One result per picture, in order.

        Raises:
            InputError: an option or a picture is unusable.
            InferenceError: a stage failed; names picture, face and cause.
            TimeLimitError: it took too long.
        """
        return list(self.restore_each(images, fidelity, plan, limits))

    def restore_each(
        self,
        images: Sequence[ImageU8],
        fidelity: float = DEFAULT_FIDELITY,
        plan: ExecutionPlan | None = None,
        limits: Limits = DEFAULT_LIMITS,
        deadline: Deadline | None = None,
    ) -> Iterator[RestoredImage]:
        """As `restore`, but gives each result as soon as it is there; arguments are checked at once.

        Args:
            images: as for `restore`, like the next three.
            fidelity: likewise.
            plan: likewise.
            limits: likewise.
            deadline: of a request that has begun before; None for one that begins now.
        """
        fidelity = check_fidelity(fidelity)
        if plan is None:
            plan = resolve_plan(device=self.device)
        self.check(plan)
        for index, image in enumerate(images, start=1):
            _check_array(image, index, limits)
        return self._run(images, fidelity, plan, limits, deadline or Deadline(limits.max_seconds))

    def _run(
        self,
        images: Sequence[ImageU8],
        fidelity: float,
        plan: ExecutionPlan,
        limits: Limits,
        deadline: Deadline,
    ) -> Iterator[RestoredImage]:
        with self._store.models_for(plan) as models:
            request = _Request(images, fidelity, plan, models, limits, deadline, second_look=self.second_look)
            yield from request.run()


class _Request:
    """One request's pictures on their way; nothing here outlives it."""

    def __init__(
        self,
        images: Sequence[ImageU8],
        fidelity: float,
        plan: ExecutionPlan,
        models: Models,
        limits: Limits,
        deadline: Deadline,
        *,
        second_look: bool,
    ) -> None:
        self._second_look = second_look
        self._images = images
        self._fidelity = fidelity
        self._plan = plan
        self._models = models
        self._limits = limits
        self._deadline = deadline
        self._clock = StageClock(plan.device)
        self._skipped: list[list[str]] = [[] for _ in images]
        self._losing_detail = [0] * len(images)
        self._canvases: list[Canvas | None] = [None for _ in images]
        self._float32_retries = [0] * len(images)
        self._memory_retries = [0] * len(images)

    def run(self) -> Iterator[RestoredImage]:
        """The results, each as soon as its last face is in."""
        # Pictures differ in size, and each new size would cost the detector cuDNN's trials.
        with torch_switches(cudnn_benchmark=False):
            jobs = self._find_faces()
        finished = 0
        for done in self._work_off(jobs):
            in_work = jobs[done].picture if done < len(jobs) else len(self._images)
            for picture in range(finished, in_work):
                yield self._result(picture, jobs)
            finished = in_work

    def _find_faces(self) -> list[_FaceJob]:
        pictures = range(len(self._images))
        with self._stage("detect", pictures, _name_pictures(pictures)):
            working = [make_working_copy(image) for image in self._images]
            found_faces = self._detect(working)
        jobs: list[_FaceJob] = []
        for picture, (copy, found) in enumerate(zip(working, found_faces, strict=True)):
            if found.ghosts:
                logger.info(
                    "image %d: not found again in another framing, so no faces: %d detections",
                    picture + 1,
                    found.ghosts,
                )
            with self._stage("align", [picture], _name_pictures([picture])):
                aligned, skipped = align_faces(copy, found.faces, self._limits.max_faces + 1)
                self._skipped[picture] = found.skipped + skipped
                if aligned:
                    kind = DeviceCanvas if self._plan.device_pixels else HostCanvas
                    self._canvases[picture] = kind(self._images[picture], copy, self._plan.device)
            if len(aligned) > self._limits.max_faces:
                raise FaceLimitError(
                    f"expected at most {self._limits.max_faces} faces, found more; cut the picture, or ask "
                    "the operator to raise CODEFORMER_MAX_FACES.",
                    picture + 1,
                )
            for reason, count in Counter(self._skipped[picture]).items():
                logger.warning("image %d: a face left as it is (%d times): %s", picture + 1, count, reason)
            with self._stage("align", [picture], _name_pictures([picture])):
                jobs += self._jobs_of(picture, aligned)
        return jobs

    def _detect(self, working: Sequence[WorkingCopy]) -> list[FoundFaces]:
        batched = self._plan.batch_detection
        if self._second_look:
            finder = FaceFinder(self._models.detector)
            return finder.find(
                working,
                batched=batched,
                at_most=self._limits.max_faces + 1,
                before_look=lambda: self._deadline.check("detection"),
            )
        found = self._models.detector.detect([copy.image_bgr for copy in working], batched=batched)
        return [FoundFaces(faces, [], 0) for faces in found]

    def _jobs_of(self, picture: int, aligned: Sequence[AlignedFace]) -> list[_FaceJob]:
        """The faces in the order of pasting, with their numbers in the order of their scores."""
        if not aligned:
            return []
        image = self._images[picture]
        picture_is_gray = is_gray(image)
        numbers = {id(face): number for number, face in enumerate(aligned, start=1)}
        self._losing_detail[picture] = sum(loses_detail(image, one.face.face_to_picture) for one in aligned)
        if self._losing_detail[picture]:
            logger.warning(
                "image %d: sharp or grainy, larger than their crops of %d px, and maybe softer now: %d faces",
                picture + 1,
                FACE_SIZE,
                self._losing_detail[picture],
            )
        return [
            _FaceJob(
                picture,
                numbers[id(one)],
                one,
                gray_area(image, one.face.picture_to_face, picture_is_gray=picture_is_gray),
            )
            for one in from_far_to_near(aligned)
        ]

    def _work_off(self, jobs: Sequence[_FaceJob]) -> Iterator[int]:
        """Takes all faces through the networks and into their pictures; yields how many are in."""
        size = batch_size_for(self._plan)
        done = 0
        yield done
        while done < len(jobs):
            batch = jobs[done : done + size]
            restored = self._through_networks(batch)
            if restored is None:
                release_cached_memory(self._plan.device)
                size = len(batch) // 2
                continue
            self._paste(batch, *restored)
            done += len(batch)
            if len(jobs) > _QUIET_FACES and _tenths(done, jobs) > _tenths(done - len(batch), jobs):
                logger.info("%d of %d faces are restored", done, len(jobs))
            yield done

    @torch.inference_mode()
    def _through_networks(self, batch: Sequence[_FaceJob]) -> tuple[Tensor, Sequence[Tensor | None]] | None:
        """Restored faces and their masks; None for a batch that did not fit into memory, but may in parts."""
        try:
            with torch_switches(cudnn_benchmark=self._plan.cudnn_benchmark):
                faces = self._restore(batch)
                return faces, self._parse(batch, faces)
        except DeviceMemoryError as cause:
            if len(batch) == 1:
                raise
            logger.warning("%s Trying half as many faces at a time.", cause)
        for picture in {job.picture for job in batch}:
            self._memory_retries[picture] += 1
        return None

    def _restore(self, batch: Sequence[_FaceJob]) -> Tensor:
        pictures = [job.picture for job in batch]
        with self._stage("align", pictures, _name_faces(batch)):
            crops = torch.cat(
                [
                    self._canvas(picture).crops([job.aligned for job in jobs])
                    for picture, jobs in itertools.groupby(batch, key=lambda job: job.picture)
                ]
            )
        with self._stage("restore", pictures, _name_faces(batch)):
            faces = self._with_float32_retry(
                batch,
                lambda dtype: self._models.restorer.restore(crops, self._fidelity, half_dtype=dtype),
            )
            for index, job in enumerate(batch):
                if job.gray_area is not None:
                    faces[index] = match_gray(faces[index], crops[index], job.gray_area)
        return faces

    def _parse(self, batch: Sequence[_FaceJob], faces: Tensor) -> Sequence[Tensor | None]:
        if not self._plan.parse_faces:
            return [None] * len(batch)
        with self._stage("parse", [job.picture for job in batch], _name_faces(batch)):
            masks = self._with_float32_retry(
                batch, lambda dtype: self._models.masker.masks(faces, half_dtype=dtype)
            )
        return list(masks)

    def _with_float32_retry(
        self, batch: Sequence[_FaceJob], run: Callable[[torch.dtype | None], Tensor]
    ) -> Tensor:
        """Runs a network in the plan's precision, and in float32 if that was half and overflowed."""
        try:
            return run(self._plan.half_dtype)
        except NonFiniteOutputError as cause:
            if self._plan.half_dtype is None:
                raise
            logger.warning("%s: %s Running it again in float32.", _name_faces(batch), cause)
        for picture in {job.picture for job in batch}:
            self._float32_retries[picture] += 1
        return run(None)

    @torch.inference_mode()
    def _paste(self, batch: Sequence[_FaceJob], faces: Tensor, masks: Sequence[Tensor | None]) -> None:
        for job, face, mask in zip(batch, faces, masks, strict=True):
            with (
                torch_switches(cudnn_benchmark=False),
                self._stage("paste", [job.picture], _name_faces([job])),
            ):
                self._canvas(job.picture).paste(face, job.aligned.face.face_to_picture, mask)

    def _canvas(self, picture: int) -> Canvas:
        canvas = self._canvases[picture]
        if canvas is None:
            raise AssertionError(f"picture {picture} has faces and no canvas")
        return canvas

    def _result(self, picture: int, jobs: Sequence[_FaceJob]) -> RestoredImage:
        canvas, self._canvases[picture] = self._canvases[picture], None
        if canvas is None:
            image = self._images[picture].copy()
        else:
            with self._stage("paste", [picture], _name_pictures([picture])):
                image = canvas.to_image()
        return RestoredImage(
            image_bgr=image,
            faces=tuple(
                job.aligned.face for job in sorted(jobs, key=lambda job: job.number) if job.picture == picture
            ),
            skipped_faces=tuple(self._skipped[picture]),
            faces_losing_detail=self._losing_detail[picture],
            elapsed_ms=self._clock.elapsed_ms(picture),
            float32_retries=self._float32_retries[picture],
            memory_retries=self._memory_retries[picture],
        )

    @contextmanager
    def _stage(self, stage: Stage, pictures: Sequence[int], where: str) -> Iterator[None]:
        """Times a stage and gives its failures a name and a place."""
        self._deadline.check(f"{stage} of {where}")
        try:
            with self._clock.measure(stage, pictures):
                yield
        except _STAGE_ERRORS as cause:
            kind = DeviceMemoryError if is_out_of_memory(cause) else InferenceError
            operator_logger.warning("%s failed on %s: %s: %s", stage, where, type(cause).__name__, cause)
            raise kind(stage, where, in_words(cause)) from cause


def _tenths(done: int, jobs: Sequence[_FaceJob]) -> int:
    return 10 * done // len(jobs)


def _name_pictures(pictures: Sequence[int]) -> str:
    return ", ".join(f"image {picture + 1}" for picture in pictures)


def _name_faces(batch: Sequence[_FaceJob]) -> str:
    return ", ".join(f"image {job.picture + 1} face {job.number}" for job in batch)


def _check_array(image: object, index: int, limits: Limits) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"expected a uint8 array, got a {kind}.", index)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"expected the shape (H, W, 3) in BGR, got {image.shape}.", index)
    check_size(image.shape[1], image.shape[0], index, limits)
