"""One picture on its way: from what was found in it to the picture with its restored faces."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Final

import numpy as np
import torch

from codeformer.engine.canvas import Canvas, DeviceCanvas, HostCanvas
from codeformer.engine.engine import BatchKey, FaceJob, FaceResult
from codeformer.engine.finder import FoundFaces
from codeformer.engine.memory import is_out_of_memory, release_failed_attempt
from codeformer.engine.plan import torch_switches
from codeformer.engine.stages import Span, StageTimes, run_stage
from codeformer.errors import CodeFormerError, FaceLimitError, OptionError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import (
    FACE_SIZE,
    AlignedFace,
    Face,
    SkippedFace,
    WorkingCopy,
    align_faces,
    from_far_to_near,
    make_working_copy,
    skipped_in_picture,
    whole_picture_as_face,
)
from codeformer.imaging.traits import gray_area, is_gray, loses_detail
from codeformer.options import Recipe, Selection

logger = logging.getLogger(__name__)

_LEFT_OUT: Final = "left out: by its number"
_NOT_CHOSEN: Final = {
    "largest": "left out: not the largest face",
    "centre": "left out: not the face nearest to the centre",
}


@dataclass(frozen=True, eq=False)
class FaceCrops:
    """A face as it went through the networks; (512, 512, 3) uint8 BGR each.

    Attributes:
        crop_bgr: the aligned crop of the picture.
        restored_bgr: the restored face, before the mask and the strength of the paste.
    """

    crop_bgr: ImageU8
    restored_bgr: ImageU8


@dataclass(frozen=True)
class RestoredImage:
    """What became of one picture.

    Attributes:
        image_bgr: (H, W, 3) uint8 BGR, the input's size; equal to the input outside the faces.
        faces: the restored faces, best score first, in coordinates of the picture.
        skipped_faces: the detected faces that were not restored, with reasons.
        faces_losing_detail: sharp restored faces that are larger than their 512 px crop: they may come back
            softer than they were.
        elapsed_ms: milliseconds by stage (detect, align, restore, parse, paste). A stage that worked
            on a batch counts in equal shares for its items, so that the sum over a request's pictures
            is the time that passed. "restorers.codeformer" and "restorers.gfpgan" are each one's part of
            "restore", not to be added to it.
        float32_retries: faces whose half-precision output, of a restorer or the parser, was not finite and
            that ran again in float32.
        memory_retries: how often work on this picture did not fit into the device's memory and was done
            again with less at a time.
        faces_per_pass: how many faces, of all pictures, went through the networks at a time together with
            those of this one, on average; 0 without a face.
        crops: of each of `faces`, where they were asked for; otherwise empty.
    """

    image_bgr: ImageU8
    faces: tuple[Face, ...]
    skipped_faces: tuple[SkippedFace, ...]
    faces_losing_detail: int
    elapsed_ms: Mapping[str, float]
    float32_retries: int
    memory_retries: int
    faces_per_pass: float = 0.0
    crops: tuple[FaceCrops, ...] = ()


class Picture:
    """A picture, its faces, and what has been done to them so far.

    Args:
        image_bgr: (H, W, 3) uint8 BGR, upright; not altered.
        number: its place among the others, from 1, for messages.
        key: how its faces are restored.
        recipe: what is done to them.
        selection: which of them.
        keep_crops: fill `RestoredImage.crops`.

    Attributes:
        error: why it has failed, if it has.
        found: what `prepare` was given; None before.
    """

    def __init__(
        self,
        image_bgr: ImageU8,
        number: int,
        key: BatchKey,
        recipe: Recipe,
        selection: Selection,
        *,
        keep_crops: bool = False,
    ) -> None:
        self.image_bgr = image_bgr
        self.number = number
        self.name = f"image {number}"
        self.error: CodeFormerError | None = None
        self.found: FoundFaces | None = None
        self._key = key
        self._recipe = recipe
        self._selection = selection
        self._keep_crops = keep_crops
        self._device = key.plan.device
        self._canvas: Canvas | None = None
        self._working: WorkingCopy | None = None
        self._times = StageTimes()
        self._faces: list[Face] = []
        self._skipped: list[SkippedFace] = []
        # By the identity of the face.
        self._crops: dict[int, FaceCrops] = {}
        self._losing_detail = 0
        self._float32_retries = 0
        self._shortages = 0
        self._smaller_batches = 0
        self._unfinished = 0
        self._in_passes = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to be done: all faces are in, or one has failed."""
        return self.error is not None or not self._unfinished

    @property
    def working(self) -> WorkingCopy:
        """The copy that detection and cropping see."""
        if self._working is None:
            self._working = make_working_copy(self.image_bgr)
        return self._working

    def add_time(self, stage: str, span: Span, share: float = 1.0) -> None:
        """Counts a share of the time of a stage, or of a part of one."""
        self._times.add(stage, span, share)

    def add_shortage(self) -> None:
        """Notes that something had to be done again for want of memory."""
        self._shortages += 1

    def prepare(self, found: FoundFaces, max_faces: int) -> list[FaceJob]:
        """Aligns and chooses the faces.

        Args:
            found: in the working frame.
            max_faces: that may be in the picture.

        Returns:
            A job for each face that is to be restored, the farthest one first: the order of pasting.

        Raises:
            FaceLimitError: there are more faces.
            OptionError: the selection leaves out a face that is not there.
            InferenceError: OpenCV or the device failed.
        """
        self.found = found
        if found.ghosts:
            logger.info(
                "%s: detections that are no faces: %d (not found again in another framing)",
                self.name,
                found.ghosts,
            )
        with run_stage("align", self.name, self._device) as span:
            aligned, skipped = align_faces(self.working, found.faces, max_faces + 1)
            if len(aligned) > max_faces:
                raise FaceLimitError(
                    f"expected at most {max_faces} faces, found more; crop the picture, or ask "
                    "the operator to raise CODEFORMER_MAX_FACES.",
                    self.number,
                )
            chosen, left_out = self._choose(aligned)
            numbers = {id(one): number for number, one in enumerate(aligned, start=1)}
            jobs = self._jobs_of(chosen, numbers) if chosen else []
        self.add_time("align", span)
        not_restored = found.skipped + skipped
        for reason, count in Counter(reason for _, reason in not_restored).items():
            logger.warning("%s: faces not restored: %d (%s)", self.name, count, reason)
        self._skipped = [skipped_in_picture(*one, self.working) for one in not_restored] + left_out
        self._faces = [one.face for one in chosen]
        self._unfinished = len(jobs)
        if self._losing_detail:
            logger.warning(
                "%s: faces that may be softer now: %d (sharp or grainy, larger than their crops of %d px)",
                self.name,
                self._losing_detail,
                FACE_SIZE,
            )
        return jobs

    def prepare_aligned(self) -> list[FaceJob]:
        """Takes the picture for the crop of one face; returns its job.

        Without a mask, a paste that covers the whole picture replaces it: neither erosion nor blur of the
        square begins at the picture's border.

        Raises:
            InferenceError: the device failed.
        """
        face = whole_picture_as_face()
        with run_stage("align", self.name, self._device) as span:
            jobs = self._jobs_of([face], {id(face): 1})
        self.add_time("align", span)
        self._faces, self._unfinished = [face.face], 1
        return jobs

    def _choose(self, aligned: Sequence[AlignedFace]) -> tuple[list[AlignedFace], list[SkippedFace]]:
        """The faces that are to be restored, in their order, and the other ones with the reason."""
        unwanted = self._selection.left_out
        if unknown := [number for number in unwanted if number > len(aligned)]:
            expected = f"numbers of the {len(aligned)} faces of {self.name}"
            raise OptionError("left_out", min(unknown), expected)
        is_wanted = [number not in unwanted for number in range(1, len(aligned) + 1)]
        chosen, left_out = _choose(
            list(compress(aligned, is_wanted)), self._selection, self.image_bgr.shape[1::-1]
        )
        return chosen, _left_out(compress(aligned, map(not_, is_wanted)), _LEFT_OUT) + left_out

    def _jobs_of(self, faces: Sequence[AlignedFace], numbers: Mapping[int, int]) -> list[FaceJob]:
        canvas = self._canvas = self._make_canvas()
        image = self.image_bgr
        picture_is_gray = is_gray(image)
        self._losing_detail = sum(loses_detail(image, one.face.face_to_picture) for one in faces)
        return [
            FaceJob(
                where=f"{self.name} face {numbers[id(one)]}",
                number=numbers[id(one)],
                canvas=canvas,
                aligned=one,
                steps=self._recipe.steps,
                gray_area=gray_area(image, one.face.picture_to_face, picture_is_gray=picture_is_gray),
                key=self._key,
            )
            for one in from_far_to_near(faces)
        ]

    def _make_canvas(self) -> Canvas:
        if self._key.plan.device_pixels:
            try:
                return DeviceCanvas(self.image_bgr, self.working, self._device)
            except RuntimeError as cause:
                if not is_out_of_memory(cause):
                    raise
                self.add_shortage()
                logger.warning("%s stays in the host's memory: %s", self.name, cause)
                release_failed_attempt(cause, self._device)
        return HostCanvas(self.image_bgr, self.working, self._device)

    @torch.inference_mode()
    def finish(self, job: FaceJob, result: FaceResult) -> None:
        """Pastes the face of one of its jobs; in the jobs' order. A failed one fails the picture."""
        for stage, span, share in result.times:
            self.add_time(stage, span, share)
        self._float32_retries += result.ran_in_float32
        self._smaller_batches = max(self._smaller_batches, result.smaller_batches)
        self._unfinished -= 1
        self._in_passes += result.faces_in_pass
        if result.error is not None:
            self.fail(result.error)
            return
        try:
            with (
                torch_switches(cudnn_benchmark=False),
                run_stage("paste", job.where, self._device) as span,
            ):
                self._paste(job, result)
        except CodeFormerError as failure:
            self.fail(failure)
        else:
            self.add_time("paste", span)

    def _paste(self, job: FaceJob, result: FaceResult) -> None:
        face, mask, place = result.face_bgr, result.mask, job.aligned.face.face_to_picture
        if self._canvas is None or face is None:
            raise AssertionError(f"{job.where}: no canvas, or neither a face nor an error")
        if self._keep_crops:
            [crop] = self._canvas.crops([job.aligned])
            self._crops[id(job.aligned.face)] = FaceCrops(crop.cpu().numpy(), face.cpu().numpy())
        try:
            self._canvas.paste(face, place, mask, self._recipe.strength)
        except RuntimeError as cause:
            if not is_out_of_memory(cause) or not isinstance(self._canvas, DeviceCanvas):
                raise
            # The host has room for it; crops still come from the copy on the device.
            self.add_shortage()
            logger.warning("%s is pasted in the host's memory: %s", job.where, cause)
            release_failed_attempt(cause, self._device)
            self._canvas = HostCanvas(self._canvas.to_image(), self.working, self._device)
            self._canvas.paste(face, place, mask, self._recipe.strength)

    def fail(self, failure: CodeFormerError) -> None:
        """Ends the work on it."""
        self.error = failure
        self._canvas = self._working = None

    def result(self) -> RestoredImage:
        """The picture with its restored faces; once, when it is complete and has not failed.

        Raises:
            InferenceError: it cannot be brought back from the device.
        """
        canvas, self._canvas, self._working = self._canvas, None, None
        if canvas is None:
            image = self.image_bgr.copy()
        else:
            with run_stage("paste", self.name, self._device) as span:
                image = canvas.to_image()
            self.add_time("paste", span)
        return RestoredImage(
            image_bgr=image,
            faces=tuple(self._faces),
            skipped_faces=tuple(self._skipped),
            faces_losing_detail=self._losing_detail,
            elapsed_ms=self._times.elapsed_ms(),
            float32_retries=self._float32_retries,
            memory_retries=self._shortages + self._smaller_batches,
            faces_per_pass=self._in_passes / len(self._faces) if self._faces else 0.0,
            crops=tuple(self._crops[id(face)] for face in self._faces) if self._keep_crops else (),
        )


def _choose(
    faces: Sequence[AlignedFace], selection: Selection, size_wh: tuple[int, ...]
) -> tuple[list[AlignedFace], list[SkippedFace]]:
    """The faces that are to be restored, in their order, and the other ones with the reason."""
    is_large = [_sides(one.face).max() >= selection.min_face_px for one in faces]
    chosen = list(compress(faces, is_large))
    left_out = _left_out(
        compress(faces, map(not_, is_large)), f"left out: smaller than {selection.min_face_px:g} px"
    )
    if selection.faces == "all" or len(chosen) < 2:
        return chosen, left_out
    if selection.faces == "largest":
        best = max(chosen, key=lambda one: _visible_area(one.face, size_wh))
    else:
        centre_xy = np.array(size_wh) / 2
        best = min(
            chosen,
            key=lambda one: float(np.linalg.norm(one.face.box_xyxy.reshape(2, 2).mean(axis=0) - centre_xy)),
        )
    others = (one for one in chosen if one is not best)
    return [best], left_out + _left_out(others, _NOT_CHOSEN[selection.faces])


def _left_out(faces: Iterable[AlignedFace], reason: str) -> list[SkippedFace]:
    return [SkippedFace(reason, one.face.box_xyxy, one.face.score, one.face.landmarks_xy) for one in faces]


def _sides(face: Face) -> np.ndarray:
    return face.box_xyxy[2:] - face.box_xyxy[:2]


def _visible_area(face: Face, size_wh: tuple[int, ...]) -> float:
    """Of the part of its box that lies in the picture, in px."""
    corners = np.clip(face.box_xyxy.reshape(2, 2), 0, np.array(size_wh))
    return float(np.prod(corners[1] - corners[0]))
